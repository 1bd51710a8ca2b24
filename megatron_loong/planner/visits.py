"""In which order a rank meets the blocks of a double ring, and by which way a block comes (LoongTrain 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_loong.planner.rows import Rows, running_unions


class Visit(NamedTuple):
    """How far back on each ring the owner of the visited block stands."""

    outer_shift: int
    inner_shift: int

    def owner(self, ring_rank: int, ring_size: int, inner_ring_size: int) -> int:
        """Ring rank whose block this is, seen from `ring_rank`."""
        return _shifted(ring_rank, ring_size, inner_ring_size, -self.outer_shift, -self.inner_shift)

    def visitor(self, owner: int, ring_size: int, inner_ring_size: int) -> int:
        """Ring rank that sees `owner`'s block in this visit."""
        return _shifted(owner, ring_size, inner_ring_size, self.outer_shift, self.inner_shift)


OWN = Visit(0, 0)


def _shifted(ring_rank: int, ring_size: int, inner_ring_size: int, outer_shift: int, inner_shift: int) -> int:
    outer, inner = divmod(ring_rank, inner_ring_size)
    outer = (outer + outer_shift) % (ring_size // inner_ring_size)
    return outer * inner_ring_size + (inner + inner_shift) % inner_ring_size


def forward_visits(outer_ring_size: int, inner_ring_size: int) -> list[Visit]:
    """Own block first, then the rest of the inner ring, then one inner round per outer hop."""
    return [Visit(j, i) for j in range(outer_ring_size) for i in range(inner_ring_size)]


def backward_visits(outer_ring_size: int, inner_ring_size: int) -> list[Visit]:
    """Such an order that what returns ends where it belongs: C-1 hops for C blocks, and the last one hidden.

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
    visits.remove(OWN)
    return [*visits, OWN]


def kv_visit_order(ring_rank: int, ring_size: int, inner_ring_size: int) -> list[int]:
    """Ring ranks whose KV this rank attends to in the forward pass, in order, its own first.

    >>> kv_visit_order(0, ring_size=4, inner_ring_size=1)   # one ring
    [0, 3, 2, 1]
    >>> kv_visit_order(0, ring_size=4, inner_ring_size=2)   # two rings of two
    [0, 1, 2, 3]
    """
    visits = forward_visits(ring_size // inner_ring_size, inner_ring_size)
    return [visit.owner(ring_rank, ring_size, inner_ring_size) for visit in visits]


@dataclass(frozen=True)
class Route:
    """The way of one owner's block, and home for what was computed on it."""

    carried: dict[Visit, Rows]
    """Rows that come to each place: what it and those behind it need."""
    gathered: dict[Visit, Rows]
    """Rows of which each place sends something home: what it needs and, unless `straight_home`, those before it."""
    parent: dict[Visit, Visit]
    return_target: dict[Visit, Visit]
    return_sources: dict[Visit, list[Visit]]
    """Places whose part joins that of another, the same inner ring first."""
    children: dict[Visit, list[Visit]]
    direct: set[Visit]
    """Places served by the first of their inner ring itself: nobody between needs what they need."""
    straight_home: bool
    """Whether the parts of a chain go to its first place each by itself."""

    def add_chain(self, places: list[Visit], needs: list[Rows]) -> None:
        """`places` pass blocks on one to the next; `needs` are of all but the first."""
        for visit, rows in zip(places[1:], needs if self.straight_home else running_unions(needs), strict=True):
            self.gathered[visit] = rows
        for visit, rows in zip(places[:0:-1], running_unions(needs[::-1]), strict=True):
            self.carried[visit] = rows
        for i, visit in enumerate(places[1:]):
            following = () if self.straight_home else places[i + 2 : i + 3]
            self._link(visit, parent=places[i], target=(*following, places[0])[0])

    def add_direct(self, head: Visit, places: list[Visit], needs: list[Rows]) -> None:
        """`places` get what they need from `head`, each for itself, and send their parts straight to it."""
        for visit, rows in zip(places, needs, strict=True):
            self.carried[visit] = self.gathered[visit] = rows
            self._link(visit, parent=head, target=head)
            self.direct.add(visit)

    def _link(self, visit: Visit, parent: Visit, target: Visit) -> None:
        self.parent[visit], self.return_target[visit] = parent, target
        self.return_sources.setdefault(target, []).append(visit)
        self.children.setdefault(visit, [])
        self.children.setdefault(parent, []).append(visit)
