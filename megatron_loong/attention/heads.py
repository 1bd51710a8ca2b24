"""Which heads each rank of a head group takes: any number of query heads, KV heads in any relation to it.

Query heads are cut into runs that differ by one head at most; a rank takes the KV heads that its query heads read,
and no others. So 8 query and 2 KV heads over 4 ranks send each KV head to two of them, and nothing is padded.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch


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
        """For each query head of a rank, the place of its KV head in the rank's share; None where the usual rule
        (query head i reads KV head i // (h // g)) says it."""
        query, kv = self.query[head_rank], self.kv[head_rank]
        places = tuple(head // self.group_size - kv.start for head in query)
        each, rest = divmod(len(query), len(kv))
        if not rest and places == tuple(i // each for i in range(len(query))):
            return None
        return places


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


def expand_heads(x: torch.Tensor, places: tuple[int, ...] | None) -> torch.Tensor:
    """KV heads [..., g, d] -> one per query head [..., h, d], where the kernel's own rule does not fit."""
    return x if places is None else x[..., list(places), :]


def sum_heads(grad: torch.Tensor, places: tuple[int, ...] | None, kv_heads: int) -> torch.Tensor:
    """The adjoint of `expand_heads`, in the dtype of `grad`."""
    if places is None:
        return grad
    summed = torch.zeros(*grad.shape[:-2], kv_heads, grad.shape[-1], dtype=grad.dtype, device=grad.device)
    return summed.index_add_(-2, torch.tensor(places, device=grad.device), grad)
