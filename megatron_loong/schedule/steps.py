"""What every ring rank does, step by step: whose block it attends to, and the hops that it posts.

Worked out before any tensor moves, as plain data: the ring runs these steps, and the simulator prices them.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from megatron_loong.config import LoongConfig
from megatron_loong.layout.tokens import TokenLayout
from megatron_loong.schedule.rotation import Moving
from megatron_loong.schedule.routes import OWN, Edge, Place, Routes
from megatron_loong.schedule.rows import Rows, original_rows, row_count, slice_within
from megatron_loong.schedule.tiles import Mask, Tile, halved


class Hop(NamedTuple):
    """One end of a message: rows of `owner`'s block, or of the results for it, to or from `peer`."""

    ring: Literal["inner", "outer"]
    peer: int
    """Coordinate of the other end on that ring."""
    moving: Moving
    """What kind of block it is."""
    owner: int
    rows: Rows
    """Rows of the owner's block that travel."""
    due: int
    """Index of the step by which it must have arrived: the sender waits for it then. The receiver waits for results
    then, and for a block when it first uses it."""

    @property
    def row_count(self) -> int:
        """Number of rows that travel."""
        return row_count(self.rows)


@dataclass(frozen=True)
class Step:
    """One step of one rank. Hops of blocks are posted at its beginning, and results returned at its end."""

    moving: Moving
    owner: int
    """Ring rank whose block is attended to."""
    rows: Rows = ()
    """Rows of that block that are held here; empty if the rank does not need it, and is passed over."""
    tiles: tuple[Tile, ...] = ()
    """Attention calls. Slices of the side that moves count within `rows`."""
    sends: tuple[Hop, ...] = ()
    receives: tuple[Hop, ...] = ()
    return_rows: Rows = ()
    """Rows of the owner's block for which this rank, or those before it, return results."""
    return_sends: tuple[Hop, ...] = ()
    return_receives: tuple[Hop, ...] = ()
    last_use: tuple[int, ...] = ()
    """Owners of the blocks of this kind that may be dropped after this step."""

    def return_place(self, rows: slice) -> slice:
        """Where `rows` of the block that is here stand among its `return_rows`."""
        return slice_within(self.return_rows, original_rows(self.rows, rows))


@dataclass(frozen=True, eq=False)
class Schedule:
    """The steps of every rank of a ring, for one layout and mask. Every layer of a model uses the same."""

    routes: tuple[Routes, ...]
    """For each kind of block that moves; together they compute every pair of ranks once."""
    _known: dict[tuple[int, bool], tuple[Step, ...]] = field(default_factory=dict, repr=False)

    def steps(self, ring_rank: int, backward: bool) -> tuple[Step, ...]:
        """What `ring_rank` does in the forward or in the backward pass, in order."""
        if (ring_rank, backward) not in self._known:
            ahead = self.routes[0].ring_size > 1 and any(routes.own_last(backward) for routes in self.routes)
            found = [_steps(routes, ring_rank, backward, ahead) for routes in self.routes]
            self._known[ring_rank, backward] = found[0] if len(found) == 1 else _interleaved(*found)
        return self._known[ring_rank, backward]


@functools.lru_cache(maxsize=32)
def ring_schedule(
    q: TokenLayout,
    kv: TokenLayout,
    mask: Mask,
    inner_ring_size: int,
    moving: Moving = "kv",
    direct_returns: bool = False,
    least_rows_to_cut: int = LoongConfig.least_rows_to_cut,
) -> Schedule:
    """The schedule in which `moving` blocks go round; remembered, because all layers of a model ask for the same.

    For a causal document in contiguous chunks both kinds move, whatever `moving` says: the first ranks have few keys to
    attend to, so pairs of ranks more than half a ring apart are computed by the earlier rank, which is sent the
    queries. Every rank then computes about half of the ring's blocks (LightSeq, DISTFLASHATTN, arXiv 2310.03294,
    section 3.2).
    """
    # Queries of ring rank i see the keys of ranks 0 to i, so the last rank would have all blocks to attend to, and the
    # first one. Where the rank of the queries is more than half a ring after that of the keys, the latter computes.
    contiguous = all(len(q.ring_runs(rank)) <= 1 for rank in range(q.ring_size))
    if contiguous and q is kv and q.ring_size > 2 and mask == Mask(right=0) and len(q.documents) == 2:
        near = Routes(q, kv, mask, inner_ring_size, "kv", direct_returns, least_rows_to_cut, "near")
        # With caches of its own: `replace` would share them.
        return Schedule((near, replace(near, moving="q", share="far", _known_needs={}, _known_edges={})))
    return Schedule((Routes(q, kv, mask, inner_ring_size, moving, direct_returns, least_rows_to_cut),))


def _steps(routes: Routes, ring_rank: int, backward: bool, ahead: bool) -> tuple[Step, ...]:
    """The steps of a rank for blocks of one kind; `ahead`: with one more before the first block.

    It posts the first hops. Backward, about half of the own block's tiles are computed in it, and hide them; forward,
    where queries move, nothing does.
    """
    first = int(ahead)
    hops: defaultdict[int, defaultdict[str, list[Hop]]] = defaultdict(lambda: defaultdict(list))
    last_use: defaultdict[int, list[int]] = defaultdict(list)

    def add(kind: str, edge: Edge, owner: int, other: Place) -> None:
        # A hop changes one coordinate. Both of its ends find the same message, seen from either side, because both read
        # it from the owner's edges, with the same steps to post it and to have it.
        ring = "outer" if edge.sender.inner == edge.receiver.inner else "inner"
        peer = divmod(routes.place_rank(other, owner), routes.inner_ring_size)[ring == "inner"]
        hop = Hop(ring, peer, routes.moving, owner, edge.rows, edge.due + first)
        hops[edge.post + first][kind].append(hop)

    # Seen from this rank, step `index` is that of the owner for whose block this rank stands at `place`. Of the hops of
    # that block, those that begin or end at `place` are this rank's.
    blocks: list[Step] = []
    # Every rank visits the places in the same order, so the blocks that ranks attend to in one step are all different.
    for index, place in enumerate(routes.order(backward)):
        owner = place.owner(ring_rank, routes.ring_size, routes.inner_ring_size)
        there, back = routes.edges(owner, backward)
        rows = return_rows = routes.block_rows(owner) if place == OWN else ()
        used = index  # the last step in which the block is read here: attended to, or still to be passed on
        for edge in there:
            if edge.sender == place:
                used = max(used, edge.post)
                add("sends", edge, owner, edge.receiver)
            elif edge.receiver == place:
                rows = edge.rows
                add("receives", edge, owner, edge.sender)
        for edge in back if routes.own_last(backward) else ():
            if edge.sender == place:
                return_rows = edge.rows
                add("return_sends", edge, owner, edge.receiver)
            elif edge.receiver == place:
                add("return_receives", edge, owner, edge.sender)
        # A block is dropped after its last reader here: a tile, or a hop, whose message keeps the buffer from then on.
        last_use[used + first].append(owner)
        tiles = [_placed(tile, routes.moving, rows) for tile in routes.tiles(ring_rank, owner)] if rows else []
        blocks.append(Step(routes.moving, owner, rows, tuple(tiles), return_rows=return_rows))
    if ahead:
        # The own block is attended to twice: first about half of its tiles, while the first hops travel, and the rest
        # in its usual step.
        own = blocks[-1] if routes.own_last(backward) else blocks[0]
        cut = backward and routes.ring_size > 1
        begun, rest = halved(own.tiles, routes.least_rows_to_cut) if cut else ((), own.tiles)
        blocks = [replace(own, tiles=begun), *blocks]
        blocks[-1 if routes.own_last(backward) else 1] = replace(own, tiles=rest)
    return tuple(
        replace(step, last_use=tuple(last_use[i]), **{kind: tuple(x) for kind, x in hops[i].items()})
        for i, step in enumerate(blocks)
    )


def _placed(tile: Tile, moving: Moving, rows: Rows) -> Tile:
    """A tile of a whole block as one of those of its rows that are here."""
    run: slice = getattr(tile, moving)
    return tile._replace(**{moving: slice_within(rows, (run.start, run.stop))})


def _interleaved(first: Iterable[Step], second: Iterable[Step]) -> tuple[Step, ...]:
    """Steps of two kinds of blocks in turn. The hops of both are posted before the tiles of either."""

    def turn(hops: Iterable[Hop], offset: int) -> tuple[Hop, ...]:
        return tuple(hop._replace(due=2 * hop.due + offset) for hop in hops)

    # Step i of the two lists becomes steps 2i and 2i + 1, the first of which posts the blocks of both kinds: each then
    # has the tiles of two steps to hide in. Blocks are due at an even step, results of a kind at the next of its own.
    steps: list[Step] = []
    for a, b in zip(first, second, strict=True):
        sends, receives = turn((*a.sends, *b.sends), 0), turn((*a.receives, *b.receives), 0)
        for offset, x in enumerate((replace(a, sends=sends, receives=receives), replace(b, sends=(), receives=()))):
            returns = turn(x.return_sends, offset), turn(x.return_receives, offset)
            steps.append(replace(x, return_sends=returns[0], return_receives=returns[1]))
    return tuple(steps)
