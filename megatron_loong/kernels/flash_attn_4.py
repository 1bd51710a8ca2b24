"""flash-attn 4 (`flash_attn.cute`, written in CuTe), where the user has installed it.

Proven on nothing yet: no GPU was at hand. The tests run the adapter on a CPU against a stand-in with the signatures of
August 2026 (flash-attention 0251105), whose numbers come from the reference kernel.
"""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar

import torch

from megatron_loong.kernels.common import feature_fault, gpu_capability, gpu_fault, round_up
from megatron_loong.kernels.flash_attn import FlashAttnPackage
from megatron_loong.kernels.interface import KernelRequest

_MLA_WIDTHS = (192, 128)


class FlashAttn4Kernel(FlashAttnPackage):
    """`AttentionKernel` on flash-attn 4. Shapes: `interface.AttentionKernel`. Gradients in q's dtype.

    Its own sinks are not used: a sink belongs to a row's whole softmax, and is added when all tiles are merged.
    """

    name = "flash_attn_4"
    package = "flash_attn"
    module = "flash_attn.cute.interface"
    entries = ("_flash_attn_fwd", "_flash_attn_bwd")
    packed_entries = entries
    unbounded = None
    asked_for: ClassVar[dict[str, Any]] = {"return_lse": True}
    devices = "CUDA, compute capability 9.0, 10.x, 11.x and 12.x"
    head_widths = "up to 256 on 9.0; up to 128 or 256 on 10.x and 11.x; up to 128 on 12.x; 192 with v 128 but on 12.x"

    def why_not(self, request: KernelRequest) -> str | None:
        """None when it can serve the request, else the reason. Imports the package only for a request on CUDA."""
        return (
            gpu_fault(request, max_width=256)
            or feature_fault(request, "dropout")
            or self._limits(request)
            or self._import_fault()
        )

    def _limits(self, request: KernelRequest) -> str | None:
        capability, width = gpu_capability(), max(self._padded(request.head_dim, request.value_head_dim))
        major = capability[0] if capability is not None else 0
        if major not in (9, 10, 11, 12):
            return "its backward is made for compute capability 9.x to 12.x"
        if major == 12:
            if request.deterministic or request.softcap:
                asked = "deterministic" if request.deterministic else "soft-capped"
                return f"has no {asked} backward on compute capability 12.x"
            return f"takes head widths up to 128 there, not {width}" if width > 128 else None
        if major == 9 or width <= 128 or self._padded(request.head_dim, request.value_head_dim) == _MLA_WIDTHS:
            return None
        if width != 256:
            return f"takes head widths up to 128, 256, or 192 with v 128 on 10.x and 11.x, not {width}"
        fault = feature_fault(request, "windowed", "softcap")
        return f"{fault} at head width 256 on 10.x and 11.x" if fault else None

    def _import_fault(self) -> str | None:
        if importlib.util.find_spec(self.package) is None:
            return "not installed"
        try:  # flash-attn 2 has the same top package, and to look inside is to import it
            inside = importlib.util.find_spec(self.module)
        except (ImportError, OSError, RuntimeError) as error:
            if isinstance(error, ModuleNotFoundError) and str(error.name).startswith(self.package):
                inside = None
            else:
                return f"{self.package} does not import ({error})"
        return super()._import_fault() if inside is not None else "not installed"

    def _widths(self, q: torch.Tensor, v: torch.Tensor) -> tuple[int, int]:
        return self._padded(q.shape[-1], v.shape[-1])

    def _padded(self, head_dim: int, value_head_dim: int) -> tuple[int, int]:
        """MLA's widths as they are; else one width for both, a multiple of 8."""
        if (head_dim, value_head_dim) == _MLA_WIDTHS:
            return _MLA_WIDTHS
        width = round_up(max(head_dim, value_head_dim), 8)
        return width, width
