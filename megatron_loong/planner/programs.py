"""The ring loops as lists of operations: what every rank posts, computes and waits for, in the order of the code.

The only file of the cost model that reads `schedule` and `topology.tokens`; `attention/double_ring.py` runs the same
visits, hops and tiles. All ranks run one program; which tokens a visit brings follows from the owner.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Literal, NamedTuple

from megatron_loong.config import LoongConfig
from megatron_loong.planner.schedule import RingSchedule
from megatron_loong.planner.tiles import LEAST_ROWS_TO_CUT, Mask, Tile, held_segments, tiles
from megatron_loong.planner.visits import OWN, Visit
from megatron_loong.topology.tokens import TokenLayout, zigzag_or_contiguous


class Op(NamedTuple):
    """One step of a program.

    `post`: send to the next on `ring`, receive from the previous, both from here on. `wait`: until the hop posted
    as (ring, visit) by the previous one is here. `tile`: attention with the block of `visit`; `opening` and `rest`:
    with the parts of the own one. `fold`: add the gradients of a tile.
    """

    kind: Literal["post", "wait", "tile", "opening", "rest", "fold"]
    visit: Visit
    ring: str = ""


@functools.lru_cache(maxsize=256)
def forward_program(outer_ring_size: int, inner_ring_size: int) -> tuple[Op, ...]:
    """Operations of `ring_forward`.

    >>> [f"{op.kind} {op.ring}{tuple(op.visit)}" for op in forward_program(1, 2)]
    ['post inner(0, 1)', 'tile (0, 0)', 'wait inner(0, 1)', 'tile (0, 1)']
    """
    return _program(outer_ring_size, inner_ring_size, backward=False)


@functools.lru_cache(maxsize=256)
def backward_program(outer_ring_size: int, inner_ring_size: int, short: bool = False) -> tuple[Op, ...]:
    """Operations of `ring_backward`: KV goes round again, and the gradient of each block goes home behind it.

    `short`: of blocks that are not begun in an opening.
    """
    return _program(outer_ring_size, inner_ring_size, backward=True, short=short)


def _program(outer_ring_size: int, inner_ring_size: int, backward: bool, short: bool = False) -> tuple[Op, ...]:
    """The passage of any one rank: with one causal document in zigzag, all ranks do the same."""
    ring = outer_ring_size * inner_ring_size
    layout = zigzag_or_contiguous(LoongConfig(ring), (2 if short else LEAST_ROWS_TO_CUT) * ring)
    passage = RingSchedule(layout, layout, Mask(right=0), inner_ring_size).passage(0, backward)
    ops: list[Op] = []
    under_way: dict[Visit, str] = {}
    gradients: dict[Visit, list[Op]] = defaultdict(list)

    def fetch(visit: Visit) -> None:
        if visit in under_way:
            ops.append(Op("wait", visit, under_way.pop(visit)))

    def begin(step: int) -> None:
        hops = passage.hops.get(step, ())
        for hop in hops:
            if hop.send:
                fetch(hop.visit)
        for hop in hops:
            if not hop.send:
                ops.append(Op("post", hop.visit, hop.ring))
                under_way[hop.visit] = hop.ring

    begin(-1)
    if passage.opening:
        ops.append(Op("opening", OWN))
    for step, visit in enumerate(passage.visits):
        fetch(visit)
        begin(step)
        fetch(visit)  # posted just now
        ops.append(Op("rest" if passage.opening and visit == OWN else "tile", visit))
        if backward:
            ops += gradients.pop(visit, [])
            ops.append(Op("fold", visit))
        for hop in passage.return_hops.get(step, ()):
            # The block's gradient is complete on this rank before it is sent on; the neighbour's comes in exchange.
            if hop.send:
                ops.append(Op("post", visit, f"{hop.ring}_dkv"))
            else:
                gradients[hop.visit].append(Op("wait", visit, f"{hop.ring}_dkv"))
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
