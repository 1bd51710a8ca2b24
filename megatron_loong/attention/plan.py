"""All of a call but the tensors that it is differentiated in: `Call` for a rank, `RingPlan` for the ring's loops."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_loong.attention.block_store import Form
from megatron_loong.attention.expansion import Expansion, LatentHeads, PlainHeads
from megatron_loong.attention.head_exchange import HeadExchange
from megatron_loong.attention.heads import HeadShares
from megatron_loong.attention.merge import accumulator_dtype
from megatron_loong.attention.options import AttentionOptions
from megatron_loong.comm.groups import LoongGroups
from megatron_loong.comm.ring import Ring
from megatron_loong.kernels.common import on_device
from megatron_loong.kernels.interface import AttentionKernel, TileRules
from megatron_loong.layout.sharding import places_of
from megatron_loong.layout.tokens import TokenLayout
from megatron_loong.schedule.packs import Pack, packed
from megatron_loong.schedule.rotation import Moving, backward_moving, backward_rows
from megatron_loong.schedule.rows import original_rows
from megatron_loong.schedule.steps import Step, ring_schedule
from megatron_loong.schedule.tiles import Tile, squared


@dataclass(frozen=True, eq=False)
class Call:
    """One call of `attention_2d` on one rank, with every choice made."""

    groups: LoongGroups
    options: AttentionOptions
    layouts: tuple[TokenLayout, TokenLayout]
    """Of queries and of keys; the same object for self-attention."""
    kernel: AttentionKernel
    shares: HeadShares
    value_dim: int
    """Width of the output's heads."""
    rules: TileRules
    """The kernel's rules for every tile."""
    max_logits: torch.Tensor | None
    head_parts: int
    """Parts in which the heads go through (`HeadShares.part`)."""
    wire_dtype: torch.dtype
    """The communication dtype of gradients on the rings."""

    @property
    def head_rank(self) -> int:
        """This rank's place in its head group."""
        return self.groups.handle("head").rank

    @property
    def query_heads(self) -> slice:
        """The query heads of this rank after the all-to-all."""
        heads = self.shares.query[self.head_rank]
        return slice(heads.start, heads.stop)

    @property
    def parts(self) -> list[Call]:
        """A call for each part of the heads."""
        if self.head_parts == 1:
            return [self]
        shares = [self.shares.part(i, self.head_parts) for i in range(self.head_parts)]
        return [replace(self, shares=part, head_parts=1) for part in shares]

    @property
    def exchanges(self) -> tuple[HeadExchange, HeadExchange]:
        """The all-to-all over the head group for tokens of queries and for tokens of keys."""
        handle, ring_rank = self.groups.handle("head"), self.groups.ring_rank
        q_layout, kv_layout = self.layouts
        return HeadExchange(handle, q_layout, ring_rank), HeadExchange(handle, kv_layout, ring_rank)

    @functools.cached_property
    def rings(self) -> dict[str, Ring]:
        """`inner`, `outer`, `inner_dkv`, `outer_dkv`; none for an axis of size 1."""
        handles = [self.groups.handle(name) for name in ("inner", "outer", "inner_dkv", "outer_dkv")]
        return {handle.name: Ring(handle) for handle in handles if handle.process_group is not None}

    def kv_form(self, k: torch.Tensor, v: torch.Tensor) -> Form:
        """A row of the KV block of this rank's heads."""
        heads = len(self.shares.kv[self.head_rank])
        return Form.of(*(((x.shape[1], heads, x.shape[3]), x.dtype) for x in (k, v)))

    def rows_after_exchange(self, layout: TokenLayout) -> int:
        """Rows that this ring rank has of a layout after the all-to-all."""
        return sum(stop - start for start, stop in layout.ring_runs(self.groups.ring_rank))

    def moving_backward(self, q: Form, kv: Form) -> Moving:
        """Which side moves in the backward pass, given the forms of q and of k and v after the all-to-all."""
        if self.groups.config.ring_size == 1:
            return "kv"  # nothing does
        # The members of a ring have the same heads, so all of them choose alike. Another ring, with a head more or
        # less, may choose otherwise.
        ((batch, heads, head_dim), dtype), ((_, kv_heads, k_dim), _), ((_, _, v_dim), _) = *q.parts, *kv.parts
        rows = backward_rows(
            (batch * heads, head_dim, self.value_dim),
            (batch * kv_heads, k_dim, v_dim),
            dtype.itemsize,
            self.wire_dtype.itemsize,
            accumulator_dtype(dtype).itemsize,
        )
        return backward_moving(rows, *(layout.seq_len for layout in self.layouts))

    def plan(self, sink: torch.Tensor | None, up_weight: torch.Tensor | None, moving: Moving = "kv") -> RingPlan:
        """What the ring does; `moving` says which side moves in the backward pass."""
        config, heads, ring_rank = self.groups.config, self.query_heads, self.groups.ring_rank
        assert config.inner_ring_size is not None
        scheduled = functools.partial(
            ring_schedule,
            *self.layouts,
            self.options.mask,
            config.inner_ring_size,
            least_rows_to_cut=config.least_rows_to_cut,
        )
        # A sum that goes from rank to rank is rounded to the communication dtype at every hop. So narrow gradients go
        # straight to the first rank of each ring, which sums them in float32: each part is rounded once for each ring
        # that it crosses. Wide ones lose nothing on the way and take the chain, in which every rank sends one sum.
        narrow = self.wire_dtype.itemsize < torch.float32.itemsize
        dropout = self.rules.dropout and replace(self.rules.dropout, first_head=heads.start)
        expansion: Expansion = PlainHeads(self.shares.kv_of_query(self.head_rank))
        if up_weight is not None:
            expansion = LatentHeads(up_weight.detach()[heads], self.value_dim)
        return RingPlan(
            options=self.options,
            layouts=self.layouts,
            forward=scheduled().steps(ring_rank, backward=False),
            backward=scheduled(moving, direct_returns=narrow).steps(ring_rank, backward=True),
            ring_rank=ring_rank,
            rings=self.rings,
            kernel=self.kernel,
            rules=replace(self.rules, dropout=dropout),
            expansion=expansion,
            value_dim=self.value_dim,
            wire_dtype=self.wire_dtype,
            sink=None if sink is None else sink.detach()[heads],
            max_logits=None if self.max_logits is None else self.max_logits[heads],
        )


@dataclass(frozen=True, eq=False)
class RingPlan:
    """What the ring's loops need for one call, or one part of its heads."""

    options: AttentionOptions
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
    """The kernel's rules for every tile: all but window and places."""
    value_dim: int
    """Width of the output's heads."""
    wire_dtype: torch.dtype
    """The communication dtype of gradients, and of results for queries that moved; sums are in float32 or wider."""
    sink: torch.Tensor | None
    """[h] of this rank's heads."""
    max_logits: torch.Tensor | None
    """[h] float32 of this rank's heads, to be raised to the greatest score of each."""

    @property
    def one_call(self) -> bool:
        """Whether one call of the kernel, on all rows and keys, is the whole attention: nothing to merge or add up."""
        # More than one step is a ring; more than one tile a mask or a pack that no single window describes. And the
        # kernel must take the tile as it is, not cut in two (`squared`).
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
        """Tiles as calls that the kernel can serve; with `pack`, many short ones as one where the kernel takes that."""
        served = [x for tile in tiles for x in ([tile] if self.kernel.bottom_right else squared(tile))]
        return packed(served) if pack else list(served)

    def calls_of(self, step: Step, batch: int) -> list[Tile | Pack]:
        """The calls of a step."""
        # Rows that follow one another here must do so in their owner's block, where their gradient goes in one piece.
        return self.calls(step.tiles, self.packs(batch) and len(step.rows) == 1)

    def packs(self, batch: int) -> bool:
        """Whether the kernel takes many documents at once, and nothing depends on the places of a tile."""
        # Dropout and QK-clip are worked out tile by tile, each tile being of one document.
        independent = self.rules.dropout is None and self.max_logits is None
        return independent and batch == 1 and getattr(self.kernel, "packs", False)

    def rules_of(self, tile: Tile | Pack, step: Step, device: torch.device) -> TileRules:
        """The kernel's rules for one call."""
        rules = replace(self.rules, window=tile.window, boundaries=getattr(tile, "boundaries", None))
        if rules.dropout is None:
            return rules
        # Dropout is decided by where a query and a key stand in the sequence, whoever computes the pair.
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
