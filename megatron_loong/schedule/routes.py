"""Who needs which rows of a block, who passes them on to whom, and how results for the block return to its owner.

A double ring is only another visit order (LoongTrain section 4.3): what a rank computes with a block depends on
(ring_rank, owner) alone. A rank stands at the *place* (outer, inner) of a block: so many ranks further on the two rings
than the block's owner. The block goes round the owner's inner ring. By outer hops it comes to one rank of every other
inner ring, its *entry rank* there (inner = 0), which passes it round that ring. In the forward pass a rank passes a
block on while it attends to it. The block of ring rank 5, with 8 ring ranks and inner rings of 4:

    step            0     1     2     3     4     5     6     7
    attends to it   5     6     7     4     1     2     3     0
    inner hops      5>6   6>7   7>4         1>2   2>3   3>0        posted before the step's tiles, which hide them
    outer hops      5>1                                            hidden by a whole inner round

In the backward pass results for the block (its gradient) have to come back. The entry rank of a ring, and the owner in
its own, attends to the block last, so that all parts of its ring have come by then. Step 0 is half of the owner's own
tiles, to hide the first hops:

    step            0     1     2     3     4     5     6     7     8
    attends to it   5     6     7     4     2     3     0     1     5
    block           5>6   6>7   7>4   1>2   2>3   3>0
                    5>1
    results               6>7   7>4   4>5   2>3   3>0   0>1   1>5         posted after the step's tiles
    direct_returns        6>5   7>5   4>5   2>1   3>1   0>1   1>5

Results travel on round the ring, each rank adding its part, until they close it at the entry rank; the entry ranks'
sums go along the outer ring likewise. With `direct_returns` each rank sends its part to the entry rank by itself: a
part that is rounded to travel is then rounded once a ring. Both ends wait for a result in the step after it was posted.

Only rows that somebody further along needs travel. What moves are KV blocks, and every rank computes for its own
queries; or queries (with what their gradient needs), and every rank computes with its own keys. Forward, queries that
move have results too, their partial output.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megatron_loong.config import LoongConfig
from megatron_loong.layout.tokens import TokenLayout
from megatron_loong.schedule.rotation import Moving
from megatron_loong.schedule.rows import Rows, row_count, running_unions, union
from megatron_loong.schedule.tiles import Held, Mask, Tile, held_segments, seen_rows, tiles


class Place(NamedTuple):
    """Where a rank stands on the two rings, counted from the owner of a block."""

    outer: int
    inner: int

    def owner(self, ring_rank: int, ring_size: int, inner_ring_size: int) -> int:
        """The owner of the block for which `ring_rank` stands at this place."""
        return Place(-self.outer, -self.inner).rank(ring_rank, ring_size, inner_ring_size)

    def rank(self, owner: int, ring_size: int, inner_ring_size: int) -> int:
        """The ring rank that stands at this place, counted from `owner`."""
        outer, inner = divmod(owner, inner_ring_size)
        outer = (outer + self.outer) % (ring_size // inner_ring_size)
        return outer * inner_ring_size + (inner + self.inner) % inner_ring_size


OWN = Place(0, 0)


def forward_order(outer_ring_size: int, inner_ring_size: int) -> list[Place]:
    """A rank's places, one a step: its own block first, then the rest of its inner ring, then a round for each outer
    hop.

    >>> [tuple(place) for place in forward_order(2, 2)]
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    return [Place(j, i) for j in range(outer_ring_size) for i in range(inner_ring_size)]


def own_last_order(outer_ring_size: int, inner_ring_size: int) -> list[Place]:
    """The order for blocks whose results return: in each inner round, the place of the entry rank comes last, and the
    rank's own block last of all.

    Results are then complete after ring_size - 1 hops, not ring_size, and the step of the own block hides the last.

    >>> [tuple(place) for place in own_last_order(2, 2)]
    [(0, 1), (1, 1), (1, 0), (0, 0)]
    """
    # The entry rank of round j is at inner place 0. The results of the others of its ring have reached it by the time
    # it adds its own part. The owner is the entry rank of its own ring, and adds up those of the outer ring too.
    places = [Place(j, i) for j in range(outer_ring_size) for i in (*range(1, inner_ring_size), 0)]
    places.remove(OWN)
    return [*places, OWN]


class Edge(NamedTuple):
    """One hop of a block, or of the results for it, as its owner sees it."""

    sender: Place
    receiver: Place
    rows: Rows
    """Rows of the owner's block that travel."""
    post: int
    """Step in which both ends post it, counted as in `Routes.order`: 0 is the first block's, -1 the one before."""
    due: int
    """Step by which it must have arrived: of a block, the one in which the receiver attends to it or passes it on; of
    results, the one after they were posted."""


@dataclass(frozen=True, eq=False)
class Routes:
    """How the blocks of one kind travel, for one layout and mask.

    Either KV blocks move, and every rank computes for its own queries, or queries move (with what their gradient
    needs), and every rank computes with its own keys.
    """

    q: TokenLayout
    kv: TokenLayout
    mask: Mask
    inner_ring_size: int
    moving: Moving
    direct_returns: bool
    least_rows_to_cut: int = LoongConfig.least_rows_to_cut
    share: Literal["all", "near", "far"] = "all"
    """Which pairs of ring ranks are computed by these routes: all, those at most half a ring apart, or the others."""
    _known_needs: dict[tuple[int, int], Rows] = field(default_factory=dict, repr=False)
    _known_edges: dict[tuple[bool, Rows | int], tuple[list[Edge], list[Edge]]] = field(default_factory=dict, repr=False)

    @property
    def ring_size(self) -> int:
        """Number of blocks."""
        return self.q.ring_size

    def place_rank(self, place: Place, owner: int) -> int:
        """The ring rank at a place, counted from `owner`."""
        return place.rank(owner, self.ring_size, self.inner_ring_size)

    # ---- pairs of ranks: what is computed, and which rows that needs ----

    def tiles(self, ring_rank: int, owner: int) -> list[Tile]:
        """Attention calls of `ring_rank` with all of `owner`'s block."""
        pair = self._pair(ring_rank, owner)
        return [] if pair is None else tiles(self.q, self.kv, *pair, self.mask)

    def needs(self, ring_rank: int, owner: int) -> Rows:
        """Rows of `owner`'s block that `ring_rank` attends to."""
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
        """The queries and the keys that meet where `ring_rank` attends to `owner`'s block; None: computed elsewhere."""
        q_rank, kv_rank = (ring_rank, owner) if self.moving == "kv" else (owner, ring_rank)
        far = 2 * (q_rank - kv_rank) > self.ring_size
        if self.share != "all" and far != (self.share == "far"):
            return None
        # A document of which one rank holds everything is looked at with that rank's own block alone: in a pack of many
        # short documents that leaves almost nothing to look at for all other pairs.
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

    @functools.cached_property
    def whole_blocks(self) -> bool:
        """Whether blocks travel whole: one document, no window, and everybody sees something of every block.

        These are LoongTrain's volumes (section 4.3), the same for every rank. Causal zigzag could do with less: half of
        ring rank 0's block meets nobody, and ranks behind an owner return zeros for half of its block.
        """
        if len(self.q.documents) != 2 or self.mask.left is not None or self.share != "all":
            return False
        q_runs, kv_runs = ([x.ring_runs(rank) for rank in range(self.ring_size)] for x in (self.q, self.kv))
        if not all(q_runs) or not all(kv_runs):
            return False
        if self.mask.right is None:
            return True
        # The rank whose last query stands first must see something of the block whose first key stands last.
        first_last_query = min(max(stop for _, stop in runs) for runs in q_runs) + self.kv.seq_len - self.q.seq_len
        last_first_key = max(min(start for start, _ in runs) for runs in kv_runs)
        return last_first_key < first_last_query + self.mask.right

    def block_rows(self, owner: int) -> Rows:
        """All rows of an owner's block."""
        length = row_count((self.kv if self.moving == "kv" else self.q).ring_runs(owner))
        return ((0, length),) if length else ()

    # ---- one block: its hops ----

    def own_last(self, backward: bool) -> bool:
        """Whether results return, so that a rank's own block comes last."""
        return backward or self.moving == "q"

    def order(self, backward: bool) -> list[Place]:
        """A rank's places, one a step."""
        order = own_last_order if self.own_last(backward) else forward_order
        return order(self.ring_size // self.inner_ring_size, self.inner_ring_size)

    def edges(self, owner: int, backward: bool) -> tuple[list[Edge], list[Edge]]:
        """The hops of `owner`'s block, and those of the results for it; each rank but the owner receives one of the
        former and sends one of the latter, unless it is passed over.
        """
        # Blocks that travel whole take the same hops if they have the same length, so these are worked out once.
        # Causal zigzag and full attention have such blocks: one computation then serves all owners.
        key = backward, self.block_rows(owner) if self.whole_blocks else owner
        if key not in self._known_edges:
            self._known_edges[key] = self._make_edges(owner, backward)
        return self._known_edges[key]

    def _make_edges(self, owner: int, backward: bool) -> tuple[list[Edge], list[Edge]]:
        step = {place: index for index, place in enumerate(self.order(backward))}
        there: list[Edge] = []
        back: list[Edge] = []

        def pass_along(chain: list[Place], needs: list[Rows]) -> None:
            """Places that pass a block on one to the next; `needs` are of all but the first."""
            # Going out, a hop carries what the receiver and all ranks behind it need. Coming back, it carries the sum
            # over the sender and all ranks before it.
            onward = running_unions(needs[::-1])[::-1]
            gathered = needs if self.direct_returns else running_unions(needs)
            for k, (sender, place) in enumerate(itertools.pairwise(chain)):
                there.append(Edge(sender, place, onward[k], self._post_step(sender, step, backward), step[place]))
                target = chain[0] if self.direct_returns or k + 2 == len(chain) else chain[k + 2]
                back.append(Edge(place, target, gathered[k], step[place], step[place] + 1))

        # First inside each inner ring, from its entry rank on; then along the outer ring, between entry ranks.
        rounds = self._rounds(owner)
        for chain in rounds:
            needs = [self._need(place, owner) for place in chain[1:]]
            if self._sent_apart:  # from the entry rank to each of its ring, no rank passes anything on
                for place, rows in zip(chain[1:], needs, strict=True):
                    there.append(Edge(chain[0], place, rows, step[place] - 1, step[place]))
                    back.append(Edge(place, chain[0], rows, step[place], step[place] + 1))
            else:
                pass_along(chain, needs)
        # Along the outer ring travels what a whole inner round needs.
        of_rounds = [running_unions([self._need(place, owner) for place in chain])[-1] for chain in rounds[1:]]
        pass_along([chain[0] for chain in rounds], of_rounds)
        # A rank needs a block when it attends to it, or passes it on before that.
        passed_on: dict[Place, int] = {}
        for edge in there:
            passed_on[edge.sender] = min(edge.post, passed_on.get(edge.sender, edge.post))
        there = [x._replace(due=min(x.due, passed_on.get(x.receiver, x.due))) for x in there]
        return there, back

    def _need(self, place: Place, owner: int) -> Rows:
        """Rows of `owner`'s block that are needed at a place."""
        return self.block_rows(owner) if self.whole_blocks else self.needs(self.place_rank(place, owner), owner)

    def _rounds(self, owner: int) -> list[list[Place]]:
        """By inner ring: its entry rank (in the owner's ring the owner), and the others that need something of it."""
        rounds = []
        for j in range(self.ring_size // self.inner_ring_size):
            others = [Place(j, i) for i in range(1, self.inner_ring_size) if self._need(Place(j, i), owner)]
            if j == 0 or others or self._need(Place(j, 0), owner):
                rounds.append([Place(j, 0), *others])
        return rounds

    @functools.cached_property
    def _sent_apart(self) -> bool:
        """Whether an entry rank sends to each of the others of its ring what it needs, and nobody else passes on.

        Where the ranks need different rows (a window: those of two neighbours) this is fewer bytes; it must save a
        quarter of all, for a chain shares the sending out evenly.
        """
        if self.whole_blocks:
            return False
        apart = chain = 0
        for owner in range(self.ring_size):
            for _, *others in self._rounds(owner):
                needs = [self._need(place, owner) for place in others]
                apart += sum(map(row_count, needs))
                chain += sum(map(row_count, running_unions(needs[::-1])))
        return 4 * apart <= 3 * chain

    def _post_step(self, sender: Place, step: dict[Place, int], backward: bool) -> int:
        """The step in which a rank passes a block on: the one in which it attends to it.

        Where the own block comes last, an entry rank attends to the block at the end of its round, but must pass it on
        before the round: one step ahead. In inner rings of two that leaves the first outer hop no step to hide in but
        step 0, half of the own block. Where own blocks are too short to be halved, the entry rank passes the block on
        one step later instead: the outer hop, the slower one, then has a step to hide in, and the inner hop has none.
        """
        # Posted while the sender attends to the block, a hop has the tiles of that step to hide in.
        if not self.own_last(backward) or sender.inner:
            return step[sender]
        if self.inner_ring_size == 1:
            return -1 if sender == OWN else step[sender]
        at_once = self.inner_ring_size == 2 and sender.outer == 1 and self._short
        return step[Place(sender.outer, 1)] - (0 if at_once else 1)

    @functools.cached_property
    def _short(self) -> bool:
        """Whether own blocks are too short to be begun ahead (`tiles.halved`)."""
        return max(row_count(self.q.ring_runs(rank)) for rank in range(self.ring_size)) < self.least_rows_to_cut
