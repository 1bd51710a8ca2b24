"""The flash-attn packages: FlashAttention-2 (`flash_attn`) and FlashAttention-3 (`flash_attn_interface`).

Not yet run on a GPU by this repository: the adapters bind to whatever parameters the installed version has, which
tests hold to look-alikes of versions 2.5, 2.8 and 3.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_loong.kernels.interface import KernelRequest
from megatron_loong.kernels.torch_cuda import why_not_on_cuda


def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call with the arguments that this version knows; a version that lacks a value that matters is an error.

    `window_size` was a pair up to 2.6 and is two integers since; `causal` is `is_causal` in some builds of 3.
    """
    parameters = inspect.signature(getattr(function, "_init_fn", function)).parameters
    known = {name: value for name, value in arguments.items() if name in parameters}
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and name not in known
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    if missing:
        raise NotImplementedError(f"{function.__module__}.{function.__name__} wants {missing}, which is not known here")
    return function(**known)


class _FlashAttnKernel:
    name: str
    module_name: str
    proven_on = "nothing yet"

    def why_not(self, request: KernelRequest) -> str | None:
        """Half precision on CUDA, when the package is installed."""
        package = self.module_name.split(".")[0]
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
        return why_not_on_cuda(request, widest_head=256)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionKernel.forward`."""
        module = importlib.import_module(self.module_name)
        arguments = {**self._common(softmax_scale, causal), "q": q, "k": k, "v": v, "return_softmax": False}
        results = _call(module._flash_attn_forward, arguments)
        # lse is [b, h, s] in float32; version 2 up to 2.6 returned q, k, v and the padded out before it.
        lse = results[5] if len(results) == 8 else results[1]
        return results[0], lse[..., : q.shape[1]].transpose(1, 2)

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
        module = importlib.import_module(self.module_name)
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        arguments = {
            **self._common(softmax_scale, causal),
            **dict(zip(("dout", "q", "k", "v", "out"), (dout, q, k, v, out), strict=True)),
            **dict(zip(("dq", "dk", "dv"), grads, strict=True)),
            "softmax_lse": lse.transpose(1, 2).contiguous(),
            "deterministic": deterministic,
        }
        _call(module._flash_attn_backward, arguments)
        return grads

    @staticmethod
    def _common(softmax_scale: float, causal: bool) -> dict[str, Any]:
        return {
            "dropout_p": 0.0,
            "softmax_scale": softmax_scale,
            "causal": causal,
            "is_causal": causal,
            "window_size": (-1, -1),
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "alibi_slopes": None,
            "rng_state": None,
        }


class FlashAttn2Kernel(_FlashAttnKernel):
    """FlashAttention-2."""

    name = "flash_attn_2"
    module_name = "flash_attn.flash_attn_interface"


class FlashAttn3Kernel(_FlashAttnKernel):
    """FlashAttention-3 (Hopper)."""

    name = "flash_attn_3"
    module_name = "flash_attn_interface"
