"""PyTorch's CUDA flash and cuDNN attention operators, used directly for their lse and their backward.

Not yet run on a GPU by this repository: written against the operators' schemas, which a test holds them to.
"""

from __future__ import annotations

import torch

from megatron_loong.kernels.interface import KernelRequest


def why_not_on_cuda(request: KernelRequest, widest_head: int) -> str | None:
    """What every fused CUDA kernel here asks of a request."""
    if request.device_type != "cuda":
        return f"runs on CUDA, not on {request.device_type}"
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {request.dtype}"
    if request.head_dim > widest_head or request.head_dim % 8:
        return f"takes head widths that are multiples of 8 up to {widest_head}, not {request.head_dim}"
    if request.value_head_dim != request.head_dim:
        return f"takes v of q's width, not {request.value_head_dim} beside {request.head_dim}"
    if request.dropout_p:
        return "is not used with dropout"
    return None


class TorchFlashKernel:
    """`aten._scaled_dot_product_flash_attention` (FlashAttention-2 inside PyTorch)."""

    name = "torch_flash"
    proven_on = "nothing yet"

    def why_not(self, request: KernelRequest) -> str | None:
        """Half precision on CUDA; its backward adds up dq with atomics."""
        if request.deterministic and request.device_type == "cuda":
            return "has no switch for a deterministic backward of its own"
        return why_not_on_cuda(request, widest_head=256)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionKernel.forward`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=softmax_scale
        )
        return out.transpose(1, 2), lse[..., : q.shape[2]].transpose(1, 2)

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
        """See `AttentionKernel.backward`."""
        dout, q, k, v, out, lse = (x.transpose(1, 2) for x in (dout, q, k, v, out, lse))
        state = torch.zeros(2, dtype=torch.int64, device=q.device)  # of the dropout that is not there
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal,
            state, state, scale=softmax_scale,
        )  # fmt: skip
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv


class TorchCudnnKernel:
    """`aten._scaled_dot_product_cudnn_attention` (cuDNN's fused attention)."""

    name = "torch_cudnn"
    proven_on = "nothing yet"

    def why_not(self, request: KernelRequest) -> str | None:
        """Half precision on CUDA, as many KV heads as query heads, heads up to 128 wide."""
        reason = why_not_on_cuda(request, widest_head=128)
        if reason is None and request.query_heads != request.kv_heads:
            reason = f"takes as many KV heads as query heads, not {request.kv_heads} beside {request.query_heads}"
        if reason is None and request.deterministic:
            reason = "has no switch for a deterministic backward"
        return reason

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionKernel.forward`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=softmax_scale
        )
        return out.transpose(1, 2), lse.view(q.shape[:3]).transpose(1, 2)

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
        """See `AttentionKernel.backward`."""
        dout, q, k, v, out, lse = (x.transpose(1, 2) for x in (dout, q, k, v, out, lse))
        state = torch.zeros((), dtype=torch.int64, device=q.device)  # of the dropout that is not there
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse.contiguous(), state, state, None, None, None, q.shape[2], k.shape[2], 0.0,
            causal, scale=softmax_scale,
        )  # fmt: skip
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv
