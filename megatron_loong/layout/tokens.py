"""Which tokens each rank holds, free of torch. The only file that knows what zigzag is.

Zigzag (LoongTrain section 4.3; the causal balance of Megatron's own CP): the sequence is cut into 2*cp_size
chunks and logical rank l = ring_rank * head_parallel_size + head holds chunks l and 2*cp_size-1-l:

    cp_size 4, chunk | 0 1 2 3 4 5 6 7        ring_size 2, after the all-to-all over heads (hp 2):
    logical rank     | 0 1 2 3 3 2 1 0        ring rank 0: chunks 0 1 | 6 7     ring rank 1: chunks 2 3 | 4 5
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_loong.config import LoongConfig

Run = tuple[int, int]
"""A contiguous run of the global sequence, [start, stop)."""


@dataclass(frozen=True)
class TokenLayout:
    """Where every token of one sequence, or of one pack of documents, lives. Runs are never empty."""

    documents: tuple[int, ...]
    """Boundaries of the documents, from 0 to the number of tokens: `cu_seqlens`. One document: (0, S)."""

    rank_runs: tuple[tuple[Run, ...], ...]
    """By logical rank: its runs of the global sequence, in local order."""

    head_parallel_size: int
    """Ranks that form one ring rank: neighbours in logical rank."""

    padding: frozenset[int] = frozenset()
    """Indices of documents that are padding: they attend to nothing, and nothing attends to them."""

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        # Schedules are looked up by their layouts in every layer, and packs have many documents.
        return hash((self.documents, self.rank_runs, self.head_parallel_size))

    @property
    def seq_len(self) -> int:
        """Tokens in all."""
        return self.documents[-1]

    @property
    def ring_size(self) -> int:
        """Number of ring ranks."""
        return len(self.rank_runs) // self.head_parallel_size

    def tokens_of(self, logical_rank: int) -> int:
        """Number of tokens that a logical rank holds."""
        return self.rank_tokens[logical_rank]

    @functools.cached_property
    def rank_tokens(self) -> tuple[int, ...]:
        """`tokens_of` every logical rank."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.rank_runs)

    def ring_runs(self, ring_rank: int) -> tuple[Run, ...]:
        """The runs that a ring rank holds after the all-to-all, in its order; neighbouring runs are joined.

        >>> zigzag_or_contiguous(LoongConfig(4, 2), 16).ring_runs(1)
        ((4, 12),)
        """
        return self._ring_runs[ring_rank]

    @functools.cached_property
    def ring_order(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """By ring rank: (head, index into that rank's runs) of every run that its head group holds, in the order in
        which it holds them after the all-to-all: that of the sequence."""
        # The ranks of a head group hold neighbouring chunks. After the all-to-all each of them has all tokens of the
        # group, and in the order of the sequence these are few and long runs: two in zigzag, whatever the group's size.
        hp = self.head_parallel_size
        return tuple(
            tuple(
                (head, index)
                for _, head, index in sorted(
                    (run, head, index)
                    for head in range(hp)
                    for index, run in enumerate(self.rank_runs[ring_rank * hp + head])
                )
            )
            for ring_rank in range(self.ring_size)
        )

    @functools.cached_property
    def _ring_runs(self) -> tuple[tuple[Run, ...], ...]:
        hp = self.head_parallel_size
        return tuple(
            joined(self.rank_runs[ring_rank * hp + head][index] for head, index in order)
            for ring_rank, order in enumerate(self.ring_order)
        )


@functools.lru_cache(maxsize=256)
def zigzag_or_contiguous(config: LoongConfig, seq_len: int) -> TokenLayout:
    """The layout of one sequence of `seq_len` tokens, as `config.sequence_layout` says.

    Chunks are as equal as can be: chunk c begins at c * seq_len // chunks. A sequence shorter than the number of
    chunks leaves some ranks without a token.

    >>> zigzag_or_contiguous(LoongConfig(4, 2), 16).rank_runs[1]
    ((2, 4), (12, 14))
    >>> zigzag_or_contiguous(LoongConfig(2), 10).rank_runs
    (((0, 2), (7, 10)), ((2, 5), (5, 7)))
    """
    n = config.sequence_multiple
    chunks = [(c * seq_len // n, (c + 1) * seq_len // n) for c in range(n)]
    # A causal query costs as many pairs as there are tokens before it, so chunk c costs about c + 1/2. Zigzag gives a
    # rank the c-th chunk from the front and the c-th from the back, which cost the same together for every c.
    pairs = zip(chunks, reversed(chunks), strict=True) if config.sequence_layout == "zigzag" else zip(chunks)
    rank_runs = [tuple(run for run in runs if run[0] < run[1]) for runs in pairs]
    return TokenLayout((0, seq_len), tuple(rank_runs[: config.context_parallel_size]), config.head_parallel_size)


@functools.lru_cache(maxsize=64)
def rows_layout(config: LoongConfig, rows: int, documents: tuple[int, ...]) -> TokenLayout:
    """Sequences of equal length, one after another, each laid out as `zigzag_or_contiguous`; then cut into documents.

    Where the documents end moves no token. The end of every sequence must be among `documents`.

    >>> rows_layout(LoongConfig(2), 2, (0, 3, 4, 8)).rank_runs
    (((0, 1), (3, 5), (7, 8)), ((1, 3), (5, 7)))
    """
    length = documents[-1] // rows
    one = zigzag_or_contiguous(config, length)
    if documents == one.documents:
        return one
    rank_runs = (
        joined((row * length + start, row * length + stop) for row in range(rows) for start, stop in runs)
        for runs in one.rank_runs
    )
    return TokenLayout(documents, tuple(rank_runs), config.head_parallel_size)


def joined(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Runs in order, those that continue one another made one.

    >>> joined([(0, 2), (2, 4), (6, 8)])
    ((0, 4), (6, 8))
    """
    found: list[Run] = []
    for start, stop in runs:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return tuple(found)


def starts_of(lengths: Iterable[int]) -> list[int]:
    """Running sums from 0, one longer than `lengths`.

    >>> starts_of([2, 3])
    [0, 2, 5]
    """
    return list(itertools.accumulate(lengths, initial=0))
