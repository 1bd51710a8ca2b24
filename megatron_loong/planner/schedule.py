"""Which block is attended to when, and by which hop it comes: pure functions.

A double ring is only another visit order (LoongTrain section 4.3): what a rank computes with a block depends on
(ring_rank, owner) alone. Either the KV blocks move and every rank computes for its own queries, or the queries move
(with what their gradient needs) and every rank computes with its own keys: `moving` says which. A visit is a pair of
shifts (outer, inner): the block of the ring rank that stands that many places back on each ring. A block goes round
its owner's inner ring, and from the owner to its places on the other inner rings by outer hops, each of which begins
an inner round there:

    (0,0) -inner-> (0,1) -inner-> (0,2)          forward: every hop is posted in the step in which its sender
      | outer                                    attends to the block, so the hop hides behind that step's tiles,
    (1,0) -inner-> (1,1) -inner-> (1,2)          and an outer hop behind a whole inner round

What was computed on a block (gradients; of queries that move forward, their partial output) goes home the other way:
along each inner ring to its first place, and from there along the outer ring; from place to place, each adding its
own, or (`straight_home`) every place's part by itself: a part which is rounded to travel is rounded once a ring.
A rank that needs nothing of a block, and hands it to nobody on the other ring, is passed over. Where the ranks of an
inner ring need different rows (a window: the two neighbours), its first place sends each of them its own instead.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megatron_loong.planner.rotation import Moving
from megatron_loong.planner.rows import Rows, original_rows, row_count, running_unions, slice_within, union
from megatron_loong.planner.tiles import Held, Mask, Tile, halved, held_segments, seen_rows, tiles, worth_cutting
from megatron_loong.planner.visits import OWN, Route, Visit, backward_visits, forward_visits
from megatron_loong.topology.tokens import TokenLayout


class Hop(NamedTuple):
    """One message of this rank on one ring. Both ends post it in the same step and want it by the same step."""

    send: bool
    ring: str
    """`inner` or `outer`."""
    peer: int
    """Coordinate of the other end on that ring."""
    visit: Visit
    """The block, as a visit of this rank: the one that is sent on, or the one that arrives."""
    rows: Rows
    """Rows of the owner's block that travel."""
    due: int
    """Step in which it must have arrived."""


@dataclass(frozen=True)
class Passage:
    """What one rank does in one direction, step by step; step -1 is before the first visit. `visits[i]` is step i."""

    visits: tuple[Visit, ...]
    opening: tuple[Tile, ...]
    """About half of the own block's tiles, to be computed in step -1: they hide the first hops. None of a short one."""
    tiles: Mapping[Visit, tuple[Tile, ...]]
    """Tiles of each visit, without the opening; on the moving side slices count rows of `rows`."""
    rows: Mapping[Visit, Rows]
    """Rows of the owner's block that are here during a visit; a visit without an entry is passed over."""
    hops: Mapping[int, tuple[Hop, ...]]
    """Hops of the moving blocks by the step in which they are posted."""
    last_use: Mapping[Visit, int]
    """Step after which a block may be dropped."""
    return_rows: Mapping[Visit, Rows]
    """Rows of the owner's block for which this rank, or those before it, have something that must go home."""
    return_hops: Mapping[int, tuple[Hop, ...]]
    """What goes home, by step; empty where nothing does (KV moving forward)."""

    def return_place(self, visit: Visit, rows: slice) -> slice:
        """Where `rows` of what is here during a visit stand among its `return_rows`."""
        return slice_within(self.return_rows[visit], original_rows(self.rows[visit], rows))


@dataclass(frozen=True, eq=False)
class RingSchedule:
    """Everything that follows from who holds which tokens and from the mask; the same on every rank of a ring.

    What was worked out once is remembered: all layers of a model ask for the same.
    """

    q: TokenLayout
    kv: TokenLayout
    mask: Mask
    inner_ring_size: int
    moving: Moving = "kv"
    share: Literal["all", "near", "far"] = "all"
    """Which pairs of ring ranks are computed here: all, or those less (more) than half a ring apart (`helping`)."""
    straight_home: bool = False
    """Whether what goes home goes straight to the first place of its ring, and is not added to on the way."""
    _known_needs: dict[tuple[int, int], Rows] = field(default_factory=dict, repr=False)
    _known_routes: dict[int | Rows, Route] = field(default_factory=dict, repr=False)
    _known_passages: dict[tuple[int, bool], Passage] = field(default_factory=dict, repr=False)

    @property
    def ring_size(self) -> int:
        """Number of KV owners."""
        return self.q.ring_size

    @property
    def outer_ring_size(self) -> int:
        """Rounds of the double ring."""
        return self.ring_size // self.inner_ring_size

    @functools.cached_property
    def whole_blocks(self) -> bool:
        """Whether blocks travel whole: one document, no window, and everybody sees something of every block.

        These are LoongTrain's volumes (section 4.3), the same for every rank. Causal zigzag could do with less: half of
        ring rank 0's block meets nobody, and ranks behind an owner send home zeros for half of its block.
        """
        if len(self.q.documents) != 2 or self.mask.left is not None or self.share != "all":
            return False
        q_runs, kv_runs = ([x.ring_runs(rank) for rank in range(self.ring_size)] for x in (self.q, self.kv))
        if not all(q_runs) or not all(kv_runs):
            return False
        if self.mask.right is None:
            return True
        first_place_seen_last = min(max(stop for _, stop in runs) for runs in q_runs) + self.kv.seq_len - self.q.seq_len
        return max(min(start for start, _ in runs) for runs in kv_runs) < first_place_seen_last + self.mask.right

    def block_rows(self, owner: int) -> Rows:
        """All rows of an owner's block."""
        length = sum(stop - start for start, stop in (self.kv if self.moving == "kv" else self.q).ring_runs(owner))
        return ((0, length),) if length else ()

    def tiles(self, ring_rank: int, owner: int) -> list[Tile]:
        """Tiles of `ring_rank` with all of `owner`'s block."""
        pair = self._pair(ring_rank, owner)
        return [] if pair is None else tiles(self.q, self.kv, *pair, self.mask)

    def needs(self, ring_rank: int, owner: int) -> Rows:
        """Rows of `owner`'s block that `ring_rank` meets."""
        if (ring_rank, owner) not in self._known_needs:
            pair = self._pair(ring_rank, owner)
            if pair is None:
                rows: Rows = ()
            elif self.moving == "kv":
                rows = union(seen_rows(self.q, self.kv, *pair, self.mask))
            else:
                rows = union((tile.q.start, tile.q.stop) for tile in self.tiles(ring_rank, owner))
            self._known_needs[ring_rank, owner] = rows
        return self._known_needs[ring_rank, owner]

    def _pair(self, ring_rank: int, owner: int) -> tuple[Held, Held] | None:
        """What is held of queries and of keys where `ring_rank` meets `owner`'s block; None: not computed here."""
        q_rank, kv_rank = (ring_rank, owner) if self.moving == "kv" else (owner, ring_rank)
        far = 2 * (q_rank - kv_rank) > self.ring_size
        if self.share != "all" and far != (self.share == "far"):
            return None
        q, kv = self._held if ring_rank == owner else self._shared
        return q[q_rank], kv[kv_rank]

    @functools.cached_property
    def _held(self) -> tuple[list[Held], list[Held]]:
        q, kv = ([held_segments(x, rank) for rank in range(self.ring_size)] for x in (self.q, self.kv))
        return q, kv

    @functools.cached_property
    def _shared(self) -> tuple[list[Held], list[Held]]:
        """What is held of the documents that lie on several ranks: most of a pack's documents lie on one."""
        holders: defaultdict[int, set[int]] = defaultdict(set)
        for side in self._held:
            for rank, held in enumerate(side):
                for document in held:
                    holders[document].add(rank)
        q, kv = (
            [{document: x for document, x in held.items() if len(holders[document]) > 1} for held in side]
            for side in self._held
        )
        return q, kv

    def passage(self, ring_rank: int, backward: bool) -> Passage:
        """What `ring_rank` does in the forward or in the backward pass."""
        if (ring_rank, backward) not in self._known_passages:
            # What returns must have come to its home by the last visit: the own block's.
            order = backward_visits if backward or self.moving == "q" else forward_visits
            visits = order(self.outer_ring_size, self.inner_ring_size)
            self._known_passages[ring_rank, backward] = self._passage(ring_rank, visits, backward)
        return self._known_passages[ring_rank, backward]

    def _passage(self, ring_rank: int, visits: list[Visit], backward: bool) -> Passage:
        step = {visit: index for index, visit in enumerate(visits)}
        own_last = visits[-1] == OWN
        rows, return_rows, last_use, tiles_of = {}, {}, {}, {}
        hops: defaultdict[int, list[Hop]] = defaultdict(list)
        return_hops: defaultdict[int, list[Hop]] = defaultdict(list)
        for visit in visits:
            owner = visit.owner(ring_rank, self.ring_size, self.inner_ring_size)
            route = self._route(owner)
            if visit not in route.carried:
                continue
            rows[visit] = route.carried[visit]
            last_use[visit] = max(
                [step[visit], *(self._post_step(x, route, step, own_last) for x in route.children[visit])]
            )
            tiles_of[visit] = tuple(self._placed(tile, rows[visit]) for tile in self.tiles(ring_rank, owner))
            ends = [(True, child, child) for child in route.children[visit]]
            if visit != OWN:
                ends.append((False, route.parent[visit], visit))
            for send, other, child in ends:
                due = min([step[child], *(self._post_step(x, route, step, own_last) for x in route.children[child])])
                hop = self._hop(send, visit, other, owner, route.carried[child], due)
                hops[self._post_step(child, route, step, own_last)].append(hop)
            if not backward and self.moving == "kv":
                continue
            return_rows[visit] = route.gathered[visit]
            for source in route.return_sources.get(visit, ()):
                hop = self._hop(False, visit, source, owner, route.gathered[source], step[source] + 1)
                return_hops[step[source]].append(hop)
            if visit != OWN:
                target = route.return_target[visit]
                hop = self._hop(True, visit, target, owner, route.gathered[visit], step[visit] + 1)
                return_hops[step[visit]].append(hop)
        opening: tuple[Tile, ...] = ()
        if backward and self.ring_size > 1:
            opening, tiles_of[OWN] = halved(tiles_of[OWN])
        return Passage(
            visits=tuple(visits),
            opening=opening,
            tiles=tiles_of,
            rows=rows,
            hops=_frozen(hops),
            last_use=last_use,
            return_rows=return_rows,
            return_hops=_frozen(return_hops),
        )

    def _placed(self, tile: Tile, rows: Rows) -> Tile:
        """A tile of a whole block as one of those of its rows that are here."""
        if self.moving == "kv":
            return tile._replace(kv=slice_within(rows, (tile.kv.start, tile.kv.stop)))
        return tile._replace(q=slice_within(rows, (tile.q.start, tile.q.stop)))

    def _post_step(self, child: Visit, route: Route, step: dict[Visit, int], own_last: bool) -> int:
        """The step in which the hop to `child` is posted.

        Where the own block comes last, an inner round begins with the second place of the ring (the first comes last),
        so what the first place hands on is posted a step ahead of that. In inner rings of two that is the first step of
        all for the first outer hop, which nothing but the opening would hide: without one the inner hop, the faster
        one, is posted in the step that wants it.
        """
        if child in route.direct:
            return step[child] - 1
        sender = route.parent[child]
        if not own_last or sender.inner_shift:
            return step[sender]
        if self.inner_ring_size > 1:
            with_it = self.inner_ring_size == 2 and sender.outer_shift == 1 and self._uncut
            return step[Visit(sender.outer_shift, 1)] - (0 if with_it else 1)
        return -1 if sender == OWN else step[sender]

    @functools.cached_property
    def _uncut(self) -> bool:
        """Whether own blocks are too short to be begun in an opening (`tiles.halved`)."""
        return not worth_cutting(max(row_count(self.q.ring_runs(rank)) for rank in range(self.ring_size)))

    def _hop(self, send: bool, visit: Visit, other: Visit, owner: int, rows: Rows, due: int) -> Hop:
        ring = "outer" if visit.inner_shift == other.inner_shift else "inner"
        peer = other.visitor(owner, self.ring_size, self.inner_ring_size)
        coordinate = peer // self.inner_ring_size if ring == "outer" else peer % self.inner_ring_size
        return Hop(send, ring, coordinate, visit, rows, due)

    def _route(self, owner: int) -> Route:
        # Where blocks travel whole, those of one length go the same way.
        key = self.block_rows(owner) if self.whole_blocks else owner
        if key not in self._known_routes:
            self._known_routes[key] = self._make_route(owner)
        return self._known_routes[key]

    def _make_route(self, owner: int) -> Route:
        rounds = self._rounds(owner)
        route = Route({}, {}, {}, {}, {}, {OWN: []}, set(), self.straight_home)
        for head, *inner in rounds.values():
            needs = [self._need(visit, owner) for visit in inner]
            if self._direct:
                route.add_direct(head, inner, needs)
            else:
                route.add_chain([head, *inner], needs)
        # Along the outer ring travels what a whole inner round needs.
        of_rounds = [running_unions([self._need(visit, owner) for visit in rounds[j]])[-1] for j in rounds if j]
        route.add_chain([places[0] for places in rounds.values()], of_rounds)
        route.carried[OWN] = route.gathered[OWN] = self.block_rows(owner)
        return route

    def _need(self, visit: Visit, owner: int) -> Rows:
        """Rows of `owner`'s block that are to come to a place."""
        if self.whole_blocks:
            return self.block_rows(owner)
        return self.needs(visit.visitor(owner, self.ring_size, self.inner_ring_size), owner)

    def _rounds(self, owner: int) -> dict[int, list[Visit]]:
        """By outer shift: the places of an inner round that need something, behind the first, which hands it on."""
        rounds = {}
        for j in range(self.outer_ring_size):
            places = [Visit(j, i) for i in range(1, self.inner_ring_size)]
            inner = [visit for visit in places if self._need(visit, owner)]
            if j == 0 or inner or self._need(Visit(j, 0), owner):
                rounds[j] = [Visit(j, 0), *inner]
        return rounds

    @functools.cached_property
    def _direct(self) -> bool:
        """Whether the first place of an inner ring sends to each of the others what it needs, and nobody hands on.

        Where the ranks need different rows (a window: those of two neighbours) this is fewer bytes; it must save a
        quarter of all, for a chain shares the sending out evenly.
        """
        if self.whole_blocks:
            return False
        direct = chain = 0
        for owner in range(self.ring_size):
            for _, *inner in self._rounds(owner).values():
                needs = [self._need(visit, owner) for visit in inner]
                direct += sum(map(row_count, needs))
                chain += sum(map(row_count, running_unions(needs[::-1])))
        return 4 * direct <= 3 * chain


def _frozen(hops: Mapping[int, list[Hop]]) -> dict[int, tuple[Hop, ...]]:
    return {step: tuple(x) for step, x in hops.items()}


@functools.lru_cache(maxsize=32)
def ring_schedule(
    q: TokenLayout,
    kv: TokenLayout,
    mask: Mask,
    inner_ring_size: int,
    moving: Moving = "kv",
    straight_home: bool = False,
) -> tuple[RingSchedule, ...]:
    """The schedules that together are the attention of a ring, remembered: every layer of a model asks for the same.

    One schedule, or, for a causal document in contiguous chunks, two, whatever `moving` says: pairs of ranks more than
    half a ring apart are computed by the earlier rank, which has few keys to attend to itself and is sent the queries.
    So every rank computes about half of the ring's blocks (LightSeq, DISTFLASHATTN, arXiv 2310.03294, section 3.2).
    """
    contiguous = all(len(q.ring_runs(rank)) <= 1 for rank in range(q.ring_size))
    if contiguous and q is kv and q.ring_size > 2 and mask == Mask(right=0) and len(q.documents) == 2:
        return (
            RingSchedule(q, kv, mask, inner_ring_size, "kv", "near", straight_home),
            RingSchedule(q, kv, mask, inner_ring_size, "q", "far", straight_home),
        )
    return (RingSchedule(q, kv, mask, inner_ring_size, moving, "all", straight_home),)
