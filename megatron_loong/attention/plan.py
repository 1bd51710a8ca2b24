"""Everything the ring's loops need that is not q, k or v: the schedule, who talks to whom, and the kernel's rules."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_loong.attention.expansion import Expansion
from megatron_loong.comm.ring import Ring
from megatron_loong.kernels.common import on_device
from megatron_loong.kernels.interface import AttentionKernel, TileRules
from megatron_loong.schedule.packs import Pack, packed
from megatron_loong.schedule.rotation import Moving
from megatron_loong.schedule.rows import original_rows
from megatron_loong.schedule.steps import Step
from megatron_loong.schedule.tiles import Tile, squared
from megatron_loong.sequence.sharding import places_of
from megatron_loong.topology.tokens import TokenLayout


@dataclass(frozen=True, eq=False)
class RingPlan:
    """One attention call of one ring rank."""

    layouts: tuple[TokenLayout, TokenLayout]
    """Of queries and of keys."""
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    """Here the other kind of block may move."""
    ring_rank: int
    rings: dict[str, Ring]
    """`inner`, `outer`, `inner_dkv`, `outer_dkv`; none for an axis of size 1."""
    kernel: AttentionKernel
    expansion: Expansion
    rules: TileRules
    """What holds for every tile: all but window and places."""
    value_dim: int
    """Width of the output's heads."""
    wire_dtype: torch.dtype
    """What gradients, and results of queries that moved, travel in; they are summed in float32 or wider."""
    deterministic: bool = False
    sink: torch.Tensor | None = None
    """[h] of this rank's heads."""
    max_logits: torch.Tensor | None = None
    """[h] float32 of this rank's heads, to be raised to the greatest score of each."""

    @property
    def one_call(self) -> bool:
        """Whether one call of the kernel, on all rows and keys, is the whole attention: nothing to merge or add up."""
        if len(self.forward) != 1:
            return False
        tiles = self.forward[0].tiles
        whole = [slice(0, layout.seq_len) for layout in self.layouts]
        return len(tiles) == 1 and [tiles[0].q, tiles[0].kv] == whole and len(self.calls(tiles)) == 1

    @staticmethod
    def moving(steps: Sequence[Step]) -> list[Moving]:
        """The kinds of blocks that go round."""
        return list(dict.fromkeys(step.moving for step in steps))

    def calls(self, tiles: Sequence[Tile], pack: bool = False) -> list[Tile | Pack]:
        """Tiles as calls that the kernel can serve; with `pack`, many short ones as one where it takes that."""
        served = [x for tile in tiles for x in ([tile] if self.kernel.bottom_right else squared(tile))]
        return packed(served) if pack else list(served)

    def calls_of(self, step: Step, batch: int) -> list[Tile | Pack]:
        """The calls of a step."""
        # Rows that follow one another here must do so in their owner's block, where their gradient goes in one piece.
        return self.calls(step.tiles, self.packs(batch) and len(step.rows) == 1)

    def packs(self, batch: int) -> bool:
        """Whether the kernel takes many documents at once, and nothing is asked that depends on a tile's places."""
        apart = self.rules.dropout is None and self.max_logits is None
        return apart and batch == 1 and getattr(self.kernel, "packs", False)

    def rules_of(self, tile: Tile | Pack, step: Step, device: torch.device) -> TileRules:
        """The kernel's rules for one call."""
        rules = replace(self.rules, window=tile.window, boundaries=getattr(tile, "boundaries", None))
        if rules.dropout is None:
            return rules
        q, kv = self.layouts
        if step.moving == "kv":
            q_rank, q_rows = self.ring_rank, tile.q
            kv_rank, kv_rows = step.owner, slice(*original_rows(step.rows, tile.kv))
        else:
            q_rank, q_rows = step.owner, slice(*original_rows(step.rows, tile.q))
            kv_rank, kv_rows = self.ring_rank, tile.kv
        q_places = _all_places(q, q_rank, device)[q_rows]
        kv_places = _all_places(kv, kv_rank, device)[kv_rows]
        return replace(rules, q_places=q_places, kv_places=kv_places)


@functools.lru_cache(maxsize=256)
def _all_places(layout: TokenLayout, ring_rank: int, device: torch.device) -> torch.Tensor:
    """Places in their documents of all that a ring rank holds; copied to the device once for each layout."""
    return on_device(places_of(layout.ring_runs(ring_rank)), device)


def forget_places() -> None:
    """Empty what `_all_places` remembers."""
    _all_places.cache_clear()
