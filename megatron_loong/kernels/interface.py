"""What an attention kernel must offer the ring: one tile forward with its lse, one tile backward from global ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class KernelRequest:
    """What the ring will ask of a kernel; everything a kernel needs to say yes, or why not."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    """Width of q and k heads."""
    value_head_dim: int
    """Width of v heads."""
    query_heads: int
    """Query heads of one tile (after the all-to-all)."""
    kv_heads: int
    """KV heads of one tile (after the all-to-all)."""
    dropout_p: float = 0.0
    deterministic: bool = False


@runtime_checkable
class AttentionKernel(Protocol):
    """One attention tile, forward and backward.

    Shapes: q, dout, out [b, s_q, h, d]; k, v [b, s_kv, g, d] with h a multiple of g (query head i reads KV head
    i // (h // g)); lse [b, s_q, h], natural log, float32 (float64 when q is float64). Inputs may be strided views.
    `causal` is only asked for with s_q == s_kv. No row is ever masked as a whole, no length is ever 0.
    """

    name: str
    proven_on: str
    """Devices on which this repository's tests have run it, in words; 'nothing yet' where they have not."""

    def why_not(self, request: KernelRequest) -> str | None:
        """None when the kernel can serve the request here and now, else the reason in a few words."""
        ...

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of this tile alone; out in q's dtype."""
        ...

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
        """(dq, dk, dv) of this tile, given `out` and `lse` of the whole row (all tiles merged).

        The three may be in q's dtype or wider; the caller adds them up in float32 (float64).
        """
        ...
