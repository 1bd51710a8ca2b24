"""The adapters to flash-attn 4 and TransformerEngine, and packed documents, against stand-ins on a CPU."""

from __future__ import annotations

import importlib.machinery
import itertools
import sys
import types
from dataclasses import replace

import pytest
import torch

from megatron_loong.config import CAUSAL, FULL
from megatron_loong.kernels import registry
from megatron_loong.kernels.flash_attn import FlashAttn2Kernel, FlashAttn3Kernel
from megatron_loong.kernels.flash_attn_4 import FlashAttn4Kernel
from megatron_loong.kernels.interface import TileRules
from megatron_loong.kernels.registry import choose_kernel, explain
from megatron_loong.kernels.te_fused import TransformerEngineKernel
from tests.one_process.played_kernels import REFERENCE, play_backward, play_forward
from tests.one_process.test_kernels import CUDA, SCALE, SHAPES, as_if_on_gpu, check_close, hearsay, inputs, run


@pytest.fixture(autouse=True)
def forget():
    yield
    registry.forget_choices()


def package(monkeypatch, name, **content):
    """A stand-in module, and its parents as packages."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if i == len(parts) or path not in sys.modules:
            module = types.ModuleType(path)
            module.__path__ = []
            module.__spec__ = importlib.machinery.ModuleSpec(path, loader=None, is_package=True)
            monkeypatch.setitem(sys.modules, path, module)
    sys.modules[name].__dict__.update(content)


# -- flash-attn 4 ----------------------------------------------------------------------------------------------------


def rules_of_4(softmax_scale, causal, left, right, softcap):
    assert not (causal and (left, right) != (None, None))
    window = CAUSAL if causal else tuple(-1 if x is None else x for x in (left, right))
    return TileRules(softmax_scale, window, softcap or 0.0)


def flash_attn_4():
    """The parameters of flash-attention 0251105, August 2026, but for those that come last and are never named."""

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
        block_sparse_tensors=None, return_lse=False, out=None, lse=None,
    ):  # fmt: skip
        assert return_lse is True, "without it lse is None"
        rules = rules_of_4(softmax_scale, causal, window_size_left, window_size_right, softcap)
        result = play_forward(q, k, v, rules, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
        return *result, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, cu_seqlens_q=None,
        cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False,
        dq=None, dk=None, dv=None, score_mod=None, score_mod_bwd=None, mask_mod=None, dlse=None, learnable_sink=None,
    ):  # fmt: skip
        assert deterministic is True
        rules = rules_of_4(softmax_scale, causal, window_size_left, window_size_right, softcap)
        grads = play_backward(dout, q, k, v, out, lse, rules, cu_seqlens_q, cu_seqlens_k)
        for buffer, gradient in zip((dq, dk, dv), grads, strict=True):
            buffer.copy_(gradient)
        return dq, dk, dv

    return {"_flash_attn_fwd": _flash_attn_fwd, "_flash_attn_bwd": _flash_attn_bwd}


def install_4(monkeypatch, capability=(10, 0)):
    package(monkeypatch, "flash_attn.cute.interface", **flash_attn_4())
    hearsay(monkeypatch, capability)
    return FlashAttn4Kernel()


@pytest.mark.parametrize("case", SHAPES)
def test_flash_attn_4_gives_the_reference_numbers(case, monkeypatch):
    kernel, causal = install_4(monkeypatch), SHAPES[case][-1]
    assert kernel.why_not(CUDA) is None
    q, k, v, dout = inputs(SHAPES[case])
    check_close(run(kernel, q, k, v, dout, causal, deterministic=True), run(REFERENCE, q, k, v, dout, causal))


@pytest.mark.parametrize("window", [(3, 0), (2, 4), (-1, 3), (5, -1)])
def test_flash_attn_4_is_told_windows_and_soft_caps_in_its_own_words(window, monkeypatch):
    kernel, rules = install_4(monkeypatch), TileRules(SCALE, window, softcap=2.0)
    q, k, v, dout = inputs((4, 2, 24, 24, 16, 16, False))
    found = {}
    for one in (kernel, REFERENCE):
        out, lse = one.forward(q, k, v, rules)
        grads = one.backward(dout, q, k, v, out, lse, rules, deterministic=True)
        found[one.name] = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))
    check_close(found["flash_attn_4"], found["reference"])


def test_flash_attn_4_takes_mla_widths_without_padding(monkeypatch):
    kernel, seen = install_4(monkeypatch), []
    module = sys.modules["flash_attn.cute.interface"]
    forward = module._flash_attn_fwd

    def _flash_attn_fwd(q, k, v, softmax_scale=None, causal=False, return_lse=False):
        seen.append((q.shape[-1], k.shape[-1], v.shape[-1]))
        return forward(q, k, v, softmax_scale=softmax_scale, causal=causal, return_lse=return_lse)

    monkeypatch.setattr(module, "_flash_attn_fwd", _flash_attn_fwd)
    for d, dv in ((192, 128), (24, 16)):
        q, k, v, _ = inputs((2, 2, 4, 4, d, dv, True))
        out, _ = kernel.forward(q, k, v, TileRules(SCALE, CAUSAL))
        assert out.shape[-1] == dv
    assert seen == [(192, 192, 128), (24, 24, 24)]


@pytest.mark.parametrize(
    ("capability", "change", "reason"),
    [
        ((9, 0), {"head_dim": 256, "value_head_dim": 256, "windowed": True}, None),
        ((10, 0), {"head_dim": 192, "value_head_dim": 128, "windowed": True}, None),
        ((10, 0), {"head_dim": 256, "value_head_dim": 256, "deterministic": True}, None),
        ((10, 0), {"head_dim": 256, "value_head_dim": 256, "windowed": True}, "windows at head width 256"),
        ((10, 0), {"head_dim": 160, "value_head_dim": 160}, "up to 128, 256, or 192 with v 128"),
        ((12, 0), {"deterministic": True}, "no deterministic backward on compute capability 12.x"),
        ((12, 0), {"head_dim": 192, "value_head_dim": 128}, "up to 128 there"),
        ((8, 0), {}, "9.x to 12.x"),
        ((10, 0), {"dropout": True}, "does not do attention dropout"),
        ((10, 0), {"dtype": torch.float8_e4m3fn}, "give bfloat16, and kernel auto-fp8"),
    ],
)
def test_flash_attn_4_knows_its_limits(capability, change, reason, monkeypatch):
    fault = install_4(monkeypatch, capability).why_not(replace(CUDA, **change))
    assert fault is None if reason is None else reason in fault, fault


def test_flash_attn_4_beside_2_is_not_2(monkeypatch):
    """With flash-attn 2 alone, its package is here and 4 is not."""
    package(monkeypatch, "flash_attn.flash_attn_interface")
    hearsay(monkeypatch, (10, 0))
    assert FlashAttn4Kernel().why_not(CUDA) == "not installed"


def test_blackwell_prefers_4_and_hopper_3(monkeypatch):
    install_4(monkeypatch)
    assert choose_kernel(CUDA).name == "flash_attn_4"
    assert "flash_attn_3: made for compute capability 9.0 (Hopper)" in explain(CUDA).splitlines()


# -- TransformerEngine -----------------------------------------------------------------------------------------------


def transformer_engine(version):
    """The parameters of 2.5 (with dqkv_dtype), 2.9 (soft-max types, too) and 2.18 (layouts of their own)."""

    def check(q, k, v, cu_seqlens_q, cu_seqlens_kv, sizes, backend, layout, mask, window, dropout, bias):
        (s_q, b), s_kv = q.shape[:2], k.shape[0]
        assert layout == "sbhd_sbhd_sbhd" and backend == "arbitrary" and dropout == 0.0 and bias == "no_bias"
        assert all(x.is_contiguous() and x.shape[-1] % 8 == 0 for x in (q, k, v)), "read by shape, not by strides"
        assert sizes == (s_q, s_kv)
        for n, cu in ((s_q, cu_seqlens_q), (s_kv, cu_seqlens_kv)):
            assert cu.tolist() == [i * n for i in range(b + 1)] and cu.dtype == torch.int32
        assert (mask, window) in (("causal", (-1, 0)), ("no_mask", (-1, -1)))
        return mask == "causal"

    def bshd(*tensors):
        return [x.transpose(0, 1) for x in tensors]

    def forward(q, k, v, causal, scale):
        out, lse = play_forward(*bshd(q, k, v), TileRules(scale, CAUSAL if causal else FULL))
        return out.transpose(0, 1).contiguous(), [lse.unsqueeze(-1), torch.zeros(2, dtype=torch.int64)]

    def fused_attn_fwd(
        is_training, max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, fake_dtype,
        fused_attention_backend, attn_bias=None, attn_scale=None, dropout=0.0, fast_zero_fill=True, qkv_layout="sbh3d",
        attn_bias_type="no_bias", attn_mask_type="padding", window_size=(-1, -1), rng_gen=None,
    ):  # fmt: skip
        assert is_training is True and fake_dtype is q.dtype
        causal = check(
            q, k, v, cu_seqlens_q, cu_seqlens_kv, (max_seqlen_q, max_seqlen_kv), fused_attention_backend, qkv_layout,
            attn_mask_type, window_size, dropout, attn_bias_type,
        )  # fmt: skip
        return forward(q, k, v, causal, attn_scale)

    def backward(
        max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, o, d_o, fake_dtype, aux_ctx_tensors,
        fused_attention_backend, attn_scale, dropout, qkv_layout, attn_bias_type, attn_mask_type, window_size,
        deterministic,
    ):  # fmt: skip
        assert fake_dtype is q.dtype and deterministic is False and o.is_contiguous() and d_o.is_contiguous()
        causal = check(
            q, k, v, cu_seqlens_q, cu_seqlens_kv, (max_seqlen_q, max_seqlen_kv), fused_attention_backend, qkv_layout,
            attn_mask_type, window_size, dropout, attn_bias_type,
        )  # fmt: skip
        lse, rng_state = aux_ctx_tensors
        assert lse.shape == (q.shape[1], q.shape[2], q.shape[0], 1) and rng_state.shape == (2,)
        dout, q, k, v, out = bshd(d_o, q, k, v, o)
        rules = TileRules(attn_scale, CAUSAL if causal else FULL)
        grads = play_backward(dout, q, k, v, out, lse.squeeze(-1), rules)
        return *(x.transpose(0, 1).contiguous() for x in grads), None

    def fused_attn_bwd_2_5(
        max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, o, d_o, fake_dtype, dqkv_dtype,
        aux_ctx_tensors, fused_attention_backend, attn_scale=None, dropout=0.0, fast_zero_fill=True,
        qkv_layout="sbh3d", attn_bias_type="no_bias", attn_mask_type="padding", window_size=(-1, -1),
        deterministic=False,
    ):  # fmt: skip
        assert dqkv_dtype == f"DType of {q.dtype}"
        return backward(
            max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, o, d_o, fake_dtype, aux_ctx_tensors,
            fused_attention_backend, attn_scale, dropout, qkv_layout, attn_bias_type, attn_mask_type, window_size,
            deterministic,
        )  # fmt: skip

    def fused_attn_bwd_2_18(
        max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, o, d_o, fake_dtype, aux_ctx_tensors,
        fused_attention_backend, attn_scale=None, dropout=0.0, qkv_layout="sbh3d", o_format="sbhd", do_format="sbhd",
        dqkv_layout="sbh3d", attn_bias_type="no_bias", attn_mask_type="padding", softmax_type="vanilla",
        window_size=(-1, -1), bottom_right_diagonal=None, deterministic=False, cuda_graph=False,
    ):  # fmt: skip
        assert (o_format, do_format, dqkv_layout) == ("sbhd", "sbhd", "sbhd_sbhd_sbhd")
        return backward(
            max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, o, d_o, fake_dtype, aux_ctx_tensors,
            fused_attention_backend, attn_scale, dropout, qkv_layout, attn_bias_type, attn_mask_type, window_size,
            deterministic,
        )  # fmt: skip

    return fused_attn_fwd, fused_attn_bwd_2_18 if version == "2.18" else fused_attn_bwd_2_5


class DTypes(dict):
    def __missing__(self, dtype):
        return f"DType of {dtype}"


def install_te(monkeypatch, version="2.18", cudnn=(9, 16, 0), capability=(9, 0)):
    forward, backward = transformer_engine(version)
    where = "transformer_engine.pytorch"
    for name in [x for x in sys.modules if x.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)
    package(
        monkeypatch, f"{where}.cpp_extensions.fused_attn", fused_attn_fwd=forward, fused_attn_bwd=backward,
        FusedAttnBackend={"F16_arbitrary_seqlen": "arbitrary"},
    )  # fmt: skip
    package(monkeypatch, f"{where}.utils", get_cudnn_version=lambda: cudnn)
    package(monkeypatch, f"{where}.constants", TE_DType=DTypes())
    hearsay(monkeypatch, capability)
    return TransformerEngineKernel()


@pytest.mark.parametrize("version", ["2.5", "2.18"])
@pytest.mark.parametrize("case", SHAPES)
def test_transformer_engine_gives_the_reference_numbers(case, version, monkeypatch):
    kernel, causal = install_te(monkeypatch, version), SHAPES[case][-1]
    assert kernel.why_not(CUDA) is None
    q, k, v, dout = inputs(SHAPES[case])
    check_close(run(kernel, q, k, v, dout, causal), run(REFERENCE, q, k, v, dout, causal))


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"windowed": True}, {}, "as many keys as queries"),
        ({"deterministic": True}, {}, "not deterministic"),
        ({"head_dim": 256, "value_head_dim": 256}, {}, None),
        ({"head_dim": 256, "value_head_dim": 256}, {"capability": (10, 0)}, "up to 128, or 192 with v 128"),
        ({"head_dim": 192, "value_head_dim": 128}, {"capability": (10, 0)}, None),
        ({}, {"capability": (8, 0)}, "9.x and 10.x"),
        ({}, {"cudnn": (9, 10, 2)}, "needs cuDNN 9.15.1 or newer, found 9.10.2"),
        ({"dtype": torch.float8_e5m2}, {}, "takes no tensors in fp8"),
    ],
)
def test_transformer_engine_knows_its_limits(change, options, reason, monkeypatch):
    fault = install_te(monkeypatch, **options).why_not(replace(CUDA, **change))
    assert fault is None if reason is None else reason in fault, fault


def test_transformer_engine_of_before_2_says_so(monkeypatch):
    kernel = install_te(monkeypatch)
    module = sys.modules["transformer_engine.pytorch.cpp_extensions.fused_attn"]
    monkeypatch.setattr(module, "fused_attn_fwd", lambda is_training, qkv_dtype: None)
    assert "older than 2.0" in kernel.why_not(CUDA)


# -- packed documents ------------------------------------------------------------------------------------------------


def flash_attn_2_packed():
    def rules_of(softmax_scale, causal, left, right, softcap):
        return TileRules(softmax_scale, CAUSAL if causal else (left, right), softcap)

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0.0
        rules = rules_of(softmax_scale, causal, window_size_left, window_size_right, softcap)
        return *play_forward(q, k, v, rules, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k)), None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        rules = rules_of(softmax_scale, causal, window_size_left, window_size_right, softcap)
        grads = play_backward(dout, q, k, v, out, softmax_lse, rules, cu_seqlens_q, cu_seqlens_k)
        for buffer, gradient in zip((dq, dk, dv), grads, strict=True):
            buffer.copy_(gradient)

    def plain(*args, deterministic=False):
        raise AssertionError("packed documents went to the entry for one")

    return {
        "_flash_attn_forward": plain, "_flash_attn_backward": plain,
        "_flash_attn_varlen_forward": _flash_attn_varlen_forward,
        "_flash_attn_varlen_backward": _flash_attn_varlen_backward,
    }  # fmt: skip


def flash_attn_3_packed():
    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, pack_gqa=None,
    ):  # fmt: skip
        rules = TileRules(softmax_scale, CAUSAL if causal else (window_size_left, window_size_right), softcap)
        return *play_forward(q, k, v, rules, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k)), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        rules = TileRules(softmax_scale, CAUSAL if is_causal else (window_size_left, window_size_right), softcap)
        grads = play_backward(dout, q, k, v, out, softmax_lse, rules, cu_seqlens_q, cu_seqlens_k)
        for buffer, gradient in zip((dq, dk, dv), grads, strict=True):
            buffer.copy_(gradient)

    return {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}


PACKING = {
    "flash_attn_2": (FlashAttn2Kernel, "flash_attn.flash_attn_interface", flash_attn_2_packed),
    "flash_attn_3": (FlashAttn3Kernel, "flash_attn_interface", flash_attn_3_packed),
    "flash_attn_4": (FlashAttn4Kernel, "flash_attn.cute.interface", flash_attn_4),
}


@pytest.mark.parametrize("window", [FULL, CAUSAL, (3, 1)], ids=str)
@pytest.mark.parametrize("name", [*PACKING, "torch_flash"])
def test_packed_documents_are_one_launch_with_each_documents_own_numbers(name, window, monkeypatch):
    """Five documents of odd lengths, of more keys than rows among them; k and v of unequal widths, GQA."""
    if name == "torch_flash":
        as_if_on_gpu(monkeypatch, [])
        kernel = registry.KERNELS[name]
    else:
        kernel_class, module, functions = PACKING[name]
        package(monkeypatch, module, **functions())
        hearsay(monkeypatch, (10, 0))
        kernel = kernel_class()
    assert kernel.packs is True
    bounds = ((0, 1, 6, 14, 17, 30), (0, 4, 9, 17, 26, 39))
    q, k, v, dout = inputs((4, 2, 30, 39, 24, 16, True), b=1)
    rules = TileRules(SCALE, window, boundaries=bounds)
    out, lse = kernel.forward(q, k, v, rules)
    grads = kernel.backward(dout, q, k, v, out, lse, rules, deterministic=True)
    got = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))
    want = {name: torch.zeros_like(x) for name, x in got.items()}
    for rows, keys in zip(*([slice(*x) for x in itertools.pairwise(side)] for side in bounds), strict=True):
        one = q[:, rows], k[:, keys], v[:, keys]
        alone = TileRules(SCALE, window)
        want["out"][:, rows], want["lse"][:, rows] = REFERENCE.forward(*one, alone)
        want["dq"][:, rows], want["dk"][:, keys], want["dv"][:, keys] = REFERENCE.backward(
            dout[:, rows], *one, want["out"][:, rows], want["lse"][:, rows], alone, deterministic=True
        )
    check_close(got, want)


def test_how_many_results_a_forward_has_says_nothing_of_which_is_lse(monkeypatch):
    """flash-attn 4 returned 2, then 4, then 5: with one more, lse must still be the second."""
    kernel = install_4(monkeypatch)
    module = sys.modules["flash_attn.cute.interface"]
    forward = module._flash_attn_fwd

    def _flash_attn_fwd(q, k, v, softmax_scale=None, causal=False, return_lse=False):
        return *forward(q, k, v, softmax_scale=softmax_scale, causal=causal, return_lse=return_lse)[:2], *[None] * 6

    monkeypatch.setattr(module, "_flash_attn_fwd", _flash_attn_fwd)
    q, k, v, _ = inputs((2, 2, 4, 4, 8, 8, True))
    _, lse = kernel.forward(q, k, v, TileRules(SCALE, CAUSAL))
    assert torch.equal(lse, REFERENCE.forward(q, k, v, TileRules(SCALE, CAUSAL))[1])


def test_a_version_that_may_pad_the_packed_lse_does_not_pack(monkeypatch):
    functions = flash_attn_2_packed()

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        alibi_slopes, return_softmax,
    ):  # fmt: skip
        raise AssertionError

    functions["_flash_attn_varlen_forward"] = _flash_attn_varlen_forward
    package(monkeypatch, "flash_attn.flash_attn_interface", **functions)
    assert FlashAttn2Kernel().packs is False
