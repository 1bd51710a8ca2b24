"""Which heads each rank of a head group takes: any number of query heads, KV heads in any relation to it.

Query heads are cut into runs whose lengths differ by at most one. A rank takes the KV heads that its query heads read,
and no others. So with 8 query and 2 KV heads over 4 ranks each KV head is sent to two ranks, and nothing is padded.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class HeadShares:
    """The division of h query heads and g KV heads over a head group."""

    query: tuple[range, ...]
    """By head coordinate: its query heads."""
    kv: tuple[range, ...]
    """By head coordinate: the KV heads that they read."""
    group_size: int
    """Query heads that read one KV head."""

    def kv_of_query(self, head_rank: int) -> tuple[int, ...] | None:
        """For each query head of a rank, the index of its KV head in the rank's share; None where it follows from the
        usual rule, query head i reads KV head i // (h // g)."""
        query, kv = self.query[head_rank], self.kv[head_rank]
        places = tuple(head // self.group_size - kv.start for head in query)
        # Kernels repeat each KV head equally often. A share that begins or ends in the middle of a KV head's readers
        # has them unequally often.
        each, rest = divmod(len(query), len(kv))
        if not rest and places == tuple(i // each for i in range(len(query))):
            return None
        return places

    @functools.cached_property
    def most_parts(self) -> int:
        """Into how many parts with KV heads of their own the shares can be cut; 1 unless all ranks' are alike."""
        # Of a KV head that two ranks hold, one may have it in the first part and the other in the second. But the parts
        # of the gradient are written one beside the other, not summed.
        each = len(self.kv[0])
        alike = self.kv == tuple(range(i * each, (i + 1) * each) for i in range(len(self.kv)))
        return each if alike else 1

    def part(self, index: int, parts: int) -> HeadShares:
        """One of `parts` parts, a divisor of `most_parts`: of each rank, the next of its KV heads and readers."""
        each = len(self.kv[0]) // parts
        kv = tuple(range(x.start + index * each, x.start + (index + 1) * each) for x in self.kv)
        query = tuple(range(x.start * self.group_size, x.stop * self.group_size) for x in kv)
        return HeadShares(query, kv, self.group_size)


@functools.lru_cache(maxsize=64)
def head_shares(heads: int, kv_heads: int, head_parallel_size: int) -> HeadShares:
    """Shares of `heads` query heads (a multiple of `kv_heads`, at least `head_parallel_size`).

    >>> shares = head_shares(6, 2, 4)
    >>> shares.query, shares.kv
    ((range(0, 2), range(2, 3), range(3, 5), range(5, 6)), (range(0, 1), range(0, 1), range(1, 2), range(1, 2)))
    """
    assert heads % kv_heads == 0 and heads >= head_parallel_size
    size = heads // kv_heads
    # Rounded up, so that the larger shares come first and lie as even as can be.
    cuts = [-(-i * heads // head_parallel_size) for i in range(head_parallel_size + 1)]
    query = tuple(range(a, b) for a, b in itertools.pairwise(cuts))
    return HeadShares(query, tuple(range(x.start // size, (x.stop - 1) // size + 1) for x in query), size)


@functools.lru_cache(maxsize=64)
def latent_shares(heads: int, head_parallel_size: int) -> HeadShares:
    """Shares in multi-latent attention: query heads as ever, the one latent to every rank."""
    query = head_shares(heads, heads, head_parallel_size).query
    return HeadShares(query, (range(1),) * head_parallel_size, heads)


def latent_is_smaller(latent_row: int, expanded_row: int, heads: int, head_parallel_size: int, ring_size: int) -> bool:
    """Whether multi-latent attention sends fewer bytes by sending the latent than by sending keys and values.

    latent_row: elements of a token's latent and k_rope (r + d_rope). expanded_row: of one head's k and v
    (d_nope + d_rope + dv). Per token that a rank holds, in either direction: to the head group all of the latent to
    each of the others, against their share of the heads; then C - 1 hops of what the head group holds.

    >>> latent_is_smaller(576, 320, heads=16, head_parallel_size=1, ring_size=8)
    True
    >>> latent_is_smaller(576, 320, heads=16, head_parallel_size=16, ring_size=1)
    False
    """
    hp, hops = head_parallel_size, ring_size - 1
    latent = (hp - 1) * latent_row + hops * hp * latent_row
    expanded = (hp - 1) * heads * expanded_row / hp + hops * heads * expanded_row
    return latent < expanded
