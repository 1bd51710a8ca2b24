"""Folding blocks, adding up gradients, packing rows: PyTorch's way and Triton's, each against float64.

Triton runs in its interpreter on a CPU; with a GPU the same cases run on it, compiled.
"""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

from megatron_loong.kernels import folds
from megatron_loong.kernels.common import dtype_name
from tests.nightly import mostly_nightly

TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")
HALF = (torch.bfloat16, torch.float16)


def private_copy():
    """`triton_folds` anew: whether Triton interprets or compiles is settled when a kernel is decorated."""
    found = importlib.util.find_spec("megatron_loong.kernels.triton_folds")
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
    """Where the tensors of a test are; who serves `folds` there is the fixture's doing."""
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        assert folds.triton_fault() is None
        return "cuda"
    if request.param == "interpreted":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        module = private_copy()
        launches.clear()
        for name in ("_merge", "_move"):
            monkeypatch.setattr(module, name, counted(getattr(module, name)))
        monkeypatch.setattr(folds, "_by_triton", lambda x: True)
        monkeypatch.setattr(folds, "_triton", lambda: module)
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
    "one-head": (1, 5, 1, 16),
    "odd": (2, 37, 3, 20),
    "wide": (1, 70, 2, 192),
    "width-256": (1, 9, 2, 256),
    "narrow": (2, 130, 2, 8),
}


def expected_merge(out, lse, block_out, block_lse):
    out, lse, block_out, block_lse = (x.double().cpu() for x in (out, lse, block_out, block_lse))
    total = torch.logaddexp(lse, block_lse)
    weights = (torch.exp(x - total).unsqueeze(-1) for x in (lse, block_lse))
    return next(weights) * out + next(weights) * block_out, total


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # a weight of 0
@pytest.mark.parametrize("shape", MERGES.values(), ids=MERGES.keys())
@pytest.mark.parametrize(
    ("wide", "narrow"),
    [(torch.float64, torch.float64), (torch.float32, torch.bfloat16), (torch.float32, torch.float32)],
    ids=["float64", "bfloat16", "float32"],
)
def test_merge_is_the_online_softmax(shape, wide, narrow, device):
    out, block_out = draw(*shape, dtype=wide, device=device), draw(*shape, dtype=narrow, seed=1, device=device)
    lse, block_lse = (3 * draw(*shape[:3], dtype=wide, seed=x, device=device) for x in (2, 3))
    lse, block_lse = bhs(lse), bhs(block_lse)
    lse[0, 1], out[0, 1] = -torch.inf, 0.0  # a row that has seen nothing
    lse[0, 2], lse[0, 3] = block_lse[0, 2] + 200, block_lse[0, 3] - 200  # one of the two weighs nothing
    lse[0, 4] = block_lse[0, 4] = -torch.inf  # nothing seen in either
    out[0, 4] = block_out[0, 4] = 0.0
    right = expected_merge(out, lse, block_out, block_lse)
    folds.merge_(out, lse, block_out, block_lse)
    assert torch.equal(lse[0, 4], block_lse[0, 4]) and not out[0, 4].any()
    for x in (out, lse, *right):
        x[0, 4] = 0.0
    tolerance = 1e-12 if wide == torch.float64 else 3e-6
    for name, got, want in zip(("out", "lse"), (out, lse), right, strict=True):
        error = (got.double().cpu() - want).abs().max().item()
        assert error <= tolerance, f"{name}: max abs error {error:.1e} > {tolerance:g}"


def test_merge_into_views_leaves_the_rest_alone(device):
    """Rows of a longer result, a padded block, sequence-first memory."""
    whole = draw(11, 2, 3, 20, dtype=torch.float32, device=device)
    lse = draw(2, 3, 11, dtype=torch.float32, seed=1, device=device)
    out, rows = whole.transpose(0, 1)[:, 2:9], lse.transpose(1, 2)[:, 2:9]
    block = draw(2, 7, 3, 24, dtype=torch.bfloat16, seed=2, device=device)[..., :20]
    block_lse = draw(2, 3, 16, dtype=torch.float32, seed=3, device=device)[:, :, :7].transpose(1, 2)
    before = whole.clone(), lse.clone()
    want_out, want_lse = expected_merge(out, rows, block, block_lse)
    folds.merge_(out, rows, block, block_lse)
    torch.testing.assert_close(out.double().cpu(), want_out, atol=3e-6, rtol=0)
    torch.testing.assert_close(rows.double().cpu(), want_lse, atol=3e-6, rtol=0)
    for part in (slice(0, 2), slice(9, None)):
        assert torch.equal(whole[part], before[0][part]) and torch.equal(lse[..., part], before[1][..., part])


def test_many_folds_in_float32_beat_bfloat16(device):
    """32 blocks: a result kept in bfloat16, or a fold that rounded to it on the way, has 5 times the error and more."""
    blocks = [draw(1, 8, 2, 16, dtype=torch.bfloat16, seed=i, device=device) for i in range(32)]
    lses = [draw(1, 8, 2, dtype=torch.float32, seed=100 + i, device=device) for i in range(32)]
    exact = torch.zeros(1, 8, 2, 16, dtype=torch.float64), torch.full((1, 8, 2), -torch.inf, dtype=torch.float64)
    out, lse = (x.to(device, torch.float32) for x in exact)
    rounded = out.clone()
    for block, block_lse in zip(blocks, lses, strict=True):
        exact = expected_merge(*exact, block, block_lse)
        rounded.lerp_(block.float(), torch.sigmoid(block_lse - lse).unsqueeze(-1))
        rounded = rounded.to(torch.bfloat16).float()
        folds.merge_(out, lse, block, block_lse)
    ours, theirs = ((x.double().cpu() - exact[0]).pow(2).mean().sqrt().item() for x in (out, rounded))
    assert ours < 1e-6 < 5e-6 < theirs, f"{ours:.1e}, {theirs:.1e}"


# -- adding up -------------------------------------------------------------------------------------------------------


def gradient(s, b, heads, d, dtype, device, memory):
    """[s, b, heads, d], as kernels return it: transposed, cut out of a wider one, or already sequence first."""
    if memory == "sbhd":
        return draw(s, b, heads, d, dtype=dtype, device=device)
    wide = draw(b, s, heads, d + (4 if memory == "padded" else 0), dtype=dtype, device=device)
    return wide[..., :d].transpose(0, 1)


@pytest.mark.parametrize("memory", ["bshd", "padded", "sbhd"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("b", [1, 2])
def test_gradients_of_a_tile_are_added_to_rows_of_the_sums(b, dtype, memory, device):
    """dk and dv of unequal widths into rows [3, 12) of one flat buffer, and dq of more heads beside them."""
    shapes = [(b, 2, 20), (b, 2, 16), (b, 6, 20)]
    sums = [draw(17, *x, dtype=torch.float32, seed=5, device=device) for x in shapes]
    grads = [gradient(9, *x, dtype, device, memory) for x in shapes]
    before = [x.clone() for x in sums]
    folds.add_rows_([(total[3:12], grad) for total, grad in zip(sums, grads, strict=True)])
    for total, was, grad in zip(sums, before, grads, strict=True):
        was[3:12] += grad.float()
        assert torch.equal(total, was)


def test_float64_sums_stay_float64(device):
    total, grad = draw(4, 1, 2, 8, device=device), draw(1, 4, 2, 8, seed=1, device=device).transpose(0, 1)
    want = total + grad
    folds.add_rows_([(total, grad)])
    assert torch.equal(total, want)


def test_dk_and_dv_are_one_launch(device, request):
    if "interpreted" not in request.node.name:
        pytest.skip("counted in the interpreter")
    sums = [torch.zeros(8, 1, 2, 16) for _ in range(5)]
    folds.add_rows_([(x, x) for x in sums[:2]])
    assert len(launches) == 1
    folds.add_rows_([(x, x) for x in sums])
    assert len(launches) == 3
    folds.add_rows_([])
    folds.add_rows_([(x[:0], x[:0]) for x in sums])
    assert len(launches) == 3


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
    folds.copy_rows_([(view, x.unflatten(2, (peers, -1))) for view, x in zip(views, tensors, strict=True)])
    for peer in range(peers):
        parts = [x.chunk(peers, 2)[peer].flatten(1) for x in tensors]
        assert torch.equal(buffer[peer], torch.cat(parts, 1)), peer
    back = [torch.zeros_like(x) for x in tensors]
    folds.copy_rows_([(x.unflatten(2, (peers, -1)), view) for view, x in zip(views, back, strict=True)])
    assert all(map(torch.equal, back, tensors))


@pytest.mark.parametrize("widths", [(24, 8, 8), (5, 3, 1), (2048, 40, 1030)], ids=str)
def test_rows_are_put_in_the_order_of_the_sequence_and_back(widths, device):
    rows = draw(11, sum(widths), dtype=torch.float32, device=device)
    order = torch.tensor([3, 4, 5, 0, 1, 2, 10, 9, 8], device=device)
    arrived = [torch.zeros(9, n, device=device) for n in widths]
    parts = rows.split(widths, 1)
    folds.copy_rows_(list(zip(arrived, parts, strict=True)), source_rows=order)
    for got, part in zip(arrived, parts, strict=True):
        assert torch.equal(got, part[order])
    packed = torch.full_like(rows, 7.0)
    folds.copy_rows_(list(zip(packed.split(widths, 1), arrived, strict=True)), target_rows=order)
    assert torch.equal(packed[order], rows[order]) and packed[[6, 7]].eq(7).all()


def test_what_the_kernel_cannot_walk_over_is_left_to_torch(device):
    """Six dimensions that do not join, and a last dimension that is not dense."""
    x = draw(3, 2, 3, 2, 2, 4, device=device)
    scattered = torch.zeros(*(2 * n for n in x.shape), dtype=x.dtype, device=device)[::2, ::2, ::2, ::2, ::2, :4]
    turned = torch.zeros(4, 3, dtype=x.dtype, device=device).t()
    flat = torch.zeros(3, 4, dtype=x.dtype, device=device)
    folds.copy_rows_([(scattered, x), (turned, x[:, 0, 0, 0, 0]), (flat, x[:, 1, 1, 1, 1])])
    assert torch.equal(scattered, x) and torch.equal(turned, x[:, 0, 0, 0, 0]) and torch.equal(flat, x[:, 1, 1, 1, 1])


def test_on_a_cpu_it_is_torch():
    assert not folds._by_triton(torch.zeros(1))
    if not torch.cuda.is_available():
        assert folds.triton_fault() == "no GPU here"


def test_the_environment_switches_triton_off(monkeypatch):
    monkeypatch.setenv("LOONG_TRITON", "0")
    assert folds.triton_fault() == "LOONG_TRITON=0" and not folds.wanted()
    monkeypatch.setenv("LOONG_TRITON", "no")
    with pytest.raises(ValueError, match=r"LOONG_TRITON='no': 0 switches Triton off, 1 .* leaves it on"):
        folds.wanted()
    monkeypatch.delenv("LOONG_TRITON")
    assert folds.wanted()


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
    for name in ("_merge", "_move"):
        monkeypatch.setattr(module, name, compiled_only(getattr(module, name), built))
    monkeypatch.setattr(folds, "_by_triton", lambda x: True)
    monkeypatch.setattr(folds, "_triton", lambda: module)

    out, lse = torch.zeros(1, 64, 4, 128), torch.zeros(1, 4, 64).transpose(1, 2)
    folds.merge_(out, lse, out.bfloat16(), lse)
    total, grad = torch.zeros(64, 1, 4, 128), torch.zeros(1, 64, 4, 128, dtype=torch.bfloat16).transpose(0, 1)
    folds.add_rows_([(total, grad), (total.clone(), grad)])
    parts = torch.zeros(64, 3 * 512, dtype=torch.bfloat16).split(512, 1)
    folds.copy_rows_([(x.contiguous(), x) for x in parts], source_rows=torch.arange(64))
    folds.copy_rows_([(x, x.contiguous()) for x in parts])
    assert len(built) == 4
    for kernel in built:
        assert kernel.metadata.target.arch == arch
        wide = {"ld", "st"} - {x[:2] for x in re.findall(r"(?:ld|st)\.global\.v4\.b32", kernel.asm["ptx"])}
        assert not wide and ".local" not in kernel.asm["ptx"], kernel.metadata.name
