"""The ring loops as lists of operations: what every rank posts, computes and waits for, in the order of the code.

The only file of the cost model that reads `schedule` and `topology.tokens`; `attention/double_ring.py` runs the same
visits, hops and tiles. All ranks run one program; which tokens a visit brings follows from the owner.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple

from megatron_loong.config import LoongConfig
from megatron_loong.planner.schedule import (
    Tile,
    Visit,
    backward_visits,
    forward_visits,
    gradient_sources,
    tiles,
)
from megatron_loong.topology.tokens import TokenLayout, zigzag_or_contiguous


class Op(NamedTuple):
    """One step of a program.

    `post`: send to the next on `ring`, receive from the previous, both from here on. `wait`: until the hop posted
    as (ring, visit) by the previous one is here. `tile`: attention with the block of `visit`. `fold`: add the
    gradients of a tile.
    """

    kind: Literal["post", "wait", "tile", "fold"]
    visit: Visit
    ring: str = ""


@functools.lru_cache(maxsize=256)
def forward_program(outer_ring_size: int, inner_ring_size: int) -> tuple[Op, ...]:
    """Operations of `ring_forward`.

    >>> [f"{op.kind} {op.ring}{tuple(op.visit)}" for op in forward_program(1, 2)]
    ['post inner(0, 1)', 'tile (0, 0)', 'wait inner(0, 1)', 'tile (0, 1)']
    """
    visits = forward_visits(outer_ring_size, inner_ring_size)
    ops: list[Op] = []
    for visit, arrivals in zip(visits, _arrivals(visits, outer_ring_size), strict=True):
        ops += [*arrivals, Op("tile", visit)]
    return tuple(ops)


@functools.lru_cache(maxsize=256)
def backward_program(outer_ring_size: int, inner_ring_size: int) -> tuple[Op, ...]:
    """Operations of `ring_backward`: KV goes round again, and the gradient of each block goes home behind it."""
    visits = backward_visits(outer_ring_size, inner_ring_size)
    ops: list[Op] = []
    for visit, arrivals in zip(visits, _arrivals(visits, outer_ring_size), strict=True):
        ops += [*arrivals, Op("tile", visit)]
        for source in gradient_sources(visit, outer_ring_size, inner_ring_size):
            ops.append(Op("wait", source, _gradient_ring(source)))
        if visit != visits[-1]:
            # The block's gradient is complete on this rank before it is sent on.
            ops += [Op("fold", visit), Op("post", visit, _gradient_ring(visit))]
        else:
            ops.append(Op("fold", visit))
    return tuple(ops)


def _gradient_ring(visit: Visit) -> str:
    return "outer_dkv" if visit.inner_shift == 0 else "inner_dkv"


def _arrivals(visits: list[Visit], outer_ring_size: int) -> Iterator[list[Op]]:
    """Posts and waits of `Circulation` before each tile: the next inner hop, and outer hops a whole round ahead."""
    here, posted = {Visit(0, 0)}, set()

    def post(visit: Visit) -> list[Op]:
        source = visit.source()
        if source is None or visit in posted:
            return []
        posted.add(visit)
        return [*fetch(source), Op("post", visit, "inner" if visit.inner_shift else "outer")]

    def fetch(visit: Visit) -> list[Op]:
        if visit in here:
            return []
        ops = [*post(visit), Op("wait", visit, "inner" if visit.inner_shift else "outer")]
        here.add(visit)
        return ops + post_outer_after(visit)

    def post_outer_after(visit: Visit) -> list[Op]:
        following = Visit(visit.outer_shift + 1, 0)
        return post(following) if visit.inner_shift == 0 and following.outer_shift < outer_ring_size else []

    start = post_outer_after(Visit(0, 0))
    for index, visit in enumerate(visits):
        ops = start + fetch(visit)
        start = []
        if index + 1 < len(visits):
            ops += post(visits[index + 1])
        yield ops


@functools.lru_cache(maxsize=256)
def _layout(context_parallel_size: int, head_parallel_size: int, sequence_layout: str, seq_len: int) -> TokenLayout:
    """Who holds what depends on neither the inner ring nor the placement."""
    config = LoongConfig(context_parallel_size, head_parallel_size, sequence_layout=sequence_layout)
    return zigzag_or_contiguous(config, seq_len)


class Tokens:
    """Tiles and block lengths of one layout, looked up by ring rank and owner."""

    def __init__(self, config: LoongConfig, seq_len: int, causal: bool) -> None:
        self.layout = _layout(config.context_parallel_size, config.head_parallel_size, config.sequence_layout, seq_len)
        self.causal = causal
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
        q_runs, kv_runs = (list(self.layout.ring_runs(rank)) for rank in (ring_rank, owner))
        return tiles(q_runs, kv_runs, self.causal)
