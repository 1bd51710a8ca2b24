"""Tiles of short documents put together, for kernels that take many in one launch. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_loong.config import UNBOUNDED
from megatron_loong.schedule.tiles import Tile

Window = tuple[int, int]


class Pack(NamedTuple):
    """One attention call of several documents, each attending to itself alone under one window."""

    q: slice
    kv: slice
    window: Window
    boundaries: tuple[tuple[int, ...], tuple[int, ...]]
    """Of the documents, in rows and in keys, each from 0."""


def packed(tiles: Sequence[Tile]) -> list[Tile | Pack]:
    """Tiles in order, where those that follow on one another and fit one window become one call.

    >>> causal = (-1, 0)
    >>> tiles = [Tile(slice(a, b), slice(a, b), causal) for a, b in ((0, 4), (4, 5), (5, 9), (12, 20))]
    >>> packed(tiles)[0]
    Pack(q=slice(0, 9, None), kv=slice(0, 9, None), window=(-1, 0), boundaries=((0, 4, 5, 9), (0, 4, 5, 9)))
    >>> packed(tiles)[1] is tiles[3]
    True
    """
    runs: list[tuple[list[Tile], Window]] = []
    for tile in tiles:
        if runs:
            run, window = runs[-1]
            # A short document may have no bound where a long one has a window of 128, and the other way round: either
            # window may fit all, so both are tried.
            follows = (run[-1].q.stop, run[-1].kv.stop) == (tile.q.start, tile.kv.start)
            fitting = next((x for x in (window, tile.window) if all(_fits(x, y) for y in (*run, tile))), None)
            if follows and fitting is not None:
                runs[-1] = [*run, tile], fitting
                continue
        runs.append(([tile], tile.window))
    return [run[0] if len(run) == 1 else _pack(run, window) for run, window in runs]


def _fits(window: Window, tile: Tile) -> bool:
    """Whether a window does to a tile what its own does: each side is the same, or both reach beyond the tile."""
    rows, keys = tile.q.stop - tile.q.start, tile.kv.stop - tile.kv.start
    # Counted from the bottom right, no key is more than keys - 1 places before a row, or rows - 1 after it: a bound
    # beyond that bounds nothing.
    return all(
        mine == other or (_beyond(mine, reach) and _beyond(other, reach))
        for mine, other, reach in zip(tile.window, window, (keys - 1, rows - 1), strict=True)
    )


def _beyond(side: int, reach: int) -> bool:
    return side == UNBOUNDED or side >= reach


def _pack(run: list[Tile], window: Window) -> Pack:
    first, last = run[0], run[-1]
    rows = tuple(x.q.start - first.q.start for x in run)
    keys = tuple(x.kv.start - first.kv.start for x in run)
    q, kv = slice(first.q.start, last.q.stop), slice(first.kv.start, last.kv.stop)
    return Pack(q, kv, window, ((*rows, q.stop - q.start), (*keys, kv.stop - kv.start)))
