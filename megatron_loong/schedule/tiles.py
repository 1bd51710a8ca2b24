"""Masks turned into tiles: which rows of the local q meet which rows of a KV block, in as few kernel calls as possible.

Pure functions. A mask is a band around the diagonal of every document. So what a query row sees of one owner's block is
one interval of that block's rows, and from row to row its two ends either stay or move on by one. A tile is a stretch
of rows over which one FlashAttention window describes both ends.

Example: one document of 16 tokens, causal with a window of 5 keys to the left, two ring ranks in zigzag. Ring rank 0
holds tokens 0-3 and 12-15, as rows 0-7; ring rank 1 holds tokens 4-11, as rows 0-7. What ring rank 0's queries see of
ring rank 1's block:

    query token (row)   sees tokens   which are rows [low, high) of the block
    0-3   (0-3)         none
    12    (4)           7-11          [3, 8)
    13    (5)           8-11          [4, 8)
    14    (6)           9-11          [5, 8)
    15    (7)           10-11         [6, 8)

`low` grows by one from row to row and `high` stays: one tile, q rows 4-8, kv rows 3-8, with a window that is bounded on
the left alone.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_loong.config import CAUSAL, FULL, UNBOUNDED
from megatron_loong.layout.tokens import Run, TokenLayout


@dataclass(frozen=True)
class Mask:
    """A query sees the keys of its own document from `left` places before to `right` places after its own place.

    None is unbounded. With more or fewer keys than queries the last query stands at the last key (bottom-right, as
    FlashAttention has it). Causal is `right=0`; a causal sliding window is `left=w, right=0`.
    """

    left: int | None = None
    right: int | None = None

    def __post_init__(self) -> None:
        for side, reach in (("left", self.left), ("right", self.right)):
            if reach is not None and reach < 0:
                raise ValueError(f"{side}={reach}: a window reaches 0 or more places (None: unbounded)")

    @classmethod
    def of(cls, causal: bool, window_size: tuple[int, int] | None) -> Mask:
        """From Megatron's and FlashAttention's words: `window_size=(left, right)`, -1 unbounded; causal closes right.

        >>> Mask.of(causal=True, window_size=(127, -1))
        Mask(left=127, right=0)
        """
        left, right = FULL if window_size is None else window_size
        if min(left, right) < UNBOUNDED:
            raise ValueError(f"window_size={window_size}: each side must be -1 (unbounded), 0 or more")
        return cls(None if left < 0 else left, 0 if causal else None if right < 0 else right)

    def pairs(self, q_len: int, kv_len: int) -> int:
        """Number of (query, key) pairs of one document; attention FLOPs are 4 * d per pair and head, forward.

        >>> Mask(right=0).pairs(3, 3), Mask(left=1, right=0).pairs(3, 3), Mask().pairs(2, 5)
        (6, 5, 10)
        """
        # Row i stands at key i + shift. It sees the keys below i + shift + right + 1, but not those below
        # i + shift - left: a difference of two sums.
        shift = kv_len - q_len
        upper = 0 if self.right is None else _clipped_sum(q_len, shift + self.right + 1, kv_len)
        lower = 0 if self.left is None else _clipped_sum(q_len, shift - self.left, kv_len)
        return (q_len * kv_len if self.right is None else upper) - lower


def _clipped_sum(rows: int, first: int, cap: int) -> int:
    """Sum over i < rows of min(max(first + i, 0), cap)."""
    # Of the rows some give 0, the next ones grow by one each (an arithmetic series), and the rest give `cap`.
    below = min(max(-first, 0), rows)
    growing = min(max(cap - first, below), rows)
    count = growing - below
    return count * (first + below) + count * (count - 1) // 2 + (rows - growing) * cap


# FlashAttention counts a window from the bottom right: of n keys, row i of m sees key j where
#     i + n - m - left <= j <= i + n - m + right.
# So one mask is another window in a tile of another shape, and -1 says that a side has no bound in this tile.
class Tile(NamedTuple):
    """One attention call: rows of the local q, rows of the visited block, and the window between them."""

    q: slice
    kv: slice
    window: tuple[int, int]
    """(left, right) as FlashAttention reads it: -1 is unbounded, and the last row stands at the last key."""


def squared(tile: Tile) -> list[Tile]:
    """A causal tile with more keys than rows as two: the keys that every row sees, and a square.

    >>> squared(Tile(slice(0, 2), slice(0, 6), CAUSAL))[0]
    Tile(q=slice(0, 2, None), kv=slice(0, 4, None), window=(-1, -1))
    """
    # For kernels that count a causal window from the top left: they agree with the others on squares alone.
    rows, keys = tile.q.stop - tile.q.start, tile.kv.stop - tile.kv.start
    if tile.window != CAUSAL or rows == keys:
        return [tile]
    middle = tile.kv.stop - rows
    return [Tile(tile.q, slice(tile.kv.start, middle), FULL), Tile(tile.q, slice(middle, tile.kv.stop), CAUSAL)]


def halved(found: Sequence[Tile], least_rows: int) -> tuple[tuple[Tile, ...], tuple[Tile, ...]]:
    """Tiles in two parts with about as many (query, key) pairs each; at most one tile is cut, if it has `least_rows`.

    A causal square is cut into the square below its diagonal and two triangles: sizes that kernels like.

    >>> [(tile.q, tile.kv) for tile in halved([Tile(slice(0, 4096), slice(0, 4096), CAUSAL)], 2048)[0]]
    [(slice(2048, 4096, None), slice(0, 2048, None))]
    >>> halved([Tile(slice(0, 100), slice(0, 100), CAUSAL)], 2048)[0]
    ()
    """
    first: list[Tile] = []
    missing = sum(map(_pairs_of, found)) / 2
    for index, tile in enumerate(found):
        if _pairs_of(tile) > missing:
            now, later = _cut(tile, missing / _pairs_of(tile), least_rows)
            return (*first, *now), (*later, *found[index + 1 :])
        first.append(tile)
        missing -= _pairs_of(tile)
    return tuple(first), ()


def _pairs_of(tile: Tile) -> int:
    left, right = (None if x == UNBOUNDED else x for x in tile.window)
    return Mask(left, right).pairs(tile.q.stop - tile.q.start, tile.kv.stop - tile.kv.start)


def _cut(tile: Tile, share: float, least_rows: int) -> tuple[list[Tile], list[Tile]]:
    """A full or causal tile in two parts, the first with about `share` of its pairs; others, and short ones, whole."""
    rows, keys = tile.q.stop - tile.q.start, tile.kv.stop - tile.kv.start
    if rows < least_rows:
        return [], [tile]
    if tile.window == CAUSAL and rows == keys > 1:
        # Cut by rows a triangle leaves a causal part with more keys than rows, which some kernels do not take
        # (`squared`). Cut in three, every part is a square.
        # The square below the diagonal has half of the pairs, each of the two triangles a quarter.
        middle, key = tile.q.start + rows // 2, tile.kv.start + rows // 2
        above = Tile(slice(tile.q.start, middle), slice(tile.kv.start, key), CAUSAL)
        square = Tile(slice(middle, tile.q.stop), slice(tile.kv.start, key), FULL)
        below = Tile(slice(middle, tile.q.stop), slice(key, tile.kv.stop), CAUSAL)
        if share < 1 / 8:
            return [], [tile]
        if share < 3 / 8:
            return [above], [square, below]
        return ([square], [above, below]) if share < 5 / 8 else ([above, square], [below])
    if tile.window == FULL:
        top = int(rows * share)
    elif tile.window == CAUSAL:
        before = keys - rows + 0.5  # the first row sees as many keys, and each further one another
        top = int(math.sqrt(before**2 + share * ((before + rows) ** 2 - before**2)) - before)
    else:
        top = 0
    if not 0 < top < rows:
        return [], [tile]
    middle = tile.q.start + top
    end = tile.kv.stop if tile.window == FULL else tile.kv.stop - (rows - top)
    upper = Tile(slice(tile.q.start, middle), slice(tile.kv.start, end), tile.window)
    return [upper], [Tile(slice(middle, tile.q.stop), tile.kv, tile.window)]


class Segment(NamedTuple):
    """A piece of one document that a ring rank holds in one piece."""

    start: int
    """Place in the document."""
    stop: int
    local: int
    """Row of `start` in what the rank holds."""


Held = dict[int, list[Segment]]
"""By document: the segments that a ring rank holds, ascending; their rows follow one another."""


def held_segments(layout: TokenLayout, ring_rank: int) -> Held:
    """What a ring rank holds, cut at the boundaries of documents, but for padding, of which there are no tiles.

    Raises `ValueError` for a layout in which the pieces of one document are not neighbours, or not in order.
    """
    # Pieces of a document that are neighbours here, in order, are one stretch of rows: so what a query sees of them is
    # one interval of rows, which is what tiles are made from.
    held: Held = {}
    local, last = 0, None
    for start, stop in layout.ring_runs(ring_rank):
        for document, (begin, end) in documents_in(layout.documents, (start, stop)):
            if document in layout.padding:
                local += end - begin
                continue
            segments = held.setdefault(document, [])
            origin = layout.documents[document]
            if segments and (last != document or segments[-1].stop > begin - origin):
                raise ValueError(f"ring rank {ring_rank} holds the pieces of document {document} apart or out of order")
            segments.append(Segment(begin - origin, end - origin, local))
            local, last = local + end - begin, document
    return held


def documents_in(boundaries: Sequence[int], run: Run) -> Iterator[tuple[int, Run]]:
    """The documents that a run touches, each with the part of the run inside it."""
    start, stop = run
    document = bisect_right(boundaries, start) - 1
    while start < stop:
        end = min(stop, boundaries[document + 1])
        if start < end:
            yield document, (start, end)
        start, document = end, document + 1


def tiles(q: TokenLayout, kv: TokenLayout, q_held: Held, kv_held: Held, mask: Mask) -> list[Tile]:
    """Tiles that a rank holding `q_held` computes with the block `kv_held`; no row is in two of them.

    Together they cover every pair that the mask allows between the two, once, and no other; every row of a tile sees
    a key of it, and every key is seen. For one causal document in zigzag:
                     kv_owner
        ring_rank |  0  1  2  3      D everything, causal
                0 |  D  U  U  U      L all of q, first half of kv
                1 |  L  D  U  U      U second half of q, all of kv
                2 |  L  L  D  U      every L and U costs the same, so no rank waits
                3 |  L  L  L  D
    """
    found = []
    for document, q_segments in q_held.items():
        if document in kv_held:
            q_len, kv_len = (x.documents[document + 1] - x.documents[document] for x in (q, kv))
            found += _document_tiles(q_segments, kv_held[document], mask, shift=kv_len - q_len)
    return found


def seen_rows(q: TokenLayout, kv: TokenLayout, q_held: Held, kv_held: Held, mask: Mask) -> Iterator[Run]:
    """Runs of the block `kv_held` of which a rank holding `q_held` sees every row: what `tiles` reads, found faster."""
    # The queries of a segment follow one another, so what they see together is one interval: from where the first one
    # begins to see to where the last one ceases to. Tiles, which say what each row sees, need not be built for it.
    left, right = (math.inf if x is None else x for x in (mask.left, mask.right))
    for document, q_segments in q_held.items():
        if document not in kv_held:
            continue
        kv_segments = kv_held[document]
        shift = (kv.documents[document + 1] - kv.documents[document]) - (
            q.documents[document + 1] - q.documents[document]
        )
        for segment in q_segments:
            first, last = segment.start + shift, segment.stop - 1 + shift
            seen = _rows_before(kv_segments, first - left), _rows_before(kv_segments, last + right + 1)
            if seen[0] < seen[1]:
                yield seen


def _rows_before(segments: list[Segment], place: float) -> int:
    """Row behind those of a document's keys that stand before `place`."""
    row = segments[0].local
    for segment in segments:
        if place <= segment.start:
            break
        row = segment.local + int(min(place, segment.stop)) - segment.start
    return row


class _Stretch(NamedTuple):
    """Rows [first, last] of q whose visible keys begin and end at `low` and `high`: values at first and last row."""

    first: int
    last: int
    low: tuple[int, int]
    high: tuple[int, int]


def _document_tiles(q: list[Segment], kv: list[Segment], mask: Mask, shift: int) -> list[Tile]:
    origin, end = kv[0].local, kv[-1].local + kv[-1].stop - kv[-1].start

    left, right = (math.inf if x is None else x for x in (mask.left, mask.right))
    # Query places at which an end of what a row sees begins or ceases to move: where it enters or leaves a segment of
    # keys. Between two of them both ends are linear, so their values at the first and last row say all.
    kinks = sorted(
        {e + d - shift for x in kv for e in (x.start, x.stop) for d in (left, -right - 1) if d**2 < math.inf}
    )
    stretches = []
    for segment in q:
        cuts = [segment.start, *(x for x in kinks if segment.start < x < segment.stop), segment.stop]
        for start, stop in itertools.pairwise(cuts):
            places = (start + shift, stop - 1 + shift)
            low = tuple(_rows_before(kv, p - left) for p in places)
            high = tuple(_rows_before(kv, p + right + 1) for p in places)
            row = segment.local + start - segment.start
            stretches += _nonempty(_Stretch(row, row + stop - 1 - start, low, high))  # type: ignore[arg-type]
    assert all(origin <= x.low[0] and x.high[1] <= end for x in stretches)
    return _merged(stretches)


def _nonempty(x: _Stretch) -> list[_Stretch]:
    """The rows of a stretch that see any key: all, none, or all but a few at one end."""
    seen = [h - lo for lo, h in zip(x.low, x.high, strict=True)]
    if seen[0] > 0 and seen[1] > 0:
        return [x]
    if seen[0] <= 0 and seen[1] <= 0:
        return []
    # The number of keys seen is linear in the row. It changes by at most 1 a row, so where it is -2 at one end, three
    # rows there see nothing.
    rows = x.last - x.first
    low_step, high_step = ((ends[1] - ends[0]) // rows for ends in (x.low, x.high))
    skip, drop = max(0, 1 - seen[0]), max(0, 1 - seen[1])
    low = (x.low[0] + skip * low_step, x.low[1] - drop * low_step)
    high = (x.high[0] + skip * high_step, x.high[1] - drop * high_step)
    return [_Stretch(x.first + skip, x.last - drop, low, high)]


class _Band(NamedTuple):
    """Rows [first, last]; row i sees keys [max(start, i + lowest), min(stop, i + highest))."""

    first: int
    last: int
    start: int
    stop: int
    lowest: float
    highest: float

    def fits(self, x: _Stretch) -> bool:
        """Whether this band describes what the rows of a stretch see; its first and last row are enough."""
        return all(
            max(self.start, row + self.lowest) == low and min(self.stop, row + self.highest) == high
            for row, low, high in ((x.first, x.low[0], x.high[0]), (x.last, x.low[1], x.high[1]))
        )

    def tile(self) -> Tile:
        """The call, its window counted from the bottom right."""
        rows = self.last + 1 - self.first
        corner = self.last - (self.stop - 1)
        left = UNBOUNDED if self.lowest + self.first <= self.start - (rows - 1) else int(-self.lowest - corner)
        right = UNBOUNDED if self.highest + self.first >= self.stop else int(self.highest - 1 + corner)
        return Tile(slice(self.first, self.last + 1), slice(self.start, self.stop), (left, right))


def _merged(stretches: list[_Stretch]) -> list[Tile]:
    """Neighbouring stretches joined where one window describes both: fewer and larger kernel calls."""
    # Greedy: a stretch joins the band before it if any candidate describes all of their rows. A causal zigzag block is
    # one call this way, though what its rows see is cut wherever a chunk begins.
    bands: list[tuple[_Band, list[_Stretch]]] = []
    for x in stretches:
        if bands and bands[-1][0].last + 1 == x.first:
            parts = [*bands[-1][1], x]
            joined = next((band for band in _candidates(parts) if all(map(band.fits, parts))), None)
            if joined is not None:
                bands[-1] = (joined, parts)
                continue
        alone = next(band for band in _candidates([x]) if band.fits(x))
        bands.append((alone, [x]))
    return [band.tile() for band, _ in bands]


def _candidates(parts: list[_Stretch]) -> Iterator[_Band]:
    """Bands that may describe what all parts see: each end fixed, or moving as it does in the first or last part."""
    first, last = parts[0].first, parts[-1].last
    start, stop = parts[0].low[0], parts[-1].high[1]
    for lowest in (-math.inf, parts[-1].low[1] - last, parts[0].low[1] - parts[0].last):
        for highest in (math.inf, parts[0].high[0] - first, parts[-1].high[0] - parts[-1].first):
            yield _Band(first, last, start, stop, lowest, highest)
