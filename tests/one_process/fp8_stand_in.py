"""A stand-in for flash-attn 3 with its fp8 forward, which rounds to e4m3 as the package does, on a CPU in float32."""

from __future__ import annotations

import torch

from megatron_loong.config import CAUSAL
from megatron_loong.kernels.fp8 import FlashAttn3Fp8Kernel
from megatron_loong.kernels.interface import TileRules
from megatron_loong.kernels.reference import _scores
from tests.one_process.played_kernels import documents, play_backward, play_forward
from tests.one_process.test_kernel_packages import package

E4M3 = torch.float8_e4m3fn


class OnCpu(FlashAttn3Fp8Kernel):
    """The adapter, which believes that it can serve here."""

    def why_not(self, request):
        return None


def install(monkeypatch, **content):
    """The module in `sys.modules`; `content` beside or instead of its functions."""
    package(monkeypatch, "flash_attn_interface", **{**functions(), **content})
    return OnCpu()


def fp8_attention(q, k, v, descales, rules):
    """out (bfloat16) and lse of tensors in e4m3; probabilities are rounded too, 256 for 1 as in the package."""
    ones = [one_by_batch[:, None, :, None] for one_by_batch in descales]
    groups = k.shape[2]
    q = (q.float().unflatten(2, (groups, -1)) * ones[0].unsqueeze(3)).flatten(2, 3)
    k, v = k.float() * ones[1], v.float() * ones[2]
    scores, _ = _scores(q, k, rules)
    lse = scores.logsumexp(-1)
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded_p = (p * 256).to(E4M3).float() / 256
    out = torch.einsum("bgrqk,bkgd->bqgrd", rounded_p / p.sum(-1, keepdim=True), v)
    return out.flatten(2, 3).bfloat16(), lse.flatten(1, 2).transpose(1, 2)


def play_fp8(q, k, v, descales, rules, cu_q, cu_k):
    """In the package's layouts; packed documents are its batch."""
    packed = cu_q is not None
    if packed:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    parts, rules = documents(rules, cu_q, cu_k, q.shape[1], k.shape[1])
    batch = len(parts) if packed else q.shape[0]
    for x in descales:
        assert x.shape == (batch, k.shape[2]) and x.dtype == torch.float32 and x.is_contiguous()
    results = []
    for i, (rows, keys) in enumerate(parts):
        scales = [x[i : i + 1] for x in descales] if packed else descales
        results.append(fp8_attention(q[:, rows], k[:, keys], v[:, keys], scales, rules))
    out, lse = (torch.cat(x, 1) for x in zip(*results, strict=True))
    lse = lse.transpose(1, 2).contiguous()
    return (out[0], lse[0]) if packed else (out, lse)


def functions():
    """The parameters of flash-attention 0251105, August 2026, but for those that are never named."""

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        rules = TileRules(softmax_scale, CAUSAL if causal else (window_size_left, window_size_right), softcap)
        assert q.dtype == k.dtype == v.dtype
        if q.dtype != E4M3:
            assert q_descale is k_descale is v_descale is None
            longest = (max_seqlen_q, max_seqlen_k)
            return *play_forward(q, k, v, rules, cu_seqlens_q, cu_seqlens_k, longest), None, None
        assert all(x.shape[-1] % 16 == 0 and x.stride(-1) == 1 for x in (q, k, v))
        descales = (q_descale, k_descale, v_descale)
        return *play_fp8(q, k, v, descales, rules, cu_seqlens_q, cu_seqlens_k), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert all(x.dtype.itemsize > 1 for x in (dout, q, k, v, out, dq, dk, dv)), "there is no backward in fp8"
        rules = TileRules(softmax_scale, CAUSAL if is_causal else (window_size_left, window_size_right), softcap)
        grads = play_backward(dout, q, k, v, out, softmax_lse, rules, cu_seqlens_q, cu_seqlens_k)
        for buffer, gradient in zip((dq, dk, dv), grads, strict=True):
            buffer.copy_(gradient)

    return {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}
