"""PyTorch's CPU flash operator: blockwise, never a whole score matrix; the kernel of CPU runs and of the tests."""

from __future__ import annotations

import torch

from megatron_loong.kernels.common import dtype_fault, lse_from_bhs, request_fault, unit_stride, widen
from megatron_loong.kernels.interface import KernelRequest

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class CpuFlashKernel:
    """`AttentionKernel` on `aten._scaled_dot_product_flash_attention_for_cpu`. Shapes: `interface.AttentionKernel`.

    GQA is native. The operator wants one width for k and v, so the narrower is padded with zeros, which is exact.
    Its backward gives the same bits every time. Gradients come in q's dtype.
    """

    name = "cpu_flash"
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
        return request_fault(request) or dtype_fault(request, _DTYPES)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [b, s_q, h, dv], lse [b, s_q, h]); lse is float32, float64 for float64."""
        width = max(q.shape[-1], v.shape[-1])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_operand(x, width) for x in (q, k, v)), 0.0, causal, scale=softmax_scale
        )
        return out.transpose(1, 2)[..., : v.shape[-1]], lse_from_bhs(lse, q.shape[1])

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        softmax_scale: float,
        causal: bool,
        deterministic: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) of this tile in q's dtype, from `out` and `lse` of the whole row."""
        d, dv_width = q.shape[-1], v.shape[-1]
        width = max(d, dv_width)
        operands = [_operand(x, width) for x in (dout.to(q.dtype), q, k, v, out.to(q.dtype))]
        lse = lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32).transpose(1, 2)
        dq, dk, dv = (
            x.transpose(1, 2)
            for x in torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *operands, lse, 0.0, causal, scale=softmax_scale
            )
        )
        return dq[..., :d], dk[..., :d], dv[..., :dv_width]


def _operand(x: torch.Tensor, width: int) -> torch.Tensor:
    """[b, s, h, d] -> view [b, h, s, width] that the operator reads rightly."""
    # A length of 0 kills the process (division by zero in the operator), so stop before it.
    assert x.numel() > 0, f"empty attention tile {tuple(x.shape)}"
    # The operator ignores the stride of the last dimension: other than 1, it answers wrongly without a word.
    return unit_stride(widen(x, width)).transpose(1, 2)
