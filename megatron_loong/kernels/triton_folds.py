"""Triton kernels of `kernels.folds`: memory-bound passes over strided tensors. Import it only where Triton is.

Proven on no GPU yet: the tests run them in Triton's interpreter on a CPU, and compile them for sm_80, 90 and 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_loong.kernels.sweep import Sweep, inner_block

#: Elements that one program works on: 32 of each thread of 4 warps.
_TILE = 4096

#: Pairs of one launch of `_move`.
PAIRS = 3


@triton.jit
def _merge(
    out, out_b, out_s, out_h, out_d,
    lse, lse_b, lse_s, lse_h,
    block_out, block_out_b, block_out_s, block_out_h, block_out_d,
    block_lse, block_lse_b, block_lse_s, block_lse_h,
    s, d,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # One head and a run of rows: the flash kernels' lse is [b, h, s] in memory, so that a run of it is one load.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    column = tl.arange(0, WIDTH)
    here = row < s
    lse_at = lse + batch * lse_b + head * lse_h + row * lse_s
    old = tl.load(lse_at, mask=here, other=0.0)
    new = tl.load(block_lse + batch * block_lse_b + head * block_lse_h + row * block_lse_s, mask=here, other=0.0)
    new = new.to(old.dtype)
    # -inf less -inf is NaN, so what is subtracted is finite: a number below any score for a row that has seen nothing.
    weight = 1.0 / (1.0 + tl.exp(tl.maximum(old, -3.0e38) - new))  # old = -inf: 1; new = -inf: 0
    greater = tl.maximum(old, new)
    tl.store(lse_at, greater + tl.log(1.0 + tl.exp(tl.minimum(old, new) - tl.maximum(greater, -3.0e38))), mask=here)

    inside = here[:, None] & (column < d)[None, :]
    out_at = out + batch * out_b + head * out_h + row[:, None] * out_s + column[None, :] * out_d
    block_at = block_out + batch * block_out_b + head * block_out_h
    block_at += row[:, None] * block_out_s + column[None, :] * block_out_d
    before = tl.load(out_at, mask=inside, other=0.0)
    block = tl.load(block_at, mask=inside, other=0.0).to(before.dtype)
    tl.store(out_at, before + weight.to(before.dtype)[:, None] * (block - before), mask=inside)


def merge_(out: torch.Tensor, lse: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor) -> None:
    """`folds.merge_` in one pass: out and block_out [b, s, h, d] of any strides, lse and block_lse [b, s, h]."""
    b, s, h, d = out.shape
    width = 1 << (d - 1).bit_length()
    rows = max(1, _TILE // width)
    arguments: list[Any] = []
    for x in (out, lse, block_out, block_lse):
        arguments += [x, *x.stride()]
    _launch(_merge, (-(-s // rows), h, b), [*arguments, s, d], ROWS=rows, WIDTH=width)


def _launch(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], **constants: int) -> None:
    kernel[grid](*arguments, **constants)


@triton.jit
def _move_tile(
    tile, target, source, rows, n1, n2, width, t0, t1, t2, s0, s1, s2, index,
    ADD: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
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
    if ADD:
        moved += tl.load(target_at, mask=inside, other=0.0)
    tl.store(target_at, moved, mask=inside)


@triton.jit
def _move(
    tiles_a, target_a, source_a, rows_a, n1_a, n2_a, width_a, t0_a, t1_a, t2_a, s0_a, s1_a, s2_a,
    tiles_b, target_b, source_b, rows_b, n1_b, n2_b, width_b, t0_b, t1_b, t2_b, s0_b, s1_b, s2_b,
    tiles_c, target_c, source_c, rows_c, n1_c, n2_c, width_c, t0_c, t1_c, t2_c, s0_c, s1_c, s2_c,
    index,
    ADD: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # Pairs a, b and c one after another; `tiles_c` only says where c ends, which the grid does too.
    tile = tl.program_id(0)
    if tile < tiles_a:
        _move_tile(
            tile, target_a, source_a, rows_a, n1_a, n2_a, width_a, t0_a, t1_a, t2_a, s0_a, s1_a, s2_a,
            index, ADD, INDEX, ROWS, WIDTH,
        )  # fmt: skip
    elif tile < tiles_a + tiles_b:
        _move_tile(
            tile - tiles_a, target_b, source_b, rows_b, n1_b, n2_b, width_b, t0_b, t1_b, t2_b, s0_b, s1_b, s2_b,
            index, ADD, INDEX, ROWS, WIDTH,
        )  # fmt: skip
    else:
        _move_tile(
            tile - tiles_a - tiles_b, target_c, source_c, rows_c, n1_c, n2_c, width_c, t0_c, t1_c, t2_c, s0_c, s1_c,
            s2_c, index, ADD, INDEX, ROWS, WIDTH,
        )  # fmt: skip


def move_(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor, Sweep]],
    *,
    add: bool,
    source_rows: torch.Tensor | None = None,
    target_rows: torch.Tensor | None = None,
) -> None:
    """One launch: target = source, or += with `add`, for up to `PAIRS` pairs; rows as in `folds.copy_rows_`."""
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
    _launch(_move, (total,), arguments, ADD=add, INDEX=kind, ROWS=rows, WIDTH=width)
