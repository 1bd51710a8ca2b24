"""Merging partial results, adding up gradients, packing rows: PyTorch's way and Triton's, each against float64.

Triton runs in its interpreter on a CPU; with a GPU the same cases run on it, compiled.
"""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

from megatron_loong.kernels import row_ops
from tests.nightly import mostly_nightly

TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")
HALF = (torch.bfloat16, torch.float16)


def private_copy():
    """`triton_row_ops` anew: whether Triton interprets or compiles is settled when a kernel is decorated."""
    found = importlib.util.find_spec("megatron_loong.kernels.triton_row_ops")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(
    params=[
        "torch",
        pytest.param("interpreted", marks=needs_triton),
        pytest.param("gpu", marks=[pytest.mark.gpu, needs_triton]),
    ]
)
def device(request, monkeypatch):
    """Where the tensors of a test are; who serves `row_ops` there is the fixture's doing."""
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        assert row_ops.triton_fault() is None
        return "cuda"
    if request.param == "interpreted":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        module = private_copy()
        launches.clear()
        for name in ("_combine", "_move"):
            monkeypatch.setattr(module, name, counted(getattr(module, name)))
        monkeypatch.setattr(row_ops, "_by_triton", lambda x: True)
        monkeypatch.setattr(row_ops, "_triton", lambda: module)
    return "cpu"


launches = []


class counted:
    """A Triton kernel that notes each launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        launches.append(grid)
        return self.kernel[grid]


def draw(*shape, dtype=torch.float64, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def bhs(x):
    """The same numbers, dimensions 1 and 2 swapped in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


# -- merging ---------------------------------------------------------------------------------------------------------

MERGES = {
    "one-head": (5, 1, 1, 16),
    "odd": (37, 2, 2, 20),
    "wide": (34, 1, 1, 192),
    "width-256": (9, 1, 1, 256),
    "narrow": (530, 1, 1, 8),
}


def expected_merge(parts):
    lses, outs = (torch.stack([x.double().cpu() for x in same]) for same in zip(*parts, strict=True))
    total = lses.logsumexp(0)
    weights = (lses - total.clamp_min(-1e300)).exp().unsqueeze(-1)
    return total, (weights * outs).sum(0)


def empty_result(shape, wide, narrow, device):
    """(lse, out) in the memory order of kernels, full of what must be overwritten."""
    s, b, h, d = shape
    lse = torch.full((b, h, s), torch.nan, dtype=wide, device=device).permute(2, 0, 1)
    return lse, torch.full((b, s, h, d), torch.nan, dtype=narrow, device=device).transpose(0, 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's of exp(-inf) and log(0), which are meant
@pytest.mark.parametrize(
    ("name", "count", "dtype"),
    [
        *((name, 3, dtype) for name in MERGES for dtype in (torch.float64, torch.bfloat16)),
        *(("odd", count, torch.float16) for count in (1, 2, 5, 8, 11)),
        ("odd", 5, torch.float64),
        ("odd", 3, torch.float32),
    ],
)
def test_merge_is_the_online_softmax(name, count, dtype, device, request):
    """Any number of parts, the first a sum in the wide dtype; the result is as wide, or rounded once."""
    s, b, h, _ = shape = MERGES[name]
    wide = torch.promote_types(dtype, torch.float32)
    parts = []
    for i in range(count):
        lse = 3 * draw(b, h, s, dtype=wide, seed=i, device=device).permute(2, 0, 1)
        parts.append((lse, draw(*shape, dtype=dtype if i else wide, seed=50 + i, device=device)))
    for lse, out in parts[: count // 2]:
        lse[1], out[1] = -torch.inf, 0.0  # a row that has seen nothing in half of the parts
    parts[-1][0][2] += 200  # all else weighs nothing
    for lse, out in parts:
        lse[4], out[4] = -torch.inf, 0.0  # nothing seen at all
    right = expected_merge(parts)
    into = empty_result(shape, wide, wide, device)
    row_ops.merge_rows(into, parts)
    assert (into[0][4] == -torch.inf).all() and not into[1][4].any()
    tolerance = 1e-12 if wide == torch.float64 else 3e-6
    for what, got, want in zip(("lse", "out"), into, right, strict=True):
        error = (got.double().cpu() - want).nan_to_num(0).abs().max().item()  # -inf less -inf
        assert error <= tolerance and not got.isnan().any(), f"{what}: max abs error {error:.1e} > {tolerance:g}"
    rounded = empty_result(shape, wide, dtype, device)
    row_ops.merge_rows(rounded, parts)
    assert torch.equal(rounded[0], into[0])
    assert_rounded(rounded[1], into[1], request)
    row_ops.merge_rows(parts[0], parts)  # in place
    assert torch.equal(parts[0][0], into[0]) and torch.equal(parts[0][1], into[1])


def assert_rounded(got, wide, request):
    """Rounded to nearest; Triton's interpreter cuts bits off instead."""
    if "interpreted" in request.node.name:
        assert ((got.double() - wide.double()).abs() <= torch.finfo(got.dtype).eps * wide.double().abs()).all()
    else:
        assert torch.equal(got, wide.to(got.dtype))


def test_merge_into_views_leaves_the_rest_alone(device):
    """Rows of a longer result, a padded part, sequence-first memory, a sink that is one number a head."""
    out = draw(11, 2, 3, 20, dtype=torch.float32, device=device)
    lse = draw(2, 3, 11, dtype=torch.float32, seed=1, device=device)
    into = lse.permute(2, 0, 1)[2:9], out[2:9]
    padded = draw(2, 7, 3, 24, dtype=torch.bfloat16, seed=2, device=device)[..., :20].transpose(0, 1)
    padded_lse = draw(2, 3, 16, dtype=torch.float32, seed=3, device=device)[:, :, :7].permute(2, 0, 1)
    sink = draw(3, dtype=torch.float32, seed=4, device=device).expand(7, 2, 3)
    by_columns = draw(20, 7, 2, 3, dtype=torch.bfloat16, seed=5, device=device).permute(1, 2, 3, 0)
    parts = [
        into,
        (padded_lse, padded),
        (sink, out.new_zeros(20).expand(7, 2, 3, 20)),
        (padded_lse + 1, by_columns),
    ]
    before = out.clone(), lse.clone()
    for some in (parts[:3], parts):  # columns first are PyTorch's
        want_lse, want_out = expected_merge(some)
        row_ops.merge_rows(into, some)
        torch.testing.assert_close(into[1].double().cpu(), want_out, atol=3e-6, rtol=0)
        torch.testing.assert_close(into[0].double().cpu(), want_lse, atol=3e-6, rtol=0)
    for part in (slice(0, 2), slice(9, None)):
        assert torch.equal(out[part], before[0][part]) and torch.equal(lse[..., part], before[1][..., part])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_many_merges_in_float32_beat_bfloat16(device):
    """32 parts, four at a time: a result kept in bfloat16 has 5 times the error and more."""
    outs = [draw(8, 1, 2, 16, dtype=torch.bfloat16, seed=i, device=device) for i in range(32)]
    lses = [draw(8, 1, 2, dtype=torch.float32, seed=100 + i, device=device) for i in range(32)]
    parts = list(zip(lses, outs, strict=True))
    _, exact = expected_merge(parts)
    total, rounded = (
        (torch.full_like(lses[0], -torch.inf), torch.zeros_like(outs[0], dtype=torch.float32)) for _ in range(2)
    )
    for start in range(0, 32, 4):
        row_ops.merge_rows(total, [total, *parts[start : start + 4]])
        row_ops.merge_rows(rounded, [rounded, *parts[start : start + 4]])
        rounded[1].copy_(rounded[1].bfloat16())
    ours, theirs = ((x[1].double().cpu() - exact).pow(2).mean().sqrt().item() for x in (total, rounded))
    assert ours < 1e-6 < 5e-6 < theirs, f"{ours:.1e}, {theirs:.1e}"


# -- adding up -------------------------------------------------------------------------------------------------------


def gradient(s, b, heads, d, dtype, device, memory, seed=0):
    """[s, b, heads, d], as kernels return it: transposed, cut out of a wider one, or already sequence first."""
    if memory == "sbhd":
        return draw(s, b, heads, d, dtype=dtype, seed=seed, device=device)
    wide = draw(b, s, heads, d + (4 if memory == "padded" else 0), dtype=dtype, seed=seed, device=device)
    return wide[..., :d].transpose(0, 1)


@pytest.mark.parametrize(
    ("b", "count", "dtype", "memory"),
    [
        *((1, 2, dtype, memory) for dtype in (*HALF, torch.float32) for memory in ("bshd", "padded", "sbhd")),
        *((b, count, torch.bfloat16, "padded") for b, count in ((1, 1), (2, 5), (1, 9))),
    ],
)
def test_gradients_are_summed_in_float32_and_rounded_once(b, count, dtype, memory, device, request):
    """dk and dv of unequal widths, into float32, into their own dtype, and onto rows [3, 12) of a sum."""
    shapes = [(9, b, 2, 20), (9, b, 2, 16)]
    parts = [
        tuple(gradient(*x, dtype, device, memory, seed=7 * i + n) for n, x in enumerate(shapes)) for i in range(count)
    ]
    right = [sum(x.double() for x in same) for same in zip(*parts, strict=True)]
    wide, rounded = ([torch.full(x, torch.nan, dtype=y, device=device) for x in shapes] for y in (torch.float32, dtype))
    for into in (wide, rounded):
        row_ops.add_rows(into, parts)
    for got, narrow, want in zip(wide, rounded, right, strict=True):
        torch.testing.assert_close(got.double(), want, atol=3e-6, rtol=0)
        assert_rounded(narrow, got, request)
    sums = [draw(17, *x[1:], dtype=torch.float32, seed=5, device=device) for x in shapes]
    before = [x.clone() for x in sums]
    rows = tuple(x[3:12] for x in sums)
    row_ops.add_rows(rows, [rows, *parts])
    for total, was, want in zip(sums, before, right, strict=True):
        torch.testing.assert_close(total[3:12].double(), was[3:12].double() + want, atol=3e-6, rtol=0)
        assert torch.equal(total[:3], was[:3]) and torch.equal(total[12:], was[12:])


def test_float64_sums_stay_float64(device):
    parts = [(draw(1, 4, 2, 8, seed=i, device=device).transpose(0, 1),) for i in range(3)]
    into = (torch.empty(4, 1, 2, 8, dtype=torch.float64, device=device),)
    row_ops.add_rows(into, parts)
    torch.testing.assert_close(into[0], sum(x for (x,) in parts), atol=1e-15, rtol=0)


def test_up_to_eight_parts_are_one_launch(device, request):
    if "interpreted" not in request.node.name:
        pytest.skip("counted in the interpreter")
    sums = tuple(torch.zeros(8, 1, 2, 16) for _ in range(2))
    for count, expected in ((1, 1), (2, 2), (8, 2), (9, 4)):  # one part of dk and dv is a copy of both
        launches.clear()
        row_ops.add_rows(sums, [sums] * count)
        assert len(launches) == expected, count
    launches.clear()
    row_ops.merge_rows((sums[0][..., 0], sums[1]), [(sums[0][..., 0], sums[1])] * 8)
    assert len(launches) == 1


# -- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("d", [8, 5])
def test_chunks_of_q_k_and_v_are_packed_into_one_message(b, d, device):
    """Heads [s, b, peers x mine, d] -> a message [peer, s, everything of one token]; and back from it."""
    s, peers = 7, 2
    tensors = [draw(s, b, n * peers, d, dtype=torch.bfloat16, seed=n, device=device) for n in (4, 1, 2)]
    widths = [b * n * d for n in (4, 1, 2)]
    buffer = torch.full((peers, s, sum(widths)), 7.0, dtype=torch.bfloat16, device=device)
    columns = buffer.split(widths, 2)
    views = [x.unflatten(2, (b, n, d)).permute(1, 2, 0, 3, 4) for x, n in zip(columns, (4, 1, 2), strict=True)]
    row_ops.copy_rows_([(view, x.unflatten(2, (peers, -1))) for view, x in zip(views, tensors, strict=True)])
    for peer in range(peers):
        parts = [x.chunk(peers, 2)[peer].flatten(1) for x in tensors]
        assert torch.equal(buffer[peer], torch.cat(parts, 1)), peer
    back = [torch.zeros_like(x) for x in tensors]
    row_ops.copy_rows_([(x.unflatten(2, (peers, -1)), view) for view, x in zip(views, back, strict=True)])
    assert all(map(torch.equal, back, tensors))


@pytest.mark.parametrize("widths", [(24, 8, 8), (5, 3, 1), (2048, 40, 1030)], ids=str)
def test_rows_are_put_in_the_order_of_the_sequence_and_back(widths, device):
    rows = draw(11, sum(widths), dtype=torch.float32, device=device)
    order = torch.tensor([3, 4, 5, 0, 1, 2, 10, 9, 8], device=device)
    arrived = [torch.zeros(9, n, device=device) for n in widths]
    parts = rows.split(widths, 1)
    row_ops.copy_rows_(list(zip(arrived, parts, strict=True)), source_rows=order)
    for got, part in zip(arrived, parts, strict=True):
        assert torch.equal(got, part[order])
    packed = torch.full_like(rows, 7.0)
    row_ops.copy_rows_(list(zip(packed.split(widths, 1), arrived, strict=True)), target_rows=order)
    assert torch.equal(packed[order], rows[order]) and packed[[6, 7]].eq(7).all()


def test_what_the_kernel_cannot_walk_over_is_left_to_torch(device):
    """Six dimensions that do not join, and a last dimension that is not dense."""
    x = draw(3, 2, 3, 2, 2, 4, device=device)
    scattered = torch.zeros(*(2 * n for n in x.shape), dtype=x.dtype, device=device)[::2, ::2, ::2, ::2, ::2, :4]
    turned = torch.zeros(4, 3, dtype=x.dtype, device=device).t()
    flat = torch.zeros(3, 4, dtype=x.dtype, device=device)
    row_ops.copy_rows_([(scattered, x), (turned, x[:, 0, 0, 0, 0]), (flat, x[:, 1, 1, 1, 1])])
    assert torch.equal(scattered, x) and torch.equal(turned, x[:, 0, 0, 0, 0]) and torch.equal(flat, x[:, 1, 1, 1, 1])


def test_on_a_cpu_it_is_torch():
    assert not row_ops._by_triton(torch.zeros(1))
    if not torch.cuda.is_available():
        assert row_ops.triton_fault() == "no GPU here"


def test_the_environment_switches_triton_off(monkeypatch):
    monkeypatch.setenv("LOONG_TRITON", "0")
    assert row_ops.triton_fault() == "LOONG_TRITON=0" and not row_ops.wanted()
    monkeypatch.setenv("LOONG_TRITON", "no")
    with pytest.raises(ValueError, match=r"LOONG_TRITON='no': 0 switches Triton off, 1 .* leaves it on"):
        row_ops.wanted()
    monkeypatch.delenv("LOONG_TRITON")
    assert row_ops.wanted()


# -- compiled without a GPU ------------------------------------------------------------------------------------------


class PretendedGpu:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


class compiled_only:
    """A Triton kernel that is compiled with the arguments of a launch, and not launched."""

    def __init__(self, kernel, into):
        self.kernel, self.into = kernel, into

    def __getitem__(self, grid):
        return lambda *args, **options: self.into.append(self.kernel.warmup(*args, grid=grid, **options))


@needs_triton
@pytest.mark.parametrize("arch", mostly_nightly([80, 90, 100], always=[90]))
def test_kernels_compile_for_nvidia_gpus_with_loads_of_16_bytes(arch, monkeypatch):
    """Without the wide loads a kernel cannot reach the copy bandwidth."""
    import triton

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton.runtime.driver, "_active", PretendedGpu(arch))
    module, built = private_copy(), []
    for name in ("_combine", "_move"):
        monkeypatch.setattr(module, name, compiled_only(getattr(module, name), built))
    monkeypatch.setattr(row_ops, "_by_triton", lambda x: True)
    monkeypatch.setattr(row_ops, "_triton", lambda: module)

    lse, out = torch.zeros(1, 4, 64).permute(2, 0, 1), torch.zeros(1, 64, 4, 128).transpose(0, 1)
    part = lse, out.bfloat16()
    row_ops.merge_rows((lse, out), [part] * 4)
    row_ops.merge_rows(part, [(lse, out), *[part] * 4])
    row_ops.add_rows((out,), [part[1:]] * 4)
    parts = torch.zeros(64, 3 * 512, dtype=torch.bfloat16).split(512, 1)
    row_ops.copy_rows_([(x.contiguous(), x) for x in parts], source_rows=torch.arange(64))
    row_ops.copy_rows_([(x, x.contiguous()) for x in parts])
    assert len(built) == 5
    for kernel in built:
        assert kernel.metadata.target.arch == arch
        wide = {"ld", "st"} - {x[:2] for x in re.findall(r"(?:ld|st)\.global\.v4\.b32", kernel.asm["ptx"])}
        assert not wide and ".local" not in kernel.asm["ptx"], kernel.metadata.name
