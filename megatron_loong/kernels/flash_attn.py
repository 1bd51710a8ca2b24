"""flash-attn 2 (2.5 to 2.8) and flash-attn 3 (the `hopper` build), where the user has installed them.

Proven on nothing yet: no GPU was at hand. The tests run the adapters on a CPU against stand-ins with the signatures
of 2.5, 2.6, 2.8, of 3 as in 2.8.3, and of 3 as of 2026, whose numbers come from the reference kernel.
`FlashAttnPackage` is what these and flash-attn 4 (`flash_attn_4`) share.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import torch

from megatron_loong.config import CAUSAL, FULL, UNBOUNDED
from megatron_loong.kernels.common import (
    boundaries_on,
    call_by_name,
    feature_fault,
    flash_backward_fault,
    gpu_capability,
    gpu_fault,
    longest,
    lse_from_bhs,
    lse_to_bhs,
    operand,
    parameter_names,
    round_up,
)
from megatron_loong.kernels.interface import KernelRequest, TileRules

Arguments = dict[str | tuple[str, ...], Any]
"""As `common.call_by_name` takes them."""

_ABSENT = (
    "k_new", "v_new", "qv", "out", "out_", "kv_batch_idx", "leftpad_k", "page_table",
    "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "max_seqlen_q", "max_seqlen_k",
    "seqused_q", "seqused_k", "sequed_q", "sequed_k",
    "rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale",
)  # fmt: skip

#: Features of either package that are switched off; passed only where a version insists on the argument.
_NEUTRAL: dict[str, Any] = {
    "dropout_p": 0.0,
    "window_size": (-1, -1),
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
    "return_softmax": False,
    **dict.fromkeys(_ABSENT),
}


class FlashAttnPackage:
    """What the packages share: [b, s, h, d] tensors, lse [b, h, s] float32, native GQA, a deterministic flag."""

    name: str
    package: str
    module: str
    entries = ("_flash_attn_forward", "_flash_attn_backward")
    packed_entries = entries
    """The same for packed documents: [t, h, d] tensors, lse [h, t]."""
    unbounded: int | None = UNBOUNDED
    """The package's word for a side of a window without end."""
    asked_for: ClassVar[dict[str, Any]] = {}
    """What the forward must be told beside the tensors and the rules."""
    proven_on = "nothing yet"
    dtypes = "bfloat16, float16"
    bottom_right = True

    def _import(self) -> ModuleType:
        return importlib.import_module(self.module)

    def _import_fault(self) -> str | None:
        if importlib.util.find_spec(self.package) is None:
            return "not installed"
        try:
            module = self._import()
        except (ImportError, OSError, RuntimeError) as error:  # built for another torch or CUDA
            return f"installed but does not import ({(str(error).splitlines() or [type(error).__name__])[0]})"
        missing = [x for x in self.entries if not hasattr(module, x)]
        if missing:
            return f"this version of {self.module} lacks {', '.join(missing)}"
        if "deterministic" not in parameter_names(getattr(module, self.entries[1])):
            return f"this version of {self.module} is too old (its backward has no deterministic argument)"
        return None

    @property
    def packs(self) -> bool:
        """Whether many documents can be one launch, with lse [h, t]. To be asked of a kernel that serves."""
        module, wanted = self._import(), {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
        if self.packed_entries != self.entries:
            # flash-attn 2 before 2.7, which knows windows as one argument, may pad the packed lse.
            wanted.add("window_size_left")
        functions = [getattr(module, x) for x in self.packed_entries if hasattr(module, x)]
        return len(functions) == 2 and all(wanted <= set(parameter_names(x)) for x in functions)

    def _widths(self, q: torch.Tensor, v: torch.Tensor) -> tuple[int, int]:
        """Head widths that q and k, and v, are padded to."""
        width = round_up(max(q.shape[-1], v.shape[-1]), 8)
        return width, width

    def _lse_index(self, function: Callable[..., Any]) -> int:
        """Which of a forward's results is lse; how many there are says nothing."""
        return 1

    def _function(self, backward: bool, rules: TileRules) -> Callable[..., Any]:
        names = self.entries if rules.boundaries is None else self.packed_entries
        return getattr(self._import(), names[backward])

    def _said(self, function: Callable[..., Any], rules: TileRules, device: torch.device) -> Arguments:
        """`TileRules` in the words of one version's function; a feature that is off is not mentioned."""
        said: Arguments = {
            "softmax_scale": rules.softmax_scale,
            ("causal", "is_causal"): rules.window == CAUSAL,
        }
        if rules.window not in (FULL, CAUSAL):
            window = tuple(self.unbounded if x == UNBOUNDED else x for x in rules.window)
            if "window_size" in parameter_names(function):
                said["window_size"] = window
            else:
                said["window_size_left"], said["window_size_right"] = window
        if rules.softcap:
            said["softcap"] = rules.softcap
        for side, boundaries in zip("qk", rules.boundaries or (), strict=False):
            said[f"cu_seqlens_{side}"] = boundaries_on(device, boundaries)
            said[f"max_seqlen_{side}"] = longest(boundaries)
        return said

    def _operands(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: TileRules) -> Arguments:
        """What the forward is given of q, k and v."""
        width, value_width = self._widths(q, v)
        return {"q": operand(q, width, rules), "k": operand(k, width, rules), "v": operand(v, value_width, rules)}

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: TileRules
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [b, s_q, h, dv] in q's dtype, lse [b, s_q, h] float32)."""
        function = self._function(False, rules)
        results = call_by_name(
            function,
            {**self._operands(q, k, v, rules), **self.asked_for, **self._said(function, rules, q.device)},
            _NEUTRAL,
        )
        out, lse = results[0], results[self._lse_index(function)]
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
        width, value_width = self._widths(q, v)
        operands = {
            "dout": operand(dout.to(q.dtype), value_width, rules),
            "q": operand(q, width, rules),
            "k": operand(k, width, rules),
            "v": operand(v, value_width, rules),
            "out": operand(out.to(q.dtype), value_width, rules),
        }
        # The kernels write into these; what they return differs between versions.
        grads = {f"d{x}": torch.empty(operands[x].shape, dtype=q.dtype, device=q.device) for x in "qkv"}
        lse = lse_to_bhs(lse)
        function = self._function(True, rules)
        call_by_name(
            function,
            {
                **operands,
                **grads,
                ("softmax_lse", "lse"): lse if rules.boundaries is None else lse.squeeze(0),
                **self._said(function, rules, q.device),
                "deterministic": deterministic,
            },
            _NEUTRAL,
        )
        dq, dk, dv = (x if rules.boundaries is None else x.unsqueeze(0) for x in grads.values())
        return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


class FlashAttn2Kernel(FlashAttnPackage):
    """`AttentionKernel` on flash-attn 2.5 to 2.8. Shapes: `interface.AttentionKernel`. Gradients in q's dtype."""

    name = "flash_attn_2"
    package = "flash_attn"
    module = "flash_attn.flash_attn_interface"
    packed_entries = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")
    devices = "CUDA, compute capability 8.0 or newer"
    head_widths = "up to 256 (192 on sm_86, 89, 12x); k and v of different widths cost a padded copy"

    def why_not(self, request: KernelRequest) -> str | None:
        """None when it can serve the request, else the reason. Imports the package only for a request on CUDA."""
        return (
            gpu_fault(request, max_width=256)
            or flash_backward_fault(request)
            or feature_fault(request, "dropout")
            or self._import_fault()
            or self._softcap_fault(request)
        )

    def _lse_index(self, function: Callable[..., Any]) -> int:
        # Before 2.7, known by its windows, the inputs came back in between: (out, q, k, v, out_padded, lse, ...).
        return 1 if "window_size_left" in parameter_names(function) else 5

    def _softcap_fault(self, request: KernelRequest) -> str | None:
        if request.softcap and "softcap" not in parameter_names(self._import()._flash_attn_backward):
            return f"this version of {self.module} has no soft cap"
        return None


class FlashAttn3Kernel(FlashAttnPackage):
    """`AttentionKernel` on flash-attn 3 (module `flash_attn_interface`). Shapes: `interface.AttentionKernel`."""

    name = "flash_attn_3"
    package = "flash_attn_interface"
    module = "flash_attn_interface"
    devices = "CUDA, compute capability 9.0 (Hopper)"
    head_widths = "up to 256 (192 when deterministic); k and v of different widths cost a padded copy"

    def why_not(self, request: KernelRequest) -> str | None:
        """None when it can serve the request, else the reason. Imports the package only for a request on CUDA."""
        fault = gpu_fault(request, max_width=256) or feature_fault(request, "dropout")
        if fault:
            return fault
        capability, width = gpu_capability(), max(request.head_dim, request.value_head_dim)
        if capability != (9, 0):
            return "made for compute capability 9.0 (Hopper)"
        if request.deterministic and width > 192:
            return f"its deterministic backward takes head widths up to 192, not {width}"
        fault = self._import_fault()
        if fault is None and "pack_gqa" not in parameter_names(self._import()._flash_attn_forward):
            fault = f"this version of {self.module} is a beta from before 2025"
        return fault
