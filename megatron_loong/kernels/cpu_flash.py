"""PyTorch's CPU flash operator, used directly for its lse and for a backward with a global out and lse."""

from __future__ import annotations

import torch

from megatron_loong.kernels.interface import KernelRequest

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class CpuFlashKernel:
    """`aten._scaled_dot_product_flash_attention_for_cpu` and its backward: GQA and strided views are native."""

    name = "cpu_flash"
    proven_on = "CPU"

    def why_not(self, request: KernelRequest) -> str | None:
        """CPU tensors of a floating dtype, without dropout."""
        if request.device_type != "cpu":
            return f"runs on the CPU, not on {request.device_type}"
        if request.dtype not in _DTYPES:
            return f"does not take {request.dtype}"
        if request.dropout_p:
            return "has no dropout"
        return None

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionKernel.forward`."""
        _check_not_empty(q, k)
        q, k, width = q.transpose(1, 2), k.transpose(1, 2), v.shape[3]
        q, k, v = _to_one_width([q, k, v.transpose(1, 2)])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=softmax_scale)
        return out.transpose(1, 2)[..., :width], lse.transpose(1, 2)

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
        """See `AttentionKernel.backward`. Bit-deterministic whatever `deterministic` says."""
        _check_not_empty(q, k)
        widths = q.shape[3], k.shape[3], v.shape[3]
        dout, q, k, v, out = _to_one_width([x.transpose(1, 2) for x in (dout, q, k, v, out)])
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse.transpose(1, 2), 0.0, causal, scale=softmax_scale
        )
        dq, dk, dv = (x.transpose(1, 2)[..., :width] for x, width in zip(grads, widths, strict=True))
        return dq, dk, dv


def _to_one_width(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The operator wants k and v of one width; columns of zeros change neither scores nor the columns kept."""
    width = max(x.shape[3] for x in tensors)
    return [x if x.shape[3] == width else torch.nn.functional.pad(x, (0, width - x.shape[3])) for x in tensors]


def _check_not_empty(q: torch.Tensor, k: torch.Tensor) -> None:
    # The operator divides by the block count: a length of 0 ends the process with SIGFPE.
    assert q.numel() and k.numel(), f"empty tile: q {list(q.shape)}, k {list(k.shape)}"
