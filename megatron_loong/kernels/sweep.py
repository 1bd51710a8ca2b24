"""How a kernel walks over two strided tensors at once: as few dimensions, as long an inner one, as there can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Sweep(NamedTuple):
    """One pair as the kernel walks over it: three outer dimensions and one inner, dense in both tensors."""

    sizes: tuple[int, int, int, int]
    target_strides: tuple[int, int, int]
    source_strides: tuple[int, int, int]

    @property
    def rows(self) -> int:
        """Runs of the inner dimension."""
        return math.prod(self.sizes[:3])


def sweep(
    shape: Sequence[int], target_strides: Sequence[int], source_strides: Sequence[int], keep_first: bool
) -> Sweep | None:
    """How to walk over a pair of tensors, its inner dimension as long as can be; None: this kernel cannot.

    keep_first: dimension 0 is indexed by row, and so not joined to the next.

    >>> sweep((6, 1, 4, 8), (32, 32, 8, 1), (32, 192, 8, 1), keep_first=False)  # both dense: one run
    Sweep(sizes=(1, 1, 1, 192), target_strides=(0, 0, 0), source_strides=(0, 0, 0))
    >>> sweep((6, 2, 8), (64, 8, 1), (16, 8, 1), keep_first=False)  # every fourth row of a buffer
    Sweep(sizes=(1, 1, 6, 16), target_strides=(0, 0, 64), source_strides=(0, 0, 16))
    """
    joined: list[tuple[int, int, int]] = []
    for place, (size, t, s) in enumerate(zip(shape, target_strides, source_strides, strict=True)):
        indexed = keep_first and place == 0
        if size == 1 and not indexed:
            continue
        joinable = bool(joined) and not (keep_first and len(joined) == 1)
        if joinable and joined[-1][1:] == (size * t, size * s):
            joined[-1] = (joined[-1][0] * size, t, s)
        else:
            joined.append((size, t, s))
    if len(joined) == int(keep_first):
        joined.append((1, 1, 1))
    width, *steps = joined.pop()
    if steps != [1, 1] or len(joined) > 3:
        return None
    block = inner_block(width)
    if width > block and width % block == 0 and len(joined) < 3:
        joined.append((width // block, block, block))
        width = block
    first = joined[: int(keep_first)]
    outer = [*first, *[(1, 0, 0)] * (3 - len(joined)), *joined[len(first) :]]
    (n0, t0, s0), (n1, t1, s1), (n2, t2, s2) = outer
    return Sweep((n0, n1, n2, width), (t0, t1, t2), (s0, s1, s2))


def inner_block(width: int) -> int:
    """Columns of a program's tile for an inner dimension: all of a short one, a power of two that divides a long one.

    >>> inner_block(192), inner_block(8192), inner_block(80 * 127 * 8), inner_block(10**6 + 1)
    (256, 1024, 128, 1024)
    """
    if width <= 1024:
        return 1 << (width - 1).bit_length()
    dividing = width & -width
    return min(dividing, 1024) if dividing >= 64 else 1024
