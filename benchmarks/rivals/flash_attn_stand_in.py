"""`flash_attn` where it is not installed: its functions, computed by PyTorch's flash operator, on a CPU or a GPU.

Several rivals import flash-attn at the top and call its private functions for every block. With this in its place they
run unchanged, on the same kernel as everyone else.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch

from megatron_loong.config import CAUSAL, FULL
from megatron_loong.kernels.cpu_flash import flash_backward, flash_forward
from megatron_loong.kernels.interface import AttentionKernel, TileRules
from megatron_loong.kernels.torch_cuda import TorchFlashKernel

_VERSION = "2.8.0"


class OnGpu:
    """What serves there, and what it costs to play flash-attn, which writes gradients where they are wanted."""

    kernel: AttentionKernel = TorchFlashKernel()
    copied_bytes = 0
    """Of gradients so far, copied to where they were wanted: read and written."""


def _operands(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, None, None]:
    """[b, s, h, d] -> (out [b, s, h, d], lse [b, h, s], None, None)."""
    _refuse(causal and q.shape[1] != k.shape[1], dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    if q.device.type == "cuda":
        out, lse = OnGpu.kernel.forward(q, k, v, _rules(q, softmax_scale, causal))
        return out, lse.transpose(1, 2).contiguous(), None, None
    out, lse = flash_forward(*_operands(q, k, v), is_causal=causal, scale=softmax_scale)
    return out.transpose(1, 2), lse, None, None


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    rng_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fill dq, dk and dv (views are fine); the softmax_d that flash-attn returns is read by nobody."""
    _refuse(causal and q.shape[1] != k.shape[1], dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    if q.device.type == "cuda":
        lse, rules = softmax_lse.transpose(1, 2), _rules(q, softmax_scale, causal)
        gradients = OnGpu.kernel.backward(dout, q, k, v, out, lse, rules, deterministic=deterministic)
    else:
        gradients = flash_backward(
            *_operands(dout, q, k, v, out), lse=softmax_lse, is_causal=causal, scale=softmax_scale
        )
        gradients = [x.transpose(1, 2) for x in gradients]
    for into, gradient in zip((dq, dk, dv), gradients, strict=True):
        into.copy_(gradient)
        OnGpu.copied_bytes += into.numel() * (into.element_size() + gradient.element_size())
    return softmax_lse


def _rules(q: torch.Tensor, softmax_scale: float | None, causal: bool) -> TileRules:
    return TileRules(q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, CAUSAL if causal else FULL)


def _refuse(
    unequal_causal: bool, dropout_p: float, left: int, right: int, softcap: float, alibi_slopes: torch.Tensor | None
) -> None:
    asked = {
        "causal with unequal lengths": unequal_causal,
        "dropout": dropout_p,
        "a window": (left, right) != (-1, -1),
        "softcap": softcap,
        "alibi": alibi_slopes is not None,
    }
    if any(asked.values()):
        wanted = ", ".join(name for name, value in asked.items() if value)
        raise NotImplementedError(f"the stand-in for flash_attn has no {wanted}")


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **unused: Any,
) -> torch.Tensor:
    """Differentiable attention [b, s, h, d], by the operator's own autograd."""
    _refuse(causal and q.shape[1] != k.shape[1], dropout_p, -1, -1, 0.0, unused.get("alibi_slopes"))
    out, _ = flash_forward(*_operands(q, k, v), is_causal=causal, scale=softmax_scale)
    return out.transpose(1, 2)


def _missing(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("the stand-in for flash_attn has no variable-length functions")


def install_stand_in(kernel: AttentionKernel | None = None) -> None:
    """Put the stand-in where `import flash_attn` finds it, unless the real one is there and has its GPU.

    kernel: what it calls on a GPU from now on; by default PyTorch's flash operator.
    """
    OnGpu.kernel = kernel or OnGpu.kernel
    if "flash_attn" in sys.modules or (torch.cuda.is_available() and importlib.util.find_spec("flash_attn")):
        return
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    for module in (package, interface):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=module is package)
        for function in (_flash_attn_forward, _flash_attn_backward, flash_attn_func):
            setattr(module, function.__name__, function)
        for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward", "flash_attn_varlen_func"):
            setattr(module, name, _missing)
        sys.modules[module.__name__] = module
    package.__version__ = _VERSION  # type: ignore[attr-defined]
    package.__path__ = []
    package.flash_attn_interface = interface  # type: ignore[attr-defined]
