"""Attention kernels: one tile forward and backward, the registry's choices, and the adapters to packages not here."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.simulate import groups_without_processes
from megatron_loong import LoongConfig, attention_2d
from megatron_loong.attention import prepare as attention_module
from megatron_loong.config import CAUSAL, FULL
from megatron_loong.kernels import common, registry, torch_cuda
from megatron_loong.kernels.common import call_by_name
from megatron_loong.kernels.cpu_flash import CpuFlashKernel
from megatron_loong.kernels.dropout import keep_mask
from megatron_loong.kernels.flash_attn import FlashAttn2Kernel, FlashAttn3Kernel
from megatron_loong.kernels.interface import AttentionKernel, KernelRequest, TileRules
from megatron_loong.kernels.reference import ReferenceKernel
from megatron_loong.kernels.registry import KERNELS, choose_kernel, explain, support_table
from megatron_loong.kernels.te_fused import TransformerEngineKernel
from tests.dense import band, dense_with_gradients
from tests.one_process.played_kernels import play_backward, play_forward

SCALE = 0.3
NAMES = ("out", "lse", "dq", "dk", "dv")
CPU = KernelRequest("cpu", torch.bfloat16, head_dim=64, value_head_dim=64, query_heads=8, kv_heads=2)
CUDA = replace(CPU, device_type="cuda")

# h, g, s_q, s_kv, d, dv, causal
SHAPES = {
    "mha-causal": (4, 4, 33, 33, 16, 16, True),
    "mha-full": (4, 4, 32, 32, 16, 16, False),
    "gqa-causal": (6, 2, 40, 40, 16, 16, True),
    "mqa-causal": (4, 1, 32, 32, 16, 16, True),
    "gqa-longer-kv": (4, 2, 16, 48, 16, 16, False),
    "gqa-longer-q": (4, 2, 48, 16, 16, 16, False),
    "narrow-v": (4, 2, 32, 32, 24, 16, True),
    "wide-v": (4, 2, 32, 32, 12, 20, True),
    "one-kv": (4, 2, 8, 1, 16, 16, False),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request):
    return request.param


def inputs(shape, dtype=torch.float64, b=2):
    """q, k, v, dout [b, s, h, d], normal."""
    h, g, s_q, s_kv, d, dv, _ = shape
    generator = torch.Generator().manual_seed(1)
    sizes = ((b, s_q, h, d), (b, s_kv, g, d), (b, s_kv, g, dv), (b, s_q, h, dv))
    return [torch.randn(x, generator=generator, dtype=torch.float64).to(dtype) for x in sizes]


def rules(causal, softmax_scale=SCALE):
    return TileRules(softmax_scale, CAUSAL if causal else FULL)


def run(kernel, q, k, v, dout, causal, deterministic=False):
    """out, lse, dq, dk, dv of one tile that is the whole row."""
    out, lse = kernel.forward(q, k, v, rules(causal))
    grads = kernel.backward(dout, q, k, v, out, lse, rules(causal), deterministic=deterministic)
    return dict(zip(NAMES, (out, lse, *grads), strict=True))


def check_close(got, want, tolerance=1e-12):
    for name, tensor in want.items():
        assert got[name].shape == tensor.shape, f"{name}: shape {tuple(got[name].shape)}, not {tuple(tensor.shape)}"
        error = (got[name].double() - tensor.double()).abs().max().item()
        assert error <= tolerance, f"{name}: max abs error {error:.1e} > {tolerance:g}"


def rms(x):
    return x.double().pow(2).mean().sqrt().item()


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_reference_matches_autograd_of_dense_attention(shape):
    q, k, v, dout = inputs(shape)
    check_close(run(ReferenceKernel(), q, k, v, dout, shape[-1]), dense_with_gradients(q, k, v, dout, shape[-1], SCALE))


def test_reference_lse_is_the_natural_log(shape):
    q, k, v, _ = inputs(shape)
    _, lse = ReferenceKernel().forward(q, k, torch.ones_like(v), rules(shape[-1]))
    k = k.repeat_interleave(shape[0] // shape[1], 2)
    last = torch.einsum("bhd,bkhd->bhk", q[:, -1], k) * SCALE
    check_close({"lse of the last row": lse[:, -1]}, {"lse of the last row": last.exp().sum(-1).log()})


def test_cpu_flash_matches_reference(shape):
    q, k, v, dout = inputs(shape)
    check_close(run(CpuFlashKernel(), q, k, v, dout, shape[-1]), run(ReferenceKernel(), q, k, v, dout, shape[-1]))


def strided(x, how):
    """A view that equals x and is not contiguous."""
    if how == "heads-first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "half-of-sequence":
        return torch.cat((x * 7, x), 1)[:, x.shape[1] :]
    if how == "packed-qkv":
        return torch.cat((x, x * 7), 3)[..., : x.shape[3]]
    return x.transpose(1, 3).contiguous().transpose(1, 3)  # width-not-contiguous


@pytest.mark.parametrize("how", ["heads-first", "half-of-sequence", "packed-qkv", "width-not-contiguous"])
def test_cpu_flash_takes_strided_views(how):
    plain = inputs(SHAPES["gqa-causal"])
    views = [strided(x, how) for x in plain]
    assert not any(x.is_contiguous() for x in views)
    want = run(CpuFlashKernel(), *plain, True)
    check_close(run(CpuFlashKernel(), *views, True), want)


def test_cpu_flash_takes_an_expanded_dout():
    q, k, v, _ = inputs(SHAPES["gqa-causal"])
    dout = torch.ones((), dtype=q.dtype).expand(2, 40, 6, 16)
    check_close(run(CpuFlashKernel(), q, k, v, dout, True), run(ReferenceKernel(), q, k, v, dout, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=common.dtype_name)
@pytest.mark.parametrize("kernel", [CpuFlashKernel(), ReferenceKernel()], ids=lambda x: x.name)
def test_rms_error_is_that_of_one_device_sdpa(kernel, dtype):
    h, g, causal = 4, 2, True
    q, k, v, dout = inputs((h, g, 256, 256, 32, 32, causal), dtype)
    want = dense_with_gradients(q, k, v, dout, causal, SCALE)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in leaves), is_causal=True, scale=SCALE, enable_gqa=True
    ).transpose(1, 2)
    theirs = dict(zip(("out", "dq", "dk", "dv"), (sdpa, *torch.autograd.grad(sdpa, leaves, dout)), strict=True))
    ours = run(kernel, q, k, v, dout, causal)
    for name, exact in want.items():
        error, bound = rms(ours[name] - exact), 2.5 * rms(theirs[name] - exact)
        assert error <= bound, f"{name}: RMS error {error:.2e} > 2.5 x that of SDPA = {bound:.2e}"
    assert ours["out"].dtype == dtype and ours["lse"].dtype == torch.float32


@pytest.mark.parametrize(("capability", "inside"), [("AVX2", torch.float32), ("AVX512", torch.bfloat16)])
def test_cpu_flash_computes_half_precision_in_float32_without_avx512(monkeypatch, capability, inside):
    """There the operator's backward takes ten times as long in half precision; the error stays within the bound."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "flash_attention" in func.overloadpacket.__name__:
                seen.update(x.dtype for x in args[:3])
            return func(*args, **(kwargs or {}))

    with Watch():
        test_rms_error_is_that_of_one_device_sdpa(CpuFlashKernel(), torch.bfloat16)
        seen.discard(torch.bfloat16 if inside is torch.float32 else None)  # SDPA's own call
        q, k, v, dout = inputs(SHAPES["gqa-causal"], torch.bfloat16)
        got = run(CpuFlashKernel(), q, k, v, dout, True)
    assert seen == {inside} and {got[name].dtype for name in ("out", "dq", "dk", "dv")} == {torch.bfloat16}
    window = TileRules(SCALE, (5, 0))
    out, lse = CpuFlashKernel().forward(q, k, v, window)  # its mask is in the operator's dtype too
    exact, _ = ReferenceKernel().forward(q, k, v, window)
    CpuFlashKernel().backward(dout, q, k, v, out, lse, window, deterministic=True)
    torch.testing.assert_close(out, exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kernel", [CpuFlashKernel(), ReferenceKernel()], ids=lambda x: x.name)
@pytest.mark.parametrize("case", ["mha-full", "gqa-longer-kv", "narrow-v", "wide-v"])
def test_backward_of_two_kv_blocks_adds_up_to_the_whole(kernel, case):
    shape = (*SHAPES[case][:-1], False)
    q, k, v, dout = inputs(shape)
    whole = run(kernel, q, k, v, dout, causal=False)
    cut = k.shape[1] // 2
    blocks = [
        kernel.backward(
            dout, q, k[:, part], v[:, part], whole["out"], whole["lse"],
            rules(False), deterministic=True,
        )
        for part in (slice(None, cut), slice(cut, None))
    ]  # fmt: skip
    (dq0, dk0, dv0), (dq1, dk1, dv1) = blocks
    got = {"dq": dq0 + dq1, "dk": torch.cat((dk0, dk1), 1), "dv": torch.cat((dv0, dv1), 1)}
    check_close(got, {name: whole[name] for name in got})


def test_cpu_flash_takes_merged_rows_wider_than_the_inputs():
    q, k, v, dout = inputs(SHAPES["gqa-causal"], torch.bfloat16)
    kernel = CpuFlashKernel()
    out, lse = kernel.forward(q, k, v, rules(True))
    want = kernel.backward(dout, q, k, v, out, lse, rules(True), deterministic=True)
    got = kernel.backward(dout.float(), q, k, v, out.float(), lse, rules(True), deterministic=True)
    for name, x, y in zip(("dq", "dk", "dv"), got, want, strict=True):
        assert torch.equal(x, y), f"{name} differs"


def test_cpu_flash_backward_gives_the_same_bits():
    q, k, v, dout = inputs((4, 2, 256, 256, 32, 32, True), torch.bfloat16)
    first, second = (run(CpuFlashKernel(), q, k, v, dout, True, deterministic=True) for _ in range(2))
    for name in NAMES:
        assert torch.equal(first[name], second[name]), f"{name} differs"


def test_cpu_flash_refuses_an_empty_tile():
    q, k, v, _ = inputs(SHAPES["mha-full"])
    with pytest.raises(AssertionError, match="empty attention tile"):
        CpuFlashKernel().forward(q, k[:, :0], v[:, :0], rules(False))


class LargestTensor(TorchDispatchMode):
    """Largest tensor, in elements, that any operator returned; and the operators called."""

    def __init__(self):
        super().__init__()
        self.elements, self.operators = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.operators.add(func.overloadpacket.__name__)
        for x in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return results


def test_cpu_flash_holds_no_score_matrix():
    s, d = 512, 16
    q, k, v, dout = inputs((2, 1, s, s, d, d, True), torch.bfloat16, b=1)
    with LargestTensor() as seen:
        run(CpuFlashKernel(), q, k, v, dout, True)
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in seen.operators
    assert seen.elements <= q.numel(), f"a tensor of {seen.elements} elements; q has {q.numel()}"
    with LargestTensor() as seen:
        run(ReferenceKernel(), q, k, v, dout, True)
    assert seen.elements >= s * s, "the probe does not see the reference's score matrix"


# -- PyTorch's CUDA operators: schemas, meta kernels, and numbers with the reference in the operators' place ---------

OPERATORS = {
    "torch_flash": ("_flash_attention_forward", "_flash_attention_backward"),
    "torch_cudnn": ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"),
}
TORCH_CUDA = sorted(OPERATORS)


def bind(schema, args, kwargs):
    """Arguments by name, as the installed torch's schema has them; a `TypeError` where they do not fit."""
    positional = [x for x in schema.arguments if not x.kwarg_only]
    if len(args) > len(positional):
        raise TypeError(f"{schema.name}: {len(args)} arguments for {len(positional)}")
    bound = dict(zip((x.name for x in positional), args, strict=False))
    unknown = set(kwargs) - {x.name for x in schema.arguments}
    missing = [x.name for x in positional if x.name not in bound and x.name not in kwargs and not x.has_default_value()]
    if unknown or missing:
        raise TypeError(f"{schema.name}: unknown {sorted(unknown)}, missing {missing}")
    return bound | kwargs


def as_if_on_gpu(monkeypatch, calls, lse_dims=3):
    """Let the reference kernel play torch's CUDA operators; those of cuDNN have [b, h, s, d] and lse [b, h, s(, 1)]."""
    reference = ReferenceKernel()

    def operator(name):
        schema = getattr(torch.ops.aten, name).default._schema

        def play(*args, **kwargs):
            a = bind(schema, args, kwargs)
            filling = torch.utils.deterministic.fill_uninitialized_memory
            calls.append((name, a, torch.are_deterministic_algorithms_enabled(), filling))
            return flash(a) if name in OPERATORS["torch_flash"] else cudnn(a)

        def flash(a):
            """[b, s, h, d] and lse [b, h, s], packed [t, h, d] and [h, t]; windows from the bottom right."""
            window = tuple(a.get(f"window_size_{side}", -1) for side in ("left", "right"))
            assert not (a["is_causal"] and window != FULL) and a["dropout_p"] == 0.0
            asked = TileRules(a["scale"], CAUSAL if a["is_causal"] else window)
            q, k, v, *cu = (a[x] for x in ("query", "key", "value", "cum_seq_q", "cum_seq_k"))
            lengths = a["max_q"], a["max_k"]
            assert cu[0] is not None or lengths == (q.shape[1], k.shape[1])
            assert all(x.shape[-1] % 8 == 0 and x.stride(-1) == 1 for x in (q, k, v))
            if "grad_out" not in a:
                return *play_forward(q, k, v, asked, *cu, lengths), None, None, None
            assert a["rng_state"].dtype == torch.uint64
            return play_backward(a["grad_out"], q, k, v, a["out"], a["logsumexp"], asked, *cu)

        def cudnn(a):
            q, k, v = (a[x].transpose(1, 2) for x in ("query", "key", "value"))
            asked = rules(a["is_causal"], a.get("scale") or q.shape[-1] ** -0.5)
            assert a["dropout_p"] == 0.0
            for x in (q, k, v):
                assert x.shape[-1] % 8 == 0 and x.stride(-1) == 1, f"{name}: {x.shape} {x.stride()}"
            if "grad_out" not in a:
                out, lse = reference.forward(q, k, v, asked)
                lse = lse.transpose(1, 2)
                lse = lse.unsqueeze(-1) if lse_dims == 4 else lse
                return out.transpose(1, 2), lse, None, None, q.shape[1], k.shape[1], None, None, None
            assert (a["max_q"], a["max_k"]) == (q.shape[1], k.shape[1])
            assert a["logsumexp"].ndim == lse_dims and a["logsumexp"].is_contiguous(), "lse not as forward gave it"
            dense = [a[x].transpose(1, 2).is_contiguous() for x in ("grad_out", "out")]
            assert all(dense), "torch's cache of plans does not know their strides"
            dout, out = (a[x].transpose(1, 2) for x in ("grad_out", "out"))
            lse = a["logsumexp"].flatten(2).transpose(1, 2)
            grads = reference.backward(dout, q, k, v, out, lse, asked, deterministic=False)
            return tuple(x.transpose(1, 2) for x in grads)

        play._schema = schema
        return play

    torch_cuda._cudnn_lse_dims.cache_clear()
    monkeypatch.setattr(torch_cuda, "_operator", operator)


@pytest.mark.parametrize(
    ("name", "lse_dims"),
    [("torch_flash", 3), ("torch_cudnn", 3), ("torch_cudnn", 4)],
    ids=["flash", "cudnn-lse3d", "cudnn-lse4d"],
)
def test_torch_cuda_adapter_numbers(name, lse_dims, shape, monkeypatch):
    as_if_on_gpu(monkeypatch, [], lse_dims)
    q, k, v, dout = inputs(shape)
    got = run(KERNELS[name], q, k, v, dout, shape[-1])
    check_close(got, run(ReferenceKernel(), q, k, v, dout, shape[-1]))
    torch_cuda._cudnn_lse_dims.cache_clear()


@pytest.mark.parametrize("how", ["heads-first", "packed-qkv"])
def test_cudnn_is_given_dense_dout_and_out(how, monkeypatch):
    """Up to torch 2.11 a plan made for one layout of them would read another's wrongly; the player looks at it."""
    as_if_on_gpu(monkeypatch, [])
    q, k, v, dout = inputs(SHAPES["gqa-causal"])
    kernel, right = KERNELS["torch_cudnn"], run(ReferenceKernel(), q, k, v, dout, True)
    dout, out = strided(dout, how), strided(right["out"], how)
    grads = kernel.backward(dout, q, k, v, out, right["lse"], rules(True), deterministic=False)
    check_close(dict(zip(NAMES[2:], grads, strict=True)), {x: right[x] for x in NAMES[2:]})
    torch_cuda._cudnn_lse_dims.cache_clear()


@pytest.mark.parametrize("name", TORCH_CUDA)
def test_torch_cuda_operators_take_our_arguments_on_meta_tensors(name):
    torch_cuda._cudnn_lse_dims.cache_clear()
    b, h, g, s, d = 2, 4, 2, 32, 20
    q, k = (torch.empty(b, s, n, d, dtype=torch.bfloat16, device="meta") for n in (h, g))
    with LargestTensor() as seen:
        got = run(KERNELS[name], q, k, k, q, causal=True)
    torch_cuda._cudnn_lse_dims.cache_clear()
    assert set(OPERATORS[name]) <= seen.operators
    for tensor_name, like in zip(NAMES, (q, q[..., 0], q, k, k), strict=True):
        assert got[tensor_name].shape == like.shape, f"{tensor_name}: {tuple(got[tensor_name].shape)}"


@pytest.mark.parametrize("before", ["default", "warn", "error"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
def test_torch_flash_sets_determinism_for_its_backward_alone(deterministic, before, monkeypatch):
    calls, mode = [], torch.get_deterministic_debug_mode()
    as_if_on_gpu(monkeypatch, calls)
    try:
        torch.set_deterministic_debug_mode(before)
        set_before = torch.get_deterministic_debug_mode()
        run(KERNELS["torch_flash"], *inputs(SHAPES["mha-full"]), False, deterministic)
        set_after = torch.get_deterministic_debug_mode()
    finally:
        torch.set_deterministic_debug_mode(mode)
    assert set_after == set_before
    was_on = before != "default"
    assert [on for _, _, on, _ in calls] == [was_on, deterministic or was_on]
    # Where it is the adapter that switches it on, the operator's own sums are not filled first.
    assert [filling for *_, filling in calls] == [True, not deterministic]
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_gpu_operands_are_aligned():
    """Views that start or step off 16 bytes are copied, others are not."""
    x = torch.zeros(2, 8, 4, 16, dtype=torch.bfloat16)
    assert common.gpu_operand(x, 16) is x and common.gpu_operand(x[:, 4:], 16).data_ptr() == x[:, 4:].data_ptr()
    assert common.gpu_operand(x[:, :1], 16).data_ptr() == x.data_ptr()
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    for bad in (shifted, torch.zeros(2, 8, 4, 20, dtype=x.dtype)[..., :16], x.transpose(1, 3)):
        good = common.gpu_operand(bad, bad.shape[-1])
        assert good.storage_offset() == 0 and good.is_contiguous() and good.data_ptr() != bad.data_ptr()


# -- flash-attn: stand-ins with the signatures of the versions -------------------------------------------------------


def _play_forward(q, k, v, softmax_scale, causal):
    assert q.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    out, lse = ReferenceKernel().forward(q, k, v, rules(causal, softmax_scale))
    return out, lse.transpose(1, 2).contiguous()


def _play_backward(dout, q, k, v, out, lse, dq, dk, dv, softmax_scale, causal, deterministic):
    assert deterministic is True, "deterministic did not arrive"
    assert lse.is_contiguous() and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    grads = ReferenceKernel().backward(
        dout, q, k, v, out, lse.transpose(1, 2), rules(causal, softmax_scale), deterministic=True
    )
    for buffer, gradient in zip((dq, dk, dv), grads, strict=True):
        buffer.copy_(gradient)


def flash_attn_2_5():
    def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_softmax):
        assert dropout_p == 0.0 and window_size == (-1, -1) and alibi_slopes is None and return_softmax is False
        out, lse = _play_forward(q, k, v, softmax_scale, causal)
        return out, q, k, v, out, lse, None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, alibi_slopes,
        deterministic, rng_state=None,
    ):  # fmt: skip
        assert dropout_p == 0.0 and window_size == (-1, -1)
        _play_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal, deterministic)
        return dq, dk, dv, None

    return _flash_attn_forward, _flash_attn_backward


def flash_attn_2_6():
    forward, backward = flash_attn_2_5()

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax
    ):
        assert softcap == 0.0
        return forward(q, k, v, dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_softmax)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        return backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, alibi_slopes,
            deterministic,
        )  # fmt: skip

    return _flash_attn_forward, _flash_attn_backward


def flash_attn_2_8():
    # custom_op reads types from the annotations, which are strings here: hence the schemas.
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
        out, lse = _play_forward(q, k, v, softmax_scale, causal)
        return out, lse, q.new_empty(0), q.new_empty(2)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
        _play_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal, deterministic)
        return softmax_lse.clone()

    switches = "float dropout_p, float softmax_scale, bool causal, int window_size_left, int window_size_right, "
    forward = torch.library.custom_op(
        "loong_fake_flash_attn::_flash_attn_forward",
        _flash_attn_forward,
        mutates_args=(),
        schema=f"(Tensor q, Tensor k, Tensor v, {switches} float softcap, Tensor? alibi_slopes, bool return_softmax)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
    )
    backward = torch.library.custom_op(
        "loong_fake_flash_attn::_flash_attn_backward",
        _flash_attn_backward,
        mutates_args=("dq", "dk", "dv"),
        schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
        f"Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, {switches} float softcap, Tensor? alibi_slopes, "
        "bool deterministic, Tensor? rng_state=None) -> Tensor",
    )
    return forward, backward


def flash_attn_3_of_2_8():
    def _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
        q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        assert k_new is None and out is None and cu_seqlens_q is None and page_table is None
        return *_play_forward(q, k, v, softmax_scale, causal), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert cu_seqlens_q is None and max_seqlen_q is None
        _play_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal, deterministic)
        return dq, dk, dv, None

    return _flash_attn_forward, _flash_attn_backward


def flash_attn_3_of_2026():
    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0,
        num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        return *_play_forward(q, k, v, softmax_scale, causal), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        _play_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, is_causal, deterministic)

    return _flash_attn_forward, _flash_attn_backward


VERSIONS = {
    "2.5": (FlashAttn2Kernel, flash_attn_2_5),
    "2.6": (FlashAttn2Kernel, flash_attn_2_6),
    "2.8": (FlashAttn2Kernel, flash_attn_2_8),
    "3-of-2.8": (FlashAttn3Kernel, flash_attn_3_of_2_8),
    "3-of-2026": (FlashAttn3Kernel, flash_attn_3_of_2026),
}


@pytest.fixture
def install(monkeypatch):
    """install(kernel class, functions): a stand-in package in sys.modules, and a Hopper GPU by hearsay."""

    def module(name, **content):
        it = types.ModuleType(name)
        it.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
        it.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, it)
        return it

    def do(kernel_class, forward=None, backward=None, capability=(9, 0)):
        functions = {"_flash_attn_forward": forward, "_flash_attn_backward": backward}
        inner = module(kernel_class.module, **{k: x for k, x in functions.items() if x is not None})
        if kernel_class.package != kernel_class.module:
            module(kernel_class.package, flash_attn_interface=inner)
        hearsay(monkeypatch, capability)

    yield do
    registry.forget_choices()


def hearsay(monkeypatch, capability):
    for name in ("common", "flash_attn", "flash_attn_4", "fp8"):
        monkeypatch.setattr(f"megatron_loong.kernels.{name}.gpu_capability", lambda: capability)
    registry.forget_choices()


@pytest.mark.parametrize("version", VERSIONS)
def test_flash_attn_versions_give_the_reference_numbers(version, shape, install):
    kernel_class, functions = VERSIONS[version]
    install(kernel_class, *functions())
    kernel = kernel_class()
    assert kernel.why_not(CUDA) is None
    q, k, v, dout = inputs(shape)
    want = run(ReferenceKernel(), q, k, v, dout, shape[-1])
    check_close(run(kernel, q, k, v, dout, shape[-1], deterministic=True), want)


def test_argument_that_a_version_does_not_know_is_an_error_not_dropped():
    def renamed(q, is_it_causal=False):
        return q

    with pytest.raises(NotImplementedError, match="renamed has no argument causal or is_causal"):
        call_by_name(renamed, {"q": 1, ("causal", "is_causal"): True}, {})

    def demanding(q, sinks):
        return q

    with pytest.raises(NotImplementedError, match="demanding wants an argument sinks"):
        call_by_name(demanding, {"q": 1}, {"window_size": (-1, -1)})


@pytest.mark.parametrize("kernel_class", [FlashAttn2Kernel, FlashAttn3Kernel], ids=lambda x: x.name)
def test_flash_attn_of_an_unknown_version_says_so(kernel_class, install):
    install(kernel_class, lambda q: q)
    assert "lacks _flash_attn_backward" in kernel_class().why_not(CUDA)
    install(kernel_class, lambda q: q, lambda dout: dout)
    assert "no deterministic argument" in kernel_class().why_not(CUDA)


def test_flash_attn_that_does_not_import_says_so(install, monkeypatch):
    install(FlashAttn2Kernel)

    def broken(self):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(FlashAttn2Kernel, "_import", broken)
    assert "does not import (undefined symbol: _ZN3c10)" in FlashAttn2Kernel().why_not(CUDA)


def test_flash_attn_3_knows_its_limits(install):
    install(FlashAttn3Kernel, *flash_attn_3_of_2026())
    wide = replace(CUDA, head_dim=256, value_head_dim=256)
    assert FlashAttn3Kernel().why_not(wide) is None
    assert "up to 192" in FlashAttn3Kernel().why_not(replace(wide, deterministic=True))
    install(FlashAttn3Kernel, *flash_attn_3_of_2026(), capability=(8, 0))
    assert "Hopper" in FlashAttn3Kernel().why_not(CUDA)


# -- the registry ----------------------------------------------------------------------------------------------------


def test_every_kernel_keeps_the_contract():
    names = "flash_attn_3 flash_attn_4 flash_attn_2 torch_cudnn te_fused torch_flash flash_attn_3_fp8 flash_attn_4_fp8"
    assert list(KERNELS) == [*names.split(), "cpu_flash", "reference"]
    for name, kernel in KERNELS.items():
        assert isinstance(kernel, AttentionKernel) and kernel.name == name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=common.dtype_name)
@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "deterministic"])
def test_auto_on_cpu_takes_the_flash_operator(dtype, deterministic):
    assert choose_kernel(replace(CPU, dtype=dtype, deterministic=deterministic)).name == "cpu_flash"


def test_choice_is_remembered_and_named_kernels_are_honoured():
    assert choose_kernel(CPU) is choose_kernel(replace(CPU))
    assert choose_kernel(CPU, "reference") is KERNELS["reference"]


def test_kernel_object_is_taken_or_refused_with_its_reason():
    class Mine(ReferenceKernel):
        name = "mine"

        def why_not(self, request):
            return "only on Sundays" if request.deterministic else None

    mine = Mine()
    assert choose_kernel(CPU, mine) is mine
    with pytest.raises(ValueError, match="kernel=mine: only on Sundays"):
        choose_kernel(replace(CPU, deterministic=True), mine)


def test_unknown_name_lists_the_names():
    with pytest.raises(
        ValueError, match=r"--loong-kernel flash / kernel='flash' is unknown.*flash_attn_4_fp8, cpu_flash"
    ):
        choose_kernel(CPU, "flash")


def test_named_kernel_that_cannot_serve_says_why_and_what_would():
    with pytest.raises(ValueError) as error:
        choose_kernel(CPU, "torch_flash")
    message = str(error.value)
    for part in ("--loong-kernel torch_flash", "needs a CUDA device", "what would work: cpu_flash, reference"):
        assert part in message, message


@pytest.mark.parametrize("feature", ["windowed", "softcap", "dropout"])
def test_a_feature_goes_to_the_kernels_that_have_it_and_the_others_say_so(feature):
    """On a CPU: windows cut into blocks by cpu_flash, everything by the reference."""
    asked = replace(CPU, **{feature: True})
    assert choose_kernel(asked).name == ("cpu_flash" if feature == "windowed" else "reference")
    if feature != "windowed":
        with pytest.raises(ValueError, match=r"cpu_flash: does not do|does not do .*; what would work: reference"):
            choose_kernel(asked, "cpu_flash")


WINDOWS = [FULL, CAUSAL, (3, 0), (0, 0), (2, 4), (-1, 3), (5, -1), (200, 0), (70, 70)]


@pytest.mark.parametrize(
    ("kernel", "lengths", "window"),
    [
        pytest.param(kernel, lengths, window, id=f"{kernel.name}-{lengths}-{window}")
        for kernel in (CpuFlashKernel(), ReferenceKernel(), KERNELS["torch_flash"])
        for lengths in ((150, 150), (40, 150), (150, 40))
        for window in WINDOWS
        if (kernel.bottom_right or window != CAUSAL or lengths[0] == lengths[1])
        # A tile has no row that sees nothing.
        and band(*lengths, window).any(1).all()
    ],
)
def test_windows_match_dense_attention_with_the_mask(kernel, lengths, window, monkeypatch):
    """float64 to 1e-12, rows that see nothing left out as the ring leaves them out."""
    as_if_on_gpu(monkeypatch, [])
    rows, keys = lengths
    q, k, v, dout = inputs((4, 2, rows, keys, 16, 16, False))
    window_rules = TileRules(SCALE, window)
    out, lse = kernel.forward(q, k, v, window_rules)
    found = (out, *kernel.backward(dout, q, k, v, out, lse, window_rules, deterministic=True))
    right = dense_with_gradients(q, k, v, dout, softmax_scale=SCALE, allowed=band(rows, keys, window))
    for name, x in zip(("out", "dq", "dk", "dv"), found, strict=True):
        assert (x - right[name]).abs().max() <= 1e-12, name


def test_dropout_does_not_depend_on_who_asks_for_which_part():
    places = torch.arange(100)
    whole = keep_mask(7 << 40 | 3, 0.3, 2, range(4), places, places)
    part = keep_mask(7 << 40 | 3, 0.3, 2, range(2, 4), places[10:20], places[50:])
    assert torch.equal(part, whole[:, 2:, 10:20, 50:])
    assert not torch.equal(whole, keep_mask(7 << 40 | 4, 0.3, 2, range(4), places, places))
    # 80,000 pairs: the mean is within four standard deviations of 1 - p, over all and along every axis.
    assert abs(whole.double().mean() - 0.7) < 4 * (0.21 / whole.numel()) ** 0.5
    for axis in range(4):
        others = [i for i in range(4) if i != axis]
        means = whole.double().mean(others)
        assert (means - 0.7).abs().max() < 5 * (0.21 * whole.shape[axis] / whole.numel()) ** 0.5


def test_explain_has_one_line_for_each_kernel():
    lines = dict(line.split(": ", 1) for line in explain(CPU).splitlines())
    assert list(lines) == list(KERNELS)
    assert lines["cpu_flash"] == "taken" and "cpu_flash comes first" in lines["reference"]
    named = dict(line.split(": ", 1) for line in explain(CPU, "reference").splitlines())
    assert named["reference"] == "taken" and "reference was named" in named["cpu_flash"]


def test_auto_never_falls_to_the_reference_on_a_gpu(monkeypatch):
    """float32 on a GPU: no fused kernel takes it, and training on the reference would be slow unnoticed."""
    hearsay(monkeypatch, (9, 0))
    request = replace(CUDA, dtype=torch.float32)
    with pytest.raises(ValueError) as error:
        choose_kernel(request)
    message = str(error.value)
    reasons = (
        "no kernel serves float32 on cuda",
        "flash_attn_2: takes bfloat16, float16, not float32",
        "reference: slow",
    )
    for part in reasons:
        assert part in message, message
    assert choose_kernel(request, "reference").name == "reference"
    registry.forget_choices()


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is here")
def test_auto_on_a_gpu_says_that_flash_attn_is_not_installed(monkeypatch):
    hearsay(monkeypatch, (9, 0))
    assert "flash_attn_2: not installed" in explain(CUDA).splitlines()
    registry.forget_choices()


def test_preference_on_a_gpu(install, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91600)
    monkeypatch.delenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", raising=False)
    install(FlashAttn3Kernel, *flash_attn_3_of_2026())
    assert choose_kernel(CUDA).name == "flash_attn_3"
    monkeypatch.setattr(FlashAttn3Kernel, "_import_fault", lambda self: "not installed")
    monkeypatch.setattr(FlashAttn2Kernel, "_import_fault", lambda self: "not installed")
    registry.forget_choices()
    assert choose_kernel(CUDA).name == "torch_cudnn"
    assert choose_kernel(replace(CUDA, head_dim=192, value_head_dim=128)).name == "torch_cudnn"
    assert choose_kernel(replace(CUDA, deterministic=True)).name == "torch_flash"
    wide = replace(CUDA, head_dim=256, value_head_dim=256)
    assert choose_kernel(wide).name == "torch_cudnn"
    hearsay(monkeypatch, (10, 0))
    assert choose_kernel(wide).name == "torch_flash"
    assert choose_kernel(replace(CUDA, head_dim=192, value_head_dim=128)).name == "torch_cudnn"
    hearsay(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    registry.forget_choices()
    assert choose_kernel(CUDA).name == "torch_flash"
    hearsay(monkeypatch, (8, 9))
    with pytest.raises(ValueError, match=r"no backward for head width 256 on compute capability 8.9"):
        choose_kernel(replace(CUDA, head_dim=256, value_head_dim=256))
    hearsay(monkeypatch, (7, 5))
    with pytest.raises(ValueError, match=r"needs compute capability 8.0 or newer, this GPU has 7.5"):
        choose_kernel(CUDA)


def test_lengths_that_vary_go_to_a_kernel_that_builds_no_plans(install, monkeypatch):
    """cuDNN takes about a second for every new shape: only where it is named, or no other kernel serves."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91600)
    monkeypatch.setattr(TransformerEngineKernel, "_import_fault", lambda self: None)
    hearsay(monkeypatch, (9, 0))
    varying = replace(CUDA, varying=True)
    assert choose_kernel(CUDA).name == "torch_cudnn" and choose_kernel(varying).name == "torch_flash"
    lines = dict(line.split(": ", 1) for line in explain(varying).splitlines())
    for name in ("torch_cudnn", "te_fused"):
        assert "a plan of about a second for every new length" in lines[name] and "torch_flash comes" in lines[name]
        assert choose_kernel(varying, name).name == name
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    registry.forget_choices()
    assert choose_kernel(varying).name == "torch_cudnn"


def test_packed_documents_are_lengths_that_vary(monkeypatch):
    asked = []
    monkeypatch.setattr(attention_module, "choose_kernel", lambda request, name: asked.append(request) or KERNELS[name])
    q = torch.zeros(1, 16, 2, 8)
    groups = groups_without_processes(LoongConfig(1), 0, None)
    for options in ({}, {"cu_seqlens": [0, 10, 16]}, {"window_size": (3, 0)}):
        attention_2d(q, q, q, groups, kernel="reference", **options)
    assert [(x.varying, x.windowed) for x in asked] == [(False, False), (True, False), (False, True)]


def test_the_environment_says_what_auto_takes(monkeypatch):
    monkeypatch.setenv("LOONG_KERNEL", "reference")
    assert choose_kernel(CPU).name == "reference" and choose_kernel(CPU, "cpu_flash").name == "cpu_flash"
    assert "cpu_flash: could serve, but reference was named" in explain(CPU).splitlines()
    monkeypatch.setenv("LOONG_KERNEL", "flash")
    with pytest.raises(ValueError, match=r"LOONG_KERNEL=flash is unknown; use .*torch_flash, .*cpu_flash, reference"):
        choose_kernel(CPU)
    monkeypatch.setenv("LOONG_KERNEL", "torch_flash")
    with pytest.raises(ValueError, match=r"LOONG_KERNEL=torch_flash cannot serve .*would work: cpu_flash, reference"):
        choose_kernel(CPU)
    monkeypatch.setenv("LOONG_KERNEL", "")
    assert choose_kernel(CPU).name == "cpu_flash"


def test_no_kernel_claims_more_than_was_run():
    rows = {row.name: row for row in support_table()}
    assert list(rows) == list(KERNELS)
    proven = {name for name, row in rows.items() if row.proven_on != "nothing yet"}
    assert proven == {"cpu_flash", "reference"}
