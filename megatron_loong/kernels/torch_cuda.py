"""PyTorch's own CUDA attention operators: flash (FlashAttention 2 inside torch) and cuDNN.

Proven on nothing yet: no GPU was at hand. What the tests prove is the adapter alone, on a CPU: that the arguments
fit the operators' schemas and meta kernels, and that lse, padding and gradients are put through rightly, with the
operators played by the reference kernel.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_loong.config import CAUSAL
from megatron_loong.kernels.common import (
    feature_fault,
    flash_backward_fault,
    gpu_capability,
    gpu_fault,
    gpu_operand,
    lse_from_bhs,
    lse_to_bhs,
    round_up,
)
from megatron_loong.kernels.interface import KernelRequest, TileRules
from megatron_loong.kernels.reference import ReferenceKernel

# Up to 9.15.0 cuDNN is wrong for lengths that are no multiple of 128; torch itself prefers cuDNN only after it.
_CUDNN_VERSION = 91501


def _operator(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.aten, name).default


class TorchFlashKernel:
    """`AttentionKernel` on `aten._scaled_dot_product_flash_attention`. Shapes: `interface.AttentionKernel`.

    GQA is native. Head widths are padded to one multiple of 8. Gradients come in q's dtype.
    """

    name = "torch_flash"
    bottom_right = False
    proven_on = "nothing yet"
    devices = "CUDA, compute capability 8.0 or newer"
    dtypes = "bfloat16, float16"
    head_widths = "up to 256 (192 on sm_86, 89, 12x); k and v of different widths cost a padded copy"

    def why_not(self, request: KernelRequest) -> str | None:
        """None when it can serve the request, else the reason."""
        fault = gpu_fault(request, max_width=256) or flash_backward_fault(request) or _plain_fault(request)
        if fault is None and not torch.backends.cuda.is_flash_attention_available():
            fault = f"torch {torch.__version__} was built without flash attention"
        return fault

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: TileRules
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [b, s_q, h, dv] in q's dtype, lse [b, s_q, h] float32)."""
        operands = (_operand(x, _common_width(q, v)) for x in (q, k, v))
        out, lse, *_ = _operator("_scaled_dot_product_flash_attention")(
            *operands, 0.0, rules.window == CAUSAL, False, scale=rules.softmax_scale
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
        rules: TileRules,
        *,
        deterministic: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) of this tile in q's dtype, from `out` and `lse` of the whole row."""
        operands = [_operand(x, _common_width(q, v)) for x in (dout.to(q.dtype), q, k, v, out.to(q.dtype))]
        # Read only with dropout; made before deterministic mode, whose filling of new memory knows no uint64.
        rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.zeros((), dtype=torch.uint64, device=q.device)
        with _deterministic_algorithms() if deterministic else contextlib.nullcontext():
            dq, dk, dv = _operator("_scaled_dot_product_flash_attention_backward")(
                *operands, lse_to_bhs(lse), None, None, q.shape[1], k.shape[1], 0.0, rules.window == CAUSAL,
                rng_state, unused, scale=rules.softmax_scale,
            )  # fmt: skip
        return _narrow(dq, q), _narrow(dk, k), _narrow(dv, v)


class TorchCudnnKernel:
    """`AttentionKernel` on `aten._scaled_dot_product_cudnn_attention`. Shapes: `interface.AttentionKernel`.

    GQA is native; k and v may differ in width. Its backward is not deterministic, so it refuses that.
    """

    name = "torch_cudnn"
    bottom_right = False
    proven_on = "nothing yet"
    devices = "CUDA, compute capability 9.x or 10.x, cuDNN 9.15.1 or newer"
    dtypes = "bfloat16, float16"
    head_widths = "up to 128, or 192 with v 128"

    def why_not(self, request: KernelRequest) -> str | None:
        """None when it can serve the request, else the reason."""
        if (request.head_dim, request.value_head_dim) == (192, 128):
            fault = gpu_fault(request, max_width=192)
        else:
            fault = gpu_fault(request, max_width=128)
        fault = fault or _plain_fault(request)
        if fault:
            return fault
        if request.deterministic:
            return "cuDNN's backward is not deterministic"
        capability, version = gpu_capability(), torch.backends.cudnn.version() or 0
        if capability is None or capability[0] not in (9, 10):
            return "made for compute capability 9.x and 10.x"
        if version < _CUDNN_VERSION:
            return f"needs cuDNN {_CUDNN_VERSION} or newer, found {version or 'none'}"
        if os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "0") not in ("", "0"):
            return "TORCH_CUDNN_SDPA_AVOID_RECOMPILE is set, which lays the lse out in another way"
        return None

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: TileRules
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [b, s_q, h, dv] in q's dtype, lse [b, s_q, h] float32)."""
        if k.shape[1] == 1:  # refused by cuDNN, and one column of scores is nothing
            return ReferenceKernel().forward(q, k, v, rules)
        out, lse, *_ = _operator("_scaled_dot_product_cudnn_attention")(
            *(_operand(x, round_up(x.shape[-1], 8)) for x in (q, k, v)), None, True, 0.0, rules.window == CAUSAL, False,
            scale=rules.softmax_scale,
        )  # fmt: skip
        return out.transpose(1, 2)[..., : v.shape[-1]], lse_from_bhs(lse.flatten(2), q.shape[1])

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
        """(dq, dk, dv) of this tile in q's dtype, from `out` and `lse` of the whole row."""
        if deterministic:
            raise NotImplementedError("cuDNN's backward is not deterministic; use --loong-kernel torch_flash")
        if k.shape[1] == 1:
            return ReferenceKernel().backward(dout, q, k, v, out, lse, rules, deterministic=False)
        operands = [_operand(x, round_up(x.shape[-1], 8)) for x in (dout.to(q.dtype), q, k, v, out.to(q.dtype))]
        lse = lse_to_bhs(lse)
        if _cudnn_lse_dims(q.device, q.dtype) == 4:
            lse = lse.unsqueeze(-1)
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv = _operator("_scaled_dot_product_cudnn_attention_backward")(
            *operands,
            lse,
            seed,
            seed,
            None,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            rules.window == CAUSAL,
            scale=rules.softmax_scale,
        )
        return _narrow(dq, q), _narrow(dk, k), _narrow(dv, v)


@functools.lru_cache(maxsize=32)
def _cudnn_lse_dims(device: torch.device, dtype: torch.dtype) -> int:
    """3 or 4: torch versions differ in whether lse ends in a dimension of 1, and backward wants what forward gave."""
    probe = torch.zeros(1, 1, 128, 64, device=device, dtype=dtype)
    return _operator("_scaled_dot_product_cudnn_attention")(probe, probe, probe, None, True, 0.0, False, False)[1].ndim


@contextlib.contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    """Torch's flash backward has no argument for it: it asks the global switch, and a mere warning does not count."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def _plain_fault(request: KernelRequest) -> str | None:
    return feature_fault(request, "windowed", "softcap", "alibi", "dropout")


def _common_width(q: torch.Tensor, v: torch.Tensor) -> int:
    return round_up(max(q.shape[-1], v.shape[-1]), 8)


def _operand(x: torch.Tensor, width: int) -> torch.Tensor:
    """[b, s, h, d] -> view [b, h, s, width]."""
    return gpu_operand(x, width).transpose(1, 2)


def _narrow(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[b, h, s, width] -> view [b, s, h, d of `like`]."""
    return gradient.transpose(1, 2)[..., : like.shape[-1]]
