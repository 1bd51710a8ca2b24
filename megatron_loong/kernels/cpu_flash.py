"""PyTorch's CPU flash operator: blockwise, never a whole score matrix; the kernel of CPU runs and of the tests."""

from __future__ import annotations

import math

import torch

from megatron_loong.config import CAUSAL, FULL, UNBOUNDED
from megatron_loong.kernels.common import (
    HALF_DTYPES,
    dtype_fault,
    feature_fault,
    lse_from_bhs,
    request_fault,
    unit_stride,
    widen,
)
from megatron_loong.kernels.interface import KernelRequest, TileRules

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class CpuFlashKernel:
    """`AttentionKernel` on `aten._scaled_dot_product_flash_attention_for_cpu`. Shapes: `interface.AttentionKernel`.

    GQA is native. The operator wants one width for k and v, so the narrower is padded with zeros, which is exact.
    Its backward gives the same bits every time. Gradients come in q's dtype. Sliding windows are cut into blocks.
    Half precision is computed in float32 where the operator is slow in it, see `operator_dtype`.
    """

    name = "cpu_flash"
    bottom_right = False
    proven_on = "CPU"
    devices = "CPU"
    dtypes = "bfloat16, float16, float32, float64"
    head_widths = "any; k and v of different widths cost a padded copy"

    def why_not(self, request: KernelRequest) -> str | None:
        """None when it can serve the request, else the reason."""
        if request.device_type != "cpu":
            return f"runs on cpu, the tensors are on {request.device_type}"
        if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
            return f"torch {torch.__version__} lacks the CPU flash operator"
        return request_fault(request) or dtype_fault(request, _DTYPES) or feature_fault(request, "softcap", "dropout")

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: TileRules
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [b, s_q, h, dv], lse [b, s_q, h]); lse is float32, float64 for float64."""
        width = max(q.shape[-1], v.shape[-1])
        outs, lses = [], []
        for rows, keys, mask in _calls(q, k, rules):
            operands = [_operand(x, width) for x in (q[:, rows], k[:, keys], v[:, keys])]
            out, lse = flash_forward(*operands, is_causal=rules.window == CAUSAL, mask=mask, scale=rules.softmax_scale)
            outs.append(out.transpose(1, 2)[..., : v.shape[-1]])
            lses.append(lse_from_bhs(lse, outs[-1].shape[1]))
        return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 1), torch.cat(lses, 1))

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        rules: TileRules,
        *,
        deterministic: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) of this tile from `out` and `lse` of the whole row; in q's dtype, wider for a window."""
        d, dv_width = q.shape[-1], v.shape[-1]
        width = max(d, dv_width)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        calls = _calls(q, k, rules)
        grads = []
        for rows, keys, mask in calls:
            operands = (dout[:, rows].to(q.dtype), q[:, rows], k[:, keys], v[:, keys], out[:, rows].to(q.dtype))
            dq, dk, dv = flash_backward(
                *(_operand(x, width) for x in operands),
                lse=lse[:, rows].to(wide).transpose(1, 2),
                is_causal=rules.window == CAUSAL,
                mask=mask,
                scale=rules.softmax_scale,
            )
            grads.append((dq.transpose(1, 2)[..., :d], dk.transpose(1, 2)[..., :d], dv.transpose(1, 2)[..., :dv_width]))
        if rules.window in (FULL, CAUSAL):
            return grads[0]
        sum_dk, sum_dv = (torch.zeros(x.shape, dtype=wide) for x in (k, v))
        for (_, keys, _), (_, dk, dv) in zip(calls, grads, strict=True):
            sum_dk[:, keys] += dk
            sum_dv[:, keys] += dv
        return torch.cat([dq for dq, _, _ in grads], 1), sum_dk, sum_dv


def operator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tensors of `dtype` are computed in here: float32 for half precision on a CPU without AVX-512.

    Without it PyTorch multiplies half-precision matrices element by element: its backward takes ten times as long as
    in float32 (torch 2.15, AVX2).
    """
    if dtype in HALF_DTYPES and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return torch.float32
    return dtype


def flash_forward(
    *qkv: torch.Tensor, is_causal: bool, mask: torch.Tensor | None = None, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator on q, k, v [b, h, s, d] in `operator_dtype`: (out in q's dtype, lse [b, h, s]). Differentiable."""
    given = qkv[0].dtype
    dtype = operator_dtype(given)
    q, k, v = (x.to(dtype) for x in qkv)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=None if mask is None else mask.to(dtype), scale=scale
    )
    return out.to(given), lse


def flash_backward(
    *dout_qkv_out: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv of `flash_forward` from dout, q, k, v and out [b, h, s, d], in their dtype."""
    given = dout_qkv_out[0].dtype
    dtype = operator_dtype(given)
    dout, q, k, v, out = (x.to(dtype) for x in dout_qkv_out)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, is_causal, attn_mask=None if mask is None else mask.to(dtype), scale=scale
    )
    return tuple(x.to(given) for x in grads)


def _calls(q: torch.Tensor, k: torch.Tensor, rules: TileRules) -> list[tuple[slice, slice, torch.Tensor | None]]:
    """(rows, keys, additive mask) of the operator's calls for a tile: one, or for a window one per block of rows.

    The operator takes a mask at dense cost, so that each block is given only the keys that its rows reach.
    """
    n, m = q.shape[1], k.shape[1]
    if rules.window in (FULL, CAUSAL):
        assert rules.window == FULL or n == m, "causal tiles are square here"
        return [(slice(0, n), slice(0, m), None)]
    left, right = (n + m if x == UNBOUNDED else x for x in rules.window)
    block = min(512, max(64, (left + right) // 4))
    calls = []
    for start in range(0, n, block):
        stop = min(start + block, n)
        first, last = max(0, start + m - n - left), min(m, stop - 1 + m - n + right + 1)
        places = torch.arange(start, stop).unsqueeze(1) + m - n
        keys = torch.arange(first, last)
        hidden = (keys < places - left) | (keys > places + right)
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -math.inf) if hidden.any() else None
        calls.append((slice(start, stop), slice(first, last), mask))
    return calls


def _operand(x: torch.Tensor, width: int) -> torch.Tensor:
    """[b, s, h, d] -> view [b, h, s, width] that the operator reads rightly."""
    # A length of 0 kills the process (division by zero in the operator), so stop before it.
    assert x.numel() > 0, f"empty attention tile {tuple(x.shape)}"
    # The operator ignores the stride of the last dimension: other than 1, it answers wrongly without a word.
    return unit_stride(widen(x, width)).transpose(1, 2)
