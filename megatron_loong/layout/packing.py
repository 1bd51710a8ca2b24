"""Packs of documents: which tokens go to which rank, so that tokens and attention are both shared out evenly.

Dealt, our own layout: a document is attended to by itself alone. Whole on one rank it costs no communication; cut in
zigzag over the ring it is balanced. So documents up to some length are dealt whole and the longer ones cut, with the
greatest length that is balanced. Every rank gets its share of the tokens to within one: nothing is padded.

    ring rank 0 | first and last piece of each long document | short documents ...
    ring rank 1 | ... second and last but one ...            | other short documents ...

Per document, the layout that Megatron, TransformerEngine and trainers on them cut: each document in zigzag over all
ranks, which therefore pad it to a multiple of 2 x cp. Contiguous: the whole pack in as many parts as there are ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import operator
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from megatron_loong.config import LoongConfig
from megatron_loong.layout.tokens import Run, TokenLayout, joined, starts_of

#: The most loaded ring rank may do this much more causal attention than the mean, or more documents are cut.
BALANCE_AIM = 1.05


@functools.lru_cache(maxsize=64)
def packed_layout(config: LoongConfig, documents: tuple[int, ...]) -> TokenLayout:
    """The layout of a pack with boundaries `documents` (`cu_seqlens`: from 0, ascending, to the number of tokens).

    Any number of documents; empty ones are passed over. Ranks hold equally many tokens, to within one. As
    `config.pack_layout` says; `config.sequence_layout` plays no part. Raises `ValueError` for boundaries that do not
    ascend from 0, and for a document that 2 x cp does not divide where every document is cut.

    >>> packed_layout(LoongConfig(2), (0, 40, 46, 52, 58, 64)).rank_runs
    (((0, 10), (30, 46), (52, 58)), ((10, 30), (46, 52), (58, 64)))
    >>> packed_layout(LoongConfig(2, pack_layout="per_document"), (0, 8, 12)).rank_runs
    (((0, 2), (6, 9), (11, 12)), ((2, 6), (9, 11)))
    """
    documents = without_empty(checked_boundaries(documents))
    if config.pack_layout == "per_document":
        return _cut_per_document(config, documents)
    total, ring = documents[-1], config.ring_size
    shares = [(rank + 1) * total // config.context_parallel_size for rank in range(config.context_parallel_size)]
    rank_tokens = [b - a for a, b in zip([0, *shares], shares, strict=False)]
    hp = config.head_parallel_size
    if config.pack_layout == "contiguous":
        return TokenLayout(documents, tuple(_cut([(0, total)], rank_tokens)), hp)
    room = [sum(rank_tokens[r * hp : (r + 1) * hp]) for r in range(ring)]
    # Which length to cut from depends on all documents, so it is tried: from "all whole" down in halves, until
    # attention is balanced. Each further try cuts more documents, and cut documents cost communication.
    best: tuple[float, list[list[Run]]] | None = None
    longest_whole = max(room)
    while best is None or (best[0] > BALANCE_AIM and longest_whole):
        pieces = _dealt(documents, room, longest_whole)
        balance = imbalance([sum(_causal_pairs(documents, run) for run in runs) for runs in pieces])
        if best is None or balance < best[0]:
            best = (balance, pieces)
        longest_whole //= 2
    rank_runs: list[tuple[Run, ...]] = []
    for ring_rank, runs in enumerate(best[1]):
        rank_runs += _cut(joined(sorted(runs)), rank_tokens[ring_rank * hp : (ring_rank + 1) * hp])
    return TokenLayout(documents, tuple(rank_runs), hp)


def _cut_per_document(config: LoongConfig, documents: tuple[int, ...]) -> TokenLayout:
    """Each document in zigzag over all ranks: TransformerEngine's `thd_get_partitioned_indices`."""
    cp = config.context_parallel_size
    chunks = 2 * cp
    for index, (start, stop) in enumerate(itertools.pairwise(documents)):
        if (stop - start) % chunks:
            raise ValueError(
                f"document {index} of the pack (tokens {start} to {stop - 1}) has {stop - start} tokens, which is no "
                f"multiple of {chunks} (2 x context_parallel_size {cp}): pack_layout='per_document' cuts each document "
                f"into so many chunks. Pad this one to {-(-(stop - start) // chunks) * chunks} tokens, and the others "
                "likewise (cu_seqlens_padded says where they begin then), or use pack_layout='dealt', which needs no "
                "padding"
            )
    rank_runs = (
        joined(
            (start + chunk * (stop - start) // chunks, start + (chunk + 1) * (stop - start) // chunks)
            for start, stop in itertools.pairwise(documents)
            for chunk in (rank, chunks - 1 - rank)
        )
        for rank in range(cp)
    )
    return TokenLayout(documents, tuple(rank_runs), config.head_parallel_size)


@functools.lru_cache(maxsize=64)
def padded_layout(config: LoongConfig, lengths: tuple[int, ...], documents: tuple[int, ...]) -> TokenLayout:
    """`packed_layout` of `documents`, of which each ends in padding: document i has `lengths[i+1] - lengths[i]` tokens.

    Raises `ValueError` for a document that is longer than its place.

    >>> layout = padded_layout(LoongConfig(1), (0, 3, 7), (0, 4, 8))
    >>> layout.documents, layout.padding
    ((0, 3, 4, 8), frozenset({1}))
    """
    # Tokens and padding of a document live together, where the documents with padding put them. For attention they are
    # two documents, of which the second attends to nothing.
    ends, padding = [0], []
    for index, ((start, stop), (a, b)) in enumerate(
        zip(itertools.pairwise(documents), itertools.pairwise(lengths), strict=True)
    ):
        if b - a > stop - start:
            raise ValueError(
                f"document {index} has {b - a} tokens in cu_seqlens, but {stop - start} with its padding in "
                "cu_seqlens_padded"
            )
        if b > a:
            ends.append(start + b - a)
        if start + b - a < stop:
            padding.append(len(ends) - 1)
            ends.append(stop)
    layout = packed_layout(config, documents)
    return dataclasses.replace(layout, documents=tuple(ends), padding=frozenset(padding))


def checked_boundaries(boundaries: Any, name: str = "cu_seqlens") -> tuple[int, ...]:
    """`cu_seqlens` as numbers; `ValueError` unless they are whole, in one row, and ascend from 0 to some token.

    >>> checked_boundaries([0, 4, 4, 6])
    (0, 4, 4, 6)
    """
    values = boundaries.tolist() if hasattr(boundaries, "tolist") else boundaries
    try:
        # Truncated, [0, 3.9, 8] would be other documents without a word.
        numbers = tuple(operator.index(x) for x in values)
    except TypeError:
        shape = f" of shape {list(boundaries.shape)}" if hasattr(boundaries, "shape") else ""
        raise ValueError(
            f"{name} must be one row of whole numbers, [documents + 1] (int32), the boundaries of all documents from 0 "
            f"to the number of tokens; got {type(boundaries).__name__}{shape}: {_shown(values)}"
        ) from None
    if len(numbers) < 2 or numbers[0] != 0 or any(b < a for a, b in itertools.pairwise(numbers)):
        raise ValueError(f"{name} must ascend from 0 to the number of tokens; got {_shown(list(numbers))}")
    if not numbers[-1]:
        raise ValueError(f"{name} holds no token: {_shown(list(numbers))}")
    return numbers


def _shown(values: Any) -> str:
    return f"{str(values[:8])[:-1]}, ...]" if isinstance(values, list) and len(values) > 8 else f"{values!r:.200}"


def without_empty(documents: Sequence[int]) -> tuple[int, ...]:
    """Boundaries without those of empty documents.

    >>> without_empty((0, 4, 4, 6))
    (0, 4, 6)
    """
    return (0, *(b for a, b in itertools.pairwise(documents) if b > a))


@functools.lru_cache(maxsize=64)
def paired_layouts(
    config: LoongConfig, documents: tuple[int, ...], kv_documents: tuple[int, ...]
) -> tuple[TokenLayout, TokenLayout]:
    """Layouts of queries and of keys of one pack: document i of the one belongs to document i of the other.

    A document that is empty on one side stays, so that the others keep their partners; tokens live where
    `packed_layout` of either side alone puts them. Raises `ValueError` for sides of different numbers of documents.

    >>> queries, keys = paired_layouts(LoongConfig(2), (0, 4, 4, 8, 8), (0, 2, 4, 4, 4))
    >>> queries.documents, keys.documents
    ((0, 4, 4, 8), (0, 2, 4, 4))
    """
    if len(documents) != len(kv_documents):
        raise ValueError(
            f"cu_seqlens has {len(documents) - 1} documents of queries, cu_seqlens_kv has {len(kv_documents) - 1} of "
            "keys; document i of the one belongs to document i of the other: give a document that is empty on one side "
            "by a boundary that repeats"
        )
    pairs = zip(itertools.pairwise(documents), itertools.pairwise(kv_documents), strict=True)
    ends = [(q[1], kv[1]) for q, kv in pairs if q[0] < q[1] or kv[0] < kv[1]]
    q, kv = (
        dataclasses.replace(packed_layout(config, side), documents=(0, *kept))
        for side, kept in zip((documents, kv_documents), zip(*ends, strict=True), strict=True)
    )
    return q, kv


def imbalance(loads: Sequence[float]) -> float:
    """The greatest load over the mean.

    >>> imbalance([3, 1])
    1.5
    """
    mean = sum(loads) / len(loads)
    return max(loads) / mean if mean else 1.0


def _causal_pairs(documents: Sequence[int], run: Run) -> int:
    """(query, key) pairs of the queries of a run that lies in one document."""
    origin = documents[bisect_right(documents, run[0]) - 1]
    first, last = run[0] - origin, run[1] - origin
    return (last * (last + 1) - first * (first + 1)) // 2


def _dealt(documents: Sequence[int], room: Sequence[int], longest_whole: int) -> list[list[Run]]:
    """Runs by ring rank: documents over `longest_whole` in zigzag, the others whole where there is room."""
    # Tokens are shared out exactly, so that nothing is padded; attention only as evenly as documents allow. Long ones
    # come first, in zigzag, which gives every rank the same of both. Then short ones, the longest first, each to the
    # rank with the least attention so far that has room: the usual greedy rule for equal loads. What fitted nowhere
    # whole fills the room that is left, the largest first.
    ring = len(room)
    left = list(room)
    pieces: list[list[Run]] = [[] for _ in room]
    load = [0] * ring
    homeless: list[Run] = []

    def place(rank: int, start: int, stop: int) -> None:
        if start < stop:
            pieces[rank].append((start, stop))
            left[rank] -= stop - start
            load[rank] += _causal_pairs(documents, (start, stop))

    short = []
    for start, stop in itertools.pairwise(documents):
        if stop - start <= longest_whole or stop - start < 2 * ring:
            short.append((start, stop))
            continue
        cuts = [start + i * (stop - start) // (2 * ring) for i in range(2 * ring + 1)]
        for i in range(2 * ring):
            # Chunks are rounded differently in each document, so the last ones may find a rank full.
            rank = min(i, 2 * ring - 1 - i)
            fits = min(cuts[i + 1] - cuts[i], left[rank])
            place(rank, cuts[i], cuts[i] + fits)
            homeless.append((cuts[i] + fits, cuts[i + 1]))
    least_loaded = [(load[rank], rank) for rank in range(ring)]
    heapq.heapify(least_loaded)
    for start, stop in sorted(short, key=lambda run: run[0] - run[1]):
        # Ranks that are too full for this document may have room for a shorter one: they are put back afterwards.
        passed = []
        while least_loaded and left[least_loaded[0][1]] < stop - start:
            passed.append(heapq.heappop(least_loaded))
        if least_loaded:
            rank = least_loaded[0][1]
            place(rank, start, stop)
            heapq.heapreplace(least_loaded, (load[rank], rank))
        else:
            homeless.append((start, stop))
        for entry in passed:
            if left[entry[1]]:
                heapq.heappush(least_loaded, entry)
    for start, stop in homeless:
        while start < stop:
            rank = max(range(ring), key=lambda x: left[x])
            end = min(stop, start + left[rank])
            place(rank, start, end)
            start = end
    return pieces


def _cut(runs: Sequence[Run], lengths: Sequence[int]) -> list[tuple[Run, ...]]:
    """Runs, in order, cut into parts of so many tokens."""
    parts: list[list[Run]] = [[] for _ in lengths]
    ends = starts_of(lengths)[1:]
    part, done = 0, 0
    for start, stop in runs:
        while start < stop:
            while done == ends[part]:
                part += 1
            taken = min(stop - start, ends[part] - done)
            parts[part].append((start, start + taken))
            start, done = start + taken, done + taken
    return [tuple(x) for x in parts]
