"""Attention whose forward runs in fp8 (e4m3), by flash-attn 3 or 4 where the user has installed one of them.

    q, k, v (bfloat16) -> amax per batch and KV head -> e4m3 and descales -> out (bfloat16), lse (float32) of the tile
    dout, q, k, v, out, lse (bfloat16) ---------------------------------- the package's own backward -> dq, dk, dv

Every tile is rounded by scales of its own ("current scaling"): nothing is kept between calls, and the host waits for
nothing. Merging tiles by their lse is as exact as before. Neither package has a backward in fp8, so gradients are those
of the bfloat16 kernel, as TransformerEngine computes them with NVTE_FP8_DPA_BWD=0. q is rounded again for each block of
keys that comes along the ring.

Proven on nothing yet: no GPU was at hand. The tests run it on a CPU against a stand-in that rounds to e4m3 and computes
in float32. Hopper's tensor cores add products of fp8 up in fewer bits than float32 has (DeepSeek-V3, arXiv 2412.19437,
section 3.3.2), which no stand-in shows; `benchmarks.gpu.fp8` measures the error by the number of keys.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

import torch

from megatron_loong.kernels.common import gpu_capability, operand, parameter_names, round_up, widen
from megatron_loong.kernels.flash_attn import Arguments, FlashAttn3Kernel, FlashAttnPackage
from megatron_loong.kernels.flash_attn_4 import FlashAttn4Kernel
from megatron_loong.kernels.interface import KernelRequest, TileRules

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
"""448."""
_WIDTH_MULTIPLE = 16
"""Of head widths: 16 bytes are read at a time."""


@dataclass(frozen=True)
class Rounded:
    """A tensor in e4m3, and what its numbers are to be multiplied by."""

    values: torch.Tensor
    """[b, s, h, d] float8_e4m3fn."""
    descale: torch.Tensor
    """[b, g] float32, for groups of h // g heads."""


def rounded(x: torch.Tensor, kv_heads: int) -> Rounded:
    """x [b, s, h, d] in e4m3, its greatest number in each batch and group of h // kv_heads heads at 448.

    Heads of zeros stay zeros; a number that is not finite makes its group NaN, so that it is seen.

    >>> x = torch.tensor([[[[1.0, -2.0], [100.0, 50.0]]]])
    >>> one = rounded(x, kv_heads=2)
    >>> (one.descale * E4M3_MAX).tolist(), one.values.float().tolist()
    ([[2.0, 100.0]], [[[[224.0, -448.0], [448.0, 224.0]]]])
    """
    b, _, h, _ = x.shape
    amax = torch.linalg.vector_norm(x, torch.inf, dim=(1, 3), dtype=torch.float32)
    amax = amax.view(b, kv_heads, h // kv_heads).amax(-1)
    descale = (amax / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    per_head = descale[:, :, None].expand(b, kv_heads, h // kv_heads).reshape(b, 1, h, 1)
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    torch.div(x, per_head, out=values)  # in float32, and in one pass over memory
    return Rounded(values, descale)


class Fp8Forward(FlashAttnPackage):
    """Before an adapter in the order of bases: its forward in fp8, its backward and its limits as they are."""

    fp8_forward = True
    dtypes = "bfloat16, forward in fp8"

    def why_not(self, request: KernelRequest) -> str | None:
        """None when it can serve the request, else the reason. Imports the package only for a request on CUDA."""
        fault = super().why_not(request)  # type: ignore[misc]
        if fault:
            return fault
        if request.dtype != torch.bfloat16:
            return "its forward in fp8 gives bfloat16, not float16"
        return self._fp8_fault()

    def _fp8_fault(self) -> str | None:
        names = parameter_names(getattr(self._import(), self.entries[0]))
        if not {"q_descale", "k_descale", "v_descale"} <= set(names):
            return f"this version of {self.module} takes no scales for fp8"
        return None

    def _operands(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: TileRules) -> Arguments:
        width, value_width = (round_up(x, _WIDTH_MULTIPLE) for x in self._widths(q, v))
        documents = q.shape[0] if rules.boundaries is None else len(rules.boundaries[0]) - 1
        said: Arguments = {}
        for name, x, to in (("q", q, width), ("k", k, width), ("v", v, value_width)):
            one = rounded(widen(x, to), k.shape[2])
            said[name] = operand(one.values, to, rules)
            # Packed documents are the package's batch, and share the scales of their tile.
            said[f"{name}_descale"] = one.descale.expand(documents, -1).contiguous()
        return said


class FlashAttn3Fp8Kernel(Fp8Forward, FlashAttn3Kernel):
    """`AttentionKernel` on flash-attn 3 with its fp8 forward. Shapes: `interface.AttentionKernel`."""

    name = "flash_attn_3_fp8"

    def _fp8_fault(self) -> str | None:
        if importlib.util.find_spec("flash_attn_config") is not None:  # from 2026 on
            config = getattr(importlib.import_module("flash_attn_config"), "CONFIG", {})
            if config.get("build_flags", {}).get("FLASHATTENTION_DISABLE_FP8"):
                return f"{self.module} was built without fp8 (FLASH_ATTENTION_DISABLE_FP8)"
        return super()._fp8_fault()


class FlashAttn4Fp8Kernel(Fp8Forward, FlashAttn4Kernel):
    """`AttentionKernel` on flash-attn 4 with its fp8 forward. Shapes: `interface.AttentionKernel`."""

    name = "flash_attn_4_fp8"
    devices = "CUDA, compute capability 10.x"

    def _fp8_fault(self) -> str | None:
        capability = gpu_capability()
        if capability is None or capability[0] != 10:
            return "its forward in fp8 is made for compute capability 10.x"
        return super()._fp8_fault()
