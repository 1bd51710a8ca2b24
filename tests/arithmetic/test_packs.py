"""Tiles put together for kernels that take many documents at once."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from megatron_loong.schedule.packs import Pack, packed
from megatron_loong.schedule.tiles import Tile


def seen(call: Tile | Pack) -> set[tuple[int, int]]:
    """(row, key) pairs that a call covers: the last row of each document stands at its last key."""
    sides = getattr(call, "boundaries", None) or tuple((0, x.stop - x.start) for x in (call.q, call.kv))
    (left, right), pairs = call.window, set()
    for (a, b), (c, d) in zip(*map(itertools.pairwise, sides), strict=True):
        for row in range(a, b):
            place = row - a + (d - c) - (b - a)
            low = 0 if left < 0 else max(0, place - left)
            high = d - c - 1 if right < 0 else min(d - c - 1, place + right)
            pairs |= {(call.q.start + row, call.kv.start + c + key) for key in range(low, high + 1)}
    return pairs


@st.composite
def some_tiles(draw):
    row = key = 0
    tiles = []
    for _ in range(draw(st.integers(1, 8))):
        row += draw(st.sampled_from((0, 0, 0, 2)))
        key += draw(st.sampled_from((0, 0, 0, 3)))
        rows = draw(st.integers(1, 5))
        keys = rows + draw(st.sampled_from((0, 0, 2)))
        window = draw(st.sampled_from(((-1, -1), (-1, 0), (-1, 0), (2, 0), (1, 1))))
        tiles.append(Tile(slice(row, row + rows), slice(key, key + keys), window))
        row, key = row + rows, key + keys
    return tiles


@given(some_tiles())
def test_packs_cover_what_their_tiles_do(tiles):
    calls = packed(tiles)
    assert set().union(*map(seen, calls)) == set().union(*map(seen, tiles))
    assert sum(len(x.boundaries[0]) - 1 if isinstance(x, Pack) else 1 for x in calls) == len(tiles)


def test_documents_under_one_window_are_one_call_whatever_their_tiles_say():
    """A document of one token is a full tile, one shorter than the window a causal one: (3, 0) tells them all."""
    windows = ((0, 4, (-1, 0)), (4, 5, (-1, -1)), (5, 30, (3, 0)), (30, 31, (-1, -1)), (31, 33, (-1, 0)))
    (call,) = packed([Tile(slice(a, b), slice(a, b), window) for a, b, window in windows])
    assert call.window == (3, 0) and call.boundaries[0] == (0, 4, 5, 30, 31, 33)


def test_a_long_document_does_not_take_a_window_that_cuts_it():
    tiles = [Tile(slice(0, 9), slice(0, 9), (-1, 0)), Tile(slice(9, 20), slice(9, 20), (3, 0))]
    assert packed(tiles) == tiles
