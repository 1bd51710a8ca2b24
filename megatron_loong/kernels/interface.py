"""What an attention kernel must offer the ring: one tile forward with its lse, one tile backward from global ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from megatron_loong.config import FULL


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
    deterministic: bool = False
    windowed: bool = False
    """Whether tiles come with windows other than FULL and CAUSAL."""
    softcap: bool = False
    dropout: bool = False
    varying: bool = False
    """Whether tiles come in ever new lengths: packed documents, or sequences of other lengths from call to call."""


@dataclass(frozen=True)
class Dropout:
    """Attention dropout whose mask depends on the place of a pair in the batch alone, not on who computes it when."""

    p: float
    """Probability to drop; what is kept is divided by 1 - p."""
    seed: int
    """The same in forward, backward and replay."""
    first_head: int = 0
    """Head 0 of the tile among all heads of the layer."""


@dataclass(frozen=True, eq=False)
class TileRules:
    """How the scores of one tile are made and masked."""

    softmax_scale: float
    window: tuple[int, int] = FULL
    """(left, right) as FlashAttention reads it: -1 is unbounded, the last row stands at the last key. CAUSAL tiles are
    square unless the kernel says `bottom_right`."""
    softcap: float = 0.0
    """Scores become softcap * tanh(scores / softcap), before the mask; 0: they stay."""
    dropout: Dropout | None = None
    q_places: torch.Tensor | None = None
    """int64 [s_q]: places of the rows in the whole sequence; given with dropout."""
    kv_places: torch.Tensor | None = None
    boundaries: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Of the documents packed into one tile of batch 1, in rows and in keys, each from 0: document i's rows see its
    keys alone, and `window` holds within each. Given only to kernels that say `packs`."""


@runtime_checkable
class AttentionKernel(Protocol):
    """One attention tile, forward and backward.

    Shapes: q, dout, out [b, s_q, h, d]; k, v [b, s_kv, g, d] with h a multiple of g (query head i reads KV head
    i // (h // g)); lse [b, s_q, h], natural log, float32 (float64 when q is float64). Inputs may be strided views.
    No row is ever masked as a whole, no length is ever 0. A kernel with the attribute `packs` True takes
    `TileRules.boundaries`: many short tiles are then one launch. One with `fp8_forward` True is never taken unasked;
    one with `plans` True takes about a second for every new shape, and is not taken unasked where lengths vary.
    """

    name: str
    bottom_right: bool
    """Whether it takes CAUSAL tiles with more keys than rows; else such a tile comes in two."""
    proven_on: str
    """Devices on which this repository's tests have run it, in words; 'nothing yet' where they have not."""

    def why_not(self, request: KernelRequest) -> str | None:
        """None when the kernel can serve the request here and now, else the reason in a few words."""
        ...

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: TileRules
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
        rules: TileRules,
        *,
        deterministic: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) of this tile, given `out` and `lse` of the whole row (all tiles merged).

        The three may be in q's dtype or wider; the caller adds them up in float32 (float64).
        """
        ...
