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

from megatron_loong.config import CAUSAL, FULL
from megatron_loong.kernels.common import (
    boundaries_on,
    cudnn_fault,
    feature_fault,
    flash_backward_fault,
    gpu_fault,
    gpu_operand,
    longest,
    lse_from_bhs,
    lse_to_bhs,
    operand,
    round_up,
)
from megatron_loong.kernels.interface import KernelRequest, TileRules
from megatron_loong.kernels.reference import ReferenceKernel

# Up to 9.15.0 cuDNN is wrong for lengths that are no multiple of 128; torch itself prefers cuDNN only after it.
_CUDNN_VERSION = 91501


def _operator(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.aten, name).default


class TorchFlashKernel:
    """`AttentionKernel` on `aten._flash_attention_forward`. Shapes: `interface.AttentionKernel`.

    GQA is native. Head widths are padded to one multiple of 8. Gradients come in q's dtype.
    """

    name = "torch_flash"
    bottom_right = True
    proven_on = "nothing yet"
    devices = "CUDA, compute capability 8.0 or newer"
    dtypes = "bfloat16, float16"
    head_widths = "up to 256 (192 on sm_86, 89, 12x); k and v of different widths cost a padded copy"

    @property
    def packs(self) -> bool:
        """Whether many documents can be one launch, with lse [h, t]; it was padded before it had its rng_state."""
        return _operator("_flash_attention_forward")._schema.returns[2].name == "rng_state"

    def why_not(self, request: KernelRequest) -> str | None:
        """None when it can serve the request, else the reason."""
        fault = gpu_fault(request, max_width=256) or flash_backward_fault(request)
        fault = fault or feature_fault(request, "softcap", "dropout")
        if fault is None and not torch.backends.cuda.is_flash_attention_available():
            fault = f"torch {torch.__version__} was built without flash attention"
        return fault

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: TileRules
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [b, s_q, h, dv] in q's dtype, lse [b, s_q, h] float32)."""
        width = _common_width(q, v)
        out, lse, *_ = _operator("_flash_attention_forward")(
            *(operand(x, width, rules) for x in (q, k, v)), *_lengths(q, k, rules), 0.0, rules.window == CAUSAL, False,
            scale=rules.softmax_scale, **_window(rules),
        )  # fmt: skip
        if rules.boundaries is not None:
            out, lse = out.unsqueeze(0), lse.unsqueeze(0)
        return out[..., : v.shape[-1]], lse_from_bhs(lse, q.shape[1])

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
        width, lse = _common_width(q, v), lse_to_bhs(lse)
        operands = [operand(x, width, rules) for x in (dout.to(q.dtype), q, k, v, out.to(q.dtype))]
        # The state of dropout's generator, and what followed it in older versions: not read without dropout.
        rng_state, unused = (torch.zeros(x, dtype=torch.uint64, device=q.device) for x in ((2,), ()))
        with _deterministic_algorithms() if deterministic else contextlib.nullcontext():
            grads = _operator("_flash_attention_backward")(
                *operands, lse if rules.boundaries is None else lse.squeeze(0), *_lengths(q, k, rules), 0.0,
                rules.window == CAUSAL, rng_state, unused, scale=rules.softmax_scale, **_window(rules),
            )  # fmt: skip
        dq, dk, dv = (x if rules.boundaries is None else x.unsqueeze(0) for x in grads)
        return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


class TorchCudnnKernel:
    """`AttentionKernel` on `aten._scaled_dot_product_cudnn_attention`. Shapes: `interface.AttentionKernel`.

    GQA is native; k and v may differ in width. Its backward is not deterministic, so it refuses that.
    """

    name = "torch_cudnn"
    bottom_right = False
    proven_on = "nothing yet"
    plans = True
    devices = "CUDA, compute capability 9.x or 10.x, cuDNN 9.15.1 or newer"
    dtypes = "bfloat16, float16"
    head_widths = "up to 128; up to 256 on 9.0; 192 with v 128"

    def why_not(self, request: KernelRequest) -> str | None:
        """None when it can serve the request, else the reason."""
        fault = cudnn_fault(request) or feature_fault(request, "windowed", "softcap", "dropout")
        if fault:
            return fault
        if request.deterministic:
            return "cuDNN's backward is not deterministic"
        version = torch.backends.cudnn.version() or 0
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
        # Up to torch 2.11 a plan is found by the strides of q, k and v alone, while those of dout and out are as they
        # were when it was made: so they are always dense.
        dout, out = (x.to(q.dtype).contiguous() for x in (dout, out))
        operands = [_operand(x, round_up(x.shape[-1], 8)) for x in (dout, q, k, v, out)]
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
    """Torch's flash backward has no argument for it: it asks the global switch, and a mere warning does not count.

    The switch also has every new tensor filled, the operator's own sums among them: passes over memory for nothing.
    """
    memory: Any = torch.utils.deterministic
    before, filling = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = filling
        torch.set_deterministic_debug_mode(before)


def _lengths(q: torch.Tensor, k: torch.Tensor, rules: TileRules) -> tuple[Any, Any, int, int]:
    """Where documents begin among rows and keys, None where there is but one, and the longest of them."""
    if rules.boundaries is None:
        return None, None, q.shape[1], k.shape[1]
    rows, keys = rules.boundaries
    return boundaries_on(q.device, rows), boundaries_on(q.device, keys), longest(rows), longest(keys)


def _window(rules: TileRules) -> dict[str, int]:
    """A sliding window in the operators' words; FULL and CAUSAL need none."""
    if rules.window in (FULL, CAUSAL):
        return {}
    return dict(zip(("window_size_left", "window_size_right"), rules.window, strict=True))


def _common_width(q: torch.Tensor, v: torch.Tensor) -> int:
    return round_up(max(q.shape[-1], v.shape[-1]), 8)


def _operand(x: torch.Tensor, width: int) -> torch.Tensor:
    """[b, s, h, d] -> view [b, h, s, width]."""
    return gpu_operand(x, width).transpose(1, 2)


def _narrow(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[b, h, s, width] -> view [b, s, h, d of `like`]."""
    return gradient.transpose(1, 2)[..., : like.shape[-1]]
