"""Rows of a KV block as runs, and where they stand when only some of them travel."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from megatron_loong.layout.tokens import Run, starts_of

Rows = tuple[Run, ...]
"""Rows of a block as ascending, disjoint runs."""


def union(runs: Iterable[Run]) -> Rows:
    """Runs in any order, overlapping or not, as ascending disjoint runs.

    >>> union([(4, 6), (0, 2), (2, 3), (5, 8)])
    ((0, 3), (4, 8))
    """
    merged: list[Run] = []
    for start, stop in sorted(runs):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def running_unions(parts: Iterable[Rows]) -> list[Rows]:
    """The union of the first one, two, three ...

    >>> running_unions([((0, 2),), ((4, 5),), ((2, 3),)])
    [((0, 2),), ((0, 2), (4, 5)), ((0, 3), (4, 5))]
    """
    return list(itertools.accumulate(parts, lambda a, b: a if a == b else union((*a, *b))))


def row_count(rows: Rows) -> int:
    """Number of rows."""
    return sum(stop - start for start, stop in rows)


def slice_within(rows: Rows, run: Run) -> slice:
    """Where `run` stands in a buffer that holds `rows` one after another; it must lie inside one of them.

    >>> slice_within(((2, 4), (8, 12)), (9, 11))
    slice(3, 5, None)
    """
    for (start, stop), offset in zip(rows, starts_of(b - a for a, b in rows), strict=False):
        if start <= run[0] and run[1] <= stop:
            return slice(run[0] - start + offset, run[1] - start + offset)
    raise AssertionError(f"rows {run} are not among {rows}")


def original_rows(rows: Rows, place: slice) -> Run:
    """The inverse of `slice_within`."""
    for (start, stop), offset in zip(rows, starts_of(b - a for a, b in rows), strict=False):
        if offset <= place.start and place.stop <= offset + stop - start:
            return (place.start - offset + start, place.stop - offset + start)
    raise AssertionError(f"places {place} are not among {rows}")
