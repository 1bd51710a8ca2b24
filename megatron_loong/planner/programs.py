"""The ring loops as lists of operations: what every rank posts, computes and waits for, in the order of the code.

The only file of the cost model that reads `schedule` and `layout.tokens`; `attention/double_ring.py` runs the same
steps. All ranks run one program; which tokens a block has follows from its owner.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Literal, NamedTuple

from megatron_loong.config import LoongConfig
from megatron_loong.layout.tokens import TokenLayout, zigzag_or_contiguous
from megatron_loong.schedule.routes import OWN, Place, forward_order, own_last_order
from megatron_loong.schedule.steps import ring_schedule
from megatron_loong.schedule.tiles import Mask, Tile, held_segments, tiles


class Op(NamedTuple):
    """One step of a program.

    `post`: send to the rank `shift` places further on `ring` and receive from the one as far back, both from here on.
    `wait`: until the hop posted as (ring, place) by its sender is here. `tile`: attention with the block for which a
    rank stands at `place`; `opening` and `rest`: with the parts of the own one. `fold`: add the gradients of a tile.
    """

    kind: Literal["post", "wait", "tile", "opening", "rest", "fold"]
    place: Place
    ring: str = ""
    shift: int = 1
    """How many places further on the ring than the sender the receiver of a hop stands."""


@functools.lru_cache(maxsize=256)
def forward_program(outer_ring_size: int, inner_ring_size: int) -> tuple[Op, ...]:
    """Operations of `ring_forward`.

    >>> [f"{op.kind} {op.ring}{tuple(op.place)}" for op in forward_program(1, 2)]
    ['post inner(0, 1)', 'tile (0, 0)', 'wait inner(0, 1)', 'tile (0, 1)']
    """
    return _program(outer_ring_size, inner_ring_size, backward=False)


@functools.lru_cache(maxsize=256)
def backward_program(
    outer_ring_size: int, inner_ring_size: int, short: bool = False, direct_returns: bool = False
) -> tuple[Op, ...]:
    """Operations of `ring_backward`: KV goes round again, and the gradient of each block returns behind it.

    `short`: of blocks that are not begun in an opening. `direct_returns`: as `ring_schedule` has it.

    >>> [(op.kind, op.shift) for op in backward_program(1, 4, direct_returns=True) if op.ring == "inner_dkv"][:4]
    [('post', 3), ('wait', 3), ('post', 2), ('wait', 2)]
    """
    return _program(outer_ring_size, inner_ring_size, True, short, direct_returns)


def _program(
    outer_ring_size: int, inner_ring_size: int, backward: bool, short: bool = False, direct_returns: bool = False
) -> tuple[Op, ...]:
    """The steps of any one rank: with one causal document in zigzag, all ranks do the same."""
    ring = outer_ring_size * inner_ring_size
    layout = zigzag_or_contiguous(LoongConfig(ring), (2 if short else LoongConfig.least_rows_to_cut) * ring)
    schedule = ring_schedule(layout, layout, Mask(right=0), inner_ring_size, direct_returns=direct_returns)
    steps, sizes = schedule.steps(0, backward), {"inner": inner_ring_size, "outer": outer_ring_size}
    order = own_last_order if backward else forward_order
    place_of = {place.owner(0, ring, inner_ring_size): place for place in order(outer_ring_size, inner_ring_size)}
    ops: list[Op] = []
    under_way: dict[Place, str] = {}
    arriving: dict[int, list[Op]] = defaultdict(list)

    def fetch(place: Place) -> None:
        if place in under_way:
            ops.append(Op("wait", place, under_way.pop(place)))

    begun = False
    for index, step in enumerate(steps):
        place = place_of[step.owner]
        fetch(place)
        for hop in step.sends:
            fetch(place_of[hop.owner])
        for hop in step.receives:
            ops.append(Op("post", place_of[hop.owner], hop.ring))
            under_way[place_of[hop.owner]] = hop.ring
        if index + len(place_of) < len(steps):  # the step before the first block
            begun = bool(step.tiles)
            if begun:
                ops.append(Op("opening", OWN))
            continue
        fetch(place)  # posted just now
        ops.append(Op("rest" if begun and place == OWN else "tile", place))
        if backward:
            ops += arriving.pop(index, [])
            ops.append(Op("fold", place))
        # A block's gradient is complete on this rank before it is sent on; the neighbour's comes in exchange.
        for hop in step.return_sends:
            ops.append(Op("post", place, f"{hop.ring}_dkv", hop.peer))
        for hop in step.return_receives:
            arriving[hop.due].append(Op("wait", place, f"{hop.ring}_dkv", -hop.peer % sizes[hop.ring]))
    return tuple(ops)


@functools.lru_cache(maxsize=256)
def _layout(context_parallel_size: int, head_parallel_size: int, sequence_layout: str, seq_len: int) -> TokenLayout:
    """Who holds what depends on neither the inner ring nor the placement."""
    config = LoongConfig(context_parallel_size, head_parallel_size, sequence_layout=sequence_layout)
    return zigzag_or_contiguous(config, seq_len)


@functools.lru_cache(maxsize=4096)
def _tiles(layout_key: tuple[int, int, str, int], mask: Mask, ring_rank: int, owner: int) -> list[Tile]:
    layout = _layout(*layout_key)
    q_held, kv_held = (held_segments(layout, rank) for rank in (ring_rank, owner))
    return tiles(layout, layout, q_held, kv_held, mask)


class Tokens:
    """Tiles and block lengths of one layout, looked up by ring rank and owner."""

    def __init__(self, config: LoongConfig, seq_len: int, causal: bool) -> None:
        self._key = (config.context_parallel_size, config.head_parallel_size, config.sequence_layout, seq_len)
        self.layout = _layout(*self._key)
        self.mask = Mask(right=0) if causal else Mask()
        self.balanced = config.sequence_layout == "zigzag" or not causal
        """Whether all tiles of a kind (own block, before it, after it) cost the same."""

    def block_tokens(self, ring_rank: int) -> int:
        """Tokens of the block that a ring rank owns."""
        return sum(stop - start for start, stop in self.layout.ring_runs(ring_rank))

    def kind(self, ring_rank: int, owner: int) -> tuple[int, int]:
        """(ring rank, owner) of a pair whose tiles cost what those of this pair cost.

        In a balanced layout every tile before the diagonal costs the same, and so does every one after it.
        """
        if not self.balanced:
            return ring_rank, owner
        return (0, 0) if owner == ring_rank else (0, 1) if owner > ring_rank else (1, 0)

    def tiles(self, ring_rank: int, owner: int) -> list[Tile]:
        """Tiles that `ring_rank` computes with the block of `owner`."""
        return _tiles(self._key, self.mask, ring_rank, owner)
