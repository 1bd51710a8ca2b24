"""Triton kernels of `kernels.row_ops`: memory-bound passes over strided tensors. Import it only where Triton is.

Proven on no GPU yet: the tests run them in Triton's interpreter on a CPU, and compile them for sm_80, 90 and 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_loong.kernels.row_ops import Sweep, inner_block

#: Elements that one program works on: 32 of each thread of 4 warps.
_TILE = 4096

#: Pairs of one launch of `_move`.
PAIRS = 3


@triton.jit
def _take(
    total, weights, top, part, part_s, part_b, part_h, lse, lse_s, lse_b, lse_h,
    index, count, row, rows, batch, head, column, width, MERGE: tl.constexpr,
):  # fmt: skip
    here = row < tl.where(index < count, rows, 0)
    inside = here[:, None] & (column < width)[None, :]
    part_at = part + batch * part_b + head * part_h + row[:, None] * part_s + column[None, :]
    found = tl.load(part_at, mask=inside, other=0.0).to(total.dtype)
    if MERGE:
        lse_at = lse + batch * lse_b + head * lse_h + row * lse_s
        score = tl.load(lse_at, mask=here, other=-float("inf")).to(total.dtype)
        higher = tl.maximum(top, score)
        before, weight = tl.exp(top - higher), tl.exp(score - higher)
        total = total * before[:, None] + found * weight[:, None]
        weights = weights * before + weight
        top = higher
    else:
        total += found
    return total, weights, top


@triton.jit
def _combine(
    into, into_s, into_b, into_h, into_lse, into_lse_s, into_lse_b, into_lse_h,
    part_0, part_0_s, part_0_b, part_0_h, lse_0, lse_0_s, lse_0_b, lse_0_h,
    part_1, part_1_s, part_1_b, part_1_h, lse_1, lse_1_s, lse_1_b, lse_1_h,
    part_2, part_2_s, part_2_b, part_2_h, lse_2, lse_2_s, lse_2_b, lse_2_h,
    part_3, part_3_s, part_3_b, part_3_h, lse_3, lse_3_s, lse_3_b, lse_3_h,
    part_4, part_4_s, part_4_b, part_4_h, lse_4, lse_4_s, lse_4_b, lse_4_h,
    part_5, part_5_s, part_5_b, part_5_h, lse_5, lse_5_s, lse_5_b, lse_5_h,
    part_6, part_6_s, part_6_b, part_6_h, lse_6, lse_6_s, lse_6_b, lse_6_h,
    part_7, part_7_s, part_7_b, part_7_h, lse_7, lse_7_s, lse_7_b, lse_7_h,
    count, rows, width,
    MERGE: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # One head and a run of rows: the flash kernels' lse is [b, h, s] in memory, so that a run of it is one load.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    column = tl.arange(0, WIDTH)
    total = tl.full(
        (ROWS, WIDTH), 0.0, WIDE
    )  # not `tl.zeros`, which is itself a kernel: the interpreter may not call one
    weights = tl.full((ROWS,), 0.0, WIDE)
    # -inf less -inf is NaN, so the greatest score so far is finite: a number below any, until one has been seen.
    top = tl.full((ROWS,), -3.0e38, WIDE)
    total, weights, top = _take(
        total, weights, top, part_0, part_0_s, part_0_b, part_0_h, lse_0, lse_0_s, lse_0_b, lse_0_h,
        0, count, row, rows, batch, head, column, width, MERGE,
    )  # fmt: skip
    total, weights, top = _take(
        total, weights, top, part_1, part_1_s, part_1_b, part_1_h, lse_1, lse_1_s, lse_1_b, lse_1_h,
        1, count, row, rows, batch, head, column, width, MERGE,
    )  # fmt: skip
    if SLOTS > 2:
        total, weights, top = _take(
            total, weights, top, part_2, part_2_s, part_2_b, part_2_h, lse_2, lse_2_s, lse_2_b, lse_2_h,
            2, count, row, rows, batch, head, column, width, MERGE,
        )  # fmt: skip
        total, weights, top = _take(
            total, weights, top, part_3, part_3_s, part_3_b, part_3_h, lse_3, lse_3_s, lse_3_b, lse_3_h,
            3, count, row, rows, batch, head, column, width, MERGE,
        )  # fmt: skip
    if SLOTS > 4:
        total, weights, top = _take(
            total, weights, top, part_4, part_4_s, part_4_b, part_4_h, lse_4, lse_4_s, lse_4_b, lse_4_h,
            4, count, row, rows, batch, head, column, width, MERGE,
        )  # fmt: skip
        total, weights, top = _take(
            total, weights, top, part_5, part_5_s, part_5_b, part_5_h, lse_5, lse_5_s, lse_5_b, lse_5_h,
            5, count, row, rows, batch, head, column, width, MERGE,
        )  # fmt: skip
        total, weights, top = _take(
            total, weights, top, part_6, part_6_s, part_6_b, part_6_h, lse_6, lse_6_s, lse_6_b, lse_6_h,
            6, count, row, rows, batch, head, column, width, MERGE,
        )  # fmt: skip
        total, weights, top = _take(
            total, weights, top, part_7, part_7_s, part_7_b, part_7_h, lse_7, lse_7_s, lse_7_b, lse_7_h,
            7, count, row, rows, batch, head, column, width, MERGE,
        )  # fmt: skip
    # All loads come before the stores, so that a part may be overwritten by the result.
    here = row < rows
    if MERGE:
        into_lse_at = into_lse + batch * into_lse_b + head * into_lse_h + row * into_lse_s
        tl.store(into_lse_at, top + tl.log(weights), mask=here)  # log(0) = -inf: nothing seen
        total = total / tl.where(weights > 0, weights, 1.0)[:, None]
    into_at = into + batch * into_b + head * into_h + row[:, None] * into_s + column[None, :]
    tl.store(into_at, total.to(into.dtype.element_ty), mask=here[:, None] & (column < width)[None, :])


#: Parts of one launch of `_combine`.
SLOTS = 8


def combine(into: Sequence[torch.Tensor], parts: Sequence[Sequence[torch.Tensor]]) -> None:
    """One launch: `row_ops.merge_rows` of up to `SLOTS` parts (lse, rows), or the sum of parts (rows,) alone.

    Rows [s, b, h, d] of any strides with d dense; lse [s, b, h].
    """
    assert 0 < len(parts) <= SLOTS
    s, b, h, d = into[-1].shape
    slots = max(2, 1 << (len(parts) - 1).bit_length())
    arguments: list[Any] = []
    for lse, x in ((one[0], one[-1]) for one in (into, *parts, *[parts[0]] * (SLOTS - len(parts)))):
        arguments += [x, *x.stride()[:3], lse, *lse.stride()[:3]]
    merge = len(into) == 2
    double = any(one[0].dtype == torch.float64 for one in parts)
    width = 1 << (d - 1).bit_length()
    rows = max(1, _TILE // width)
    _launch(
        _combine,
        (-(-s // rows), h, b),
        [*arguments, len(parts), s, d],
        MERGE=merge,
        SLOTS=slots,
        WIDE=tl.float64 if double else tl.float32,
        ROWS=rows,
        WIDTH=width,
    )


def _launch(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], **constants: Any) -> None:
    kernel[grid](*arguments, **constants)


@triton.jit
def _move_tile(
    tile, target, source, rows, n1, n2, width, t0, t1, t2, s0, s1, s2, index,
    INDEX: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    across = (width + WIDTH - 1) // WIDTH
    row = (tile // across) * ROWS + tl.arange(0, ROWS)
    column = (tile % across) * WIDTH + tl.arange(0, WIDTH)
    here = row < rows
    inside = here[:, None] & (column < width)[None, :]
    i0 = row // (n1 * n2)
    i1 = ((row // n2) % n1).to(tl.int64)
    i2 = (row % n2).to(tl.int64)
    target_i0 = i0.to(tl.int64)
    source_i0 = target_i0
    if INDEX == 1:
        source_i0 = tl.load(index + i0, mask=here, other=0)
    if INDEX == 2:
        target_i0 = tl.load(index + i0, mask=here, other=0)
    target_at = target + (target_i0 * t0 + i1 * t1 + i2 * t2)[:, None] + column[None, :]
    source_at = source + (source_i0 * s0 + i1 * s1 + i2 * s2)[:, None] + column[None, :]
    moved = tl.load(source_at, mask=inside, other=0.0).to(target.dtype.element_ty)
    tl.store(target_at, moved, mask=inside)


@triton.jit
def _move(
    tiles_a, target_a, source_a, rows_a, n1_a, n2_a, width_a, t0_a, t1_a, t2_a, s0_a, s1_a, s2_a,
    tiles_b, target_b, source_b, rows_b, n1_b, n2_b, width_b, t0_b, t1_b, t2_b, s0_b, s1_b, s2_b,
    tiles_c, target_c, source_c, rows_c, n1_c, n2_c, width_c, t0_c, t1_c, t2_c, s0_c, s1_c, s2_c,
    index,
    INDEX: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # Pairs a, b and c one after another; `tiles_c` only says where c ends, which the grid does too.
    tile = tl.program_id(0)
    if tile < tiles_a:
        _move_tile(
            tile, target_a, source_a, rows_a, n1_a, n2_a, width_a, t0_a, t1_a, t2_a, s0_a, s1_a, s2_a,
            index, INDEX, ROWS, WIDTH,
        )  # fmt: skip
    elif tile < tiles_a + tiles_b:
        _move_tile(
            tile - tiles_a, target_b, source_b, rows_b, n1_b, n2_b, width_b, t0_b, t1_b, t2_b, s0_b, s1_b, s2_b,
            index, INDEX, ROWS, WIDTH,
        )  # fmt: skip
    else:
        _move_tile(
            tile - tiles_a - tiles_b, target_c, source_c, rows_c, n1_c, n2_c, width_c, t0_c, t1_c, t2_c, s0_c, s1_c,
            s2_c, index, INDEX, ROWS, WIDTH,
        )  # fmt: skip


def move_(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor, Sweep]],
    *,
    source_rows: torch.Tensor | None = None,
    target_rows: torch.Tensor | None = None,
) -> None:
    """One launch: target = source for up to `PAIRS` pairs; rows as in `row_ops.copy_rows_`."""
    assert 0 < len(pairs) <= PAIRS
    width = min(inner_block(x.sizes[3]) for *_, x in pairs)
    rows = _TILE // width
    arguments: list[Any] = []
    total = 0
    for target, source, x in pairs:
        tiles = -(-x.rows // rows) * -(-x.sizes[3] // width)  # not triton.cdiv, which takes longer than the rest
        total += tiles
        outer = (x.rows, *x.sizes[1:], *x.target_strides, *x.source_strides)
        arguments += [tiles, target, source, *outer]
    absent = [0, *arguments[1:13]]  # never read
    arguments += absent * (PAIRS - len(pairs))
    index = source_rows if source_rows is not None else target_rows
    kind = 0 if index is None else 1 if source_rows is not None else 2
    arguments.append(pairs[0][0] if index is None else index)
    _launch(_move, (total,), arguments, INDEX=kind, ROWS=rows, WIDTH=width)
