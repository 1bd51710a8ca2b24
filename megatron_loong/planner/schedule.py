"""Which KV block is attended to when, by which hop it comes, and which part of it counts. Pure functions.

A double ring is only another visit order (LoongTrain section 4.3): what a rank computes with a block depends on
(ring_rank, kv_owner) alone. A visit is a pair of shifts (outer, inner): the block of the ring rank that stands
that many places back on each ring. Block (j, i) with i > 0 comes from block (j, i-1) by an inner hop, and block
(j, 0) with j > 0 from block (j-1, 0) by an outer hop, which can be posted a whole inner round ahead.
"""

from __future__ import annotations

from typing import NamedTuple

Run = tuple[int, int]


class Visit(NamedTuple):
    """How far back on each ring the owner of the visited block stands."""

    outer_shift: int
    inner_shift: int

    def source(self) -> Visit | None:
        """The visit whose block, held by the neighbour on one ring, becomes this one by a hop; None for one's own."""
        if self.inner_shift:
            return Visit(self.outer_shift, self.inner_shift - 1)
        return Visit(self.outer_shift - 1, 0) if self.outer_shift else None

    def owner(self, ring_rank: int, ring_size: int, inner_ring_size: int) -> int:
        """Ring rank whose block this is, seen from `ring_rank`."""
        outer, inner = divmod(ring_rank, inner_ring_size)
        outer = (outer - self.outer_shift) % (ring_size // inner_ring_size)
        return outer * inner_ring_size + (inner - self.inner_shift) % inner_ring_size


def forward_visits(outer_ring_size: int, inner_ring_size: int) -> list[Visit]:
    """Own block first, then the rest of the inner ring, then one inner round per outer hop."""
    return [Visit(j, i) for j in range(outer_ring_size) for i in range(inner_ring_size)]


def backward_visits(outer_ring_size: int, inner_ring_size: int) -> list[Visit]:
    """Such an order that dKV ends where it belongs: C-1 hops for C blocks, and the last one hidden.

    On each ring a rank's own block comes last, so that the gradient that travels with the visits is at home when
    everybody has added to it. The block that is the rank's own on both rings comes last of all and hides the last
    hop of its gradient.

    >>> [tuple(v) for v in backward_visits(1, 3)]
    [(0, 1), (0, 2), (0, 0)]
    >>> [tuple(v) for v in backward_visits(2, 2)]
    [(0, 1), (1, 1), (1, 0), (0, 0)]
    """
    last_on_inner = [*range(1, inner_ring_size), 0]
    visits = [Visit(j, i) for j in range(outer_ring_size) for i in last_on_inner]
    visits.remove(Visit(0, 0))
    return [*visits, Visit(0, 0)]


def gradient_sources(visit: Visit, outer_ring_size: int, inner_ring_size: int) -> list[Visit]:
    """Visits of the neighbours (one hop back) whose accumulated dKV joins this visit's, inner ring first.

    >>> gradient_sources(Visit(0, 0), outer_ring_size=2, inner_ring_size=2)
    [Visit(outer_shift=0, inner_shift=1), Visit(outer_shift=1, inner_shift=0)]
    """
    j, i = visit
    sources = []
    if inner_ring_size > 1 and i != 1:
        sources.append(Visit(j, (i - 1) % inner_ring_size))
    if i == 0 and outer_ring_size > 1 and j != 1:
        sources.append(Visit((j - 1) % outer_ring_size, 0))
    return sources


def kv_visit_order(ring_rank: int, ring_size: int, inner_ring_size: int) -> list[int]:
    """Ring ranks whose KV this rank attends to in the forward pass, in order, its own first.

    >>> kv_visit_order(0, ring_size=4, inner_ring_size=1)   # one ring
    [0, 3, 2, 1]
    >>> kv_visit_order(0, ring_size=4, inner_ring_size=2)   # two rings of two
    [0, 1, 2, 3]
    """
    visits = forward_visits(ring_size // inner_ring_size, inner_ring_size)
    return [visit.owner(ring_rank, ring_size, inner_ring_size) for visit in visits]


class Tile(NamedTuple):
    """One attention call: rows of the local q, rows of the visited block, and whether the diagonal masks it."""

    q: slice
    kv: slice
    causal: bool


def tiles(q_runs: list[Run], kv_runs: list[Run], causal: bool) -> list[Tile]:
    """Tiles that one rank computes with one block, from the runs of the global sequence that each of them holds.

    The runs of two ranks are equal or disjoint (`sequence.sharding.ring_runs`). For zigzag this gives
                     kv_owner
        ring_rank |  0  1  2  3      D everything, causal
                0 |  D  U  U  U      L all of q, first half of kv
                1 |  L  D  U  U      U second half of q, all of kv
                2 |  L  L  D  U      every L and U costs the same, so no rank waits
                3 |  L  L  L  D

    >>> tiles([(2, 4), (4, 6)], [(0, 2), (6, 8)], causal=True)    # L
    [Tile(q=slice(0, 4, None), kv=slice(0, 2, None), causal=False)]
    >>> tiles([(0, 2), (6, 8)], [(2, 4), (4, 6)], causal=True)    # U
    [Tile(q=slice(2, 4, None), kv=slice(0, 4, None), causal=False)]
    """
    q_len, kv_len = (sum(stop - start for start, stop in runs) for runs in (q_runs, kv_runs))
    if not causal or q_runs == kv_runs:
        return [Tile(slice(0, q_len), slice(0, kv_len), causal)]
    found: list[Tile] = []
    q_offset = 0
    for q_start, q_stop in q_runs:
        rows = slice(q_offset, q_offset + q_stop - q_start)
        q_offset = rows.stop
        # Runs are ascending, so those that lie before q are the first ones of the block.
        visible = sum(stop - start for start, stop in kv_runs if stop <= q_start)
        if not visible:
            continue
        if found and found[-1].kv.stop == visible:
            rows = slice(found.pop().q.start, rows.stop)
        found.append(Tile(rows, slice(0, visible), False))
    return found
