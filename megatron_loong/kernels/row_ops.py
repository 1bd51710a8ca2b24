"""The memory-bound passes of attention: merge partial results, add up gradients, pack rows.

On NVIDIA GPUs with Triton each is one kernel (`triton_row_ops`), elsewhere a few of PyTorch's; the numbers agree to
rounding. Nothing here is recorded by autograd.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch

Pair = tuple[torch.Tensor, torch.Tensor]
"""(target, source), of one shape; in any memory order, and of any floating point dtype each."""

TRITON_VARIABLE = "LOONG_TRITON"


def wanted() -> bool:
    """What the environment says: `LOONG_TRITON=0` has all of this done by PyTorch."""
    value = os.environ.get(TRITON_VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{TRITON_VARIABLE}={value!r}: 0 switches Triton off, 1 (or nothing) leaves it on")
    return value == "1"


_compared_with = False
"""Whether `without_triton` is in effect."""


Tensors = tuple[torch.Tensor, ...]
"""Tensors [s, ...] of the same rows: (lse, out) of some queries, (dk, dv) or (dq,)."""


def merge_rows(into: Tensors, parts: Sequence[Tensors]) -> None:
    """into = attention over all the keys over which `parts` are attention of the same queries: the online softmax.

    Each is (lse [s, b, h], out [s, b, h, d]), natural log; strided views are fine. Summed in `into`'s lse's dtype,
    float32 or wider, whatever the outs are in: ring_size merges in bfloat16 multiply the RMS error by 5 or more. A row
    that has seen nothing has out = 0 and lse = -inf. `into` may be the first part. LoongTrain algorithm 1;
    FlashAttention (arXiv 2205.14135) section 3.1.

        lse = log(sum_i exp(lse_i))      out = sum_i exp(lse_i - lse) * out_i
    """
    lse, out = into
    if _combined_by_triton(into, parts):
        return
    if len(parts) == 1:
        for target, source in zip(into, parts[0], strict=True):
            target.copy_(source)
        return
    lses = [part_lse.to(lse.dtype) for part_lse, _ in parts]
    total = functools.reduce(torch.logaddexp, lses)
    first, *weights = torch.stack(lses, -1).sub_(finite(total).unsqueeze(-1)).exp_().split(1, -1)
    wide = out if out.dtype == lse.dtype else torch.empty_like(out, dtype=lse.dtype)
    torch.mul(parts[0][1].to(lse.dtype), first, out=wide)
    for (_, x), weight in zip(parts[1:], weights, strict=True):
        wide.addcmul_(x.to(lse.dtype), weight)
    if wide is not out:
        out.copy_(wide)
    lse.copy_(total)


def add_rows(into: Tensors, parts: Sequence[Tensors]) -> None:
    """into = the sum of `parts`, each (dk, dv) or (dq,): tensors [s, b, heads, d] in any memory order and dtypes.

    Summed in float32 (float64) and rounded once. `into` may be the first part.
    """
    if len(parts) == 1:
        copy_rows_(list(zip(into, parts[0], strict=True)))
        return
    for target, first, *others in zip(into, *parts, strict=True):
        if _combined_by_triton((target,), [(first,), *((x,) for x in others)]):
            continue
        dtype = torch.promote_types(first.dtype, torch.float32)
        total = target if target.dtype == dtype else torch.empty_like(target, dtype=dtype)
        torch.add(first.to(dtype), others[0], out=total)
        for x in others[1:]:
            total.add_(x)
        if total is not target:
            target.copy_(total)


def _combined_by_triton(into: Tensors, parts: Sequence[Tensors]) -> bool:
    if not _by_triton(into[-1]) or any(x[-1].stride(-1) != 1 for x in (into, *parts)):
        return False
    triton_row_ops = _triton()
    while len(parts) > triton_row_ops.SLOTS:
        wide = torch.promote_types(parts[0][0].dtype, torch.float32)
        total = tuple(torch.empty(x.shape, dtype=wide, device=x.device) for x in into)
        triton_row_ops.combine(total, parts[: triton_row_ops.SLOTS])
        parts = [total, *parts[triton_row_ops.SLOTS :]]
    triton_row_ops.combine(into, parts)
    return True


def finite(lse: torch.Tensor) -> torch.Tensor:
    """lse with the least finite number for -inf, so that -inf less it is -inf and not NaN, and exp of that 0."""
    return lse.clamp_min(torch.finfo(lse.dtype).min)


def copy_rows_(
    pairs: Sequence[Pair], *, source_rows: torch.Tensor | None = None, target_rows: torch.Tensor | None = None
) -> None:
    """target = source for every pair; three pairs a launch.

    source_rows (int64): row i of a target is row source_rows[i] of its source. target_rows (int64): row i of a source
    goes to row target_rows[i] of its target, each row of the target at most once. One of them at most; not checked
    against the number of rows, since that would make the device wait.
    """
    assert source_rows is None or target_rows is None
    for target, source in _move(pairs, source_rows=source_rows, target_rows=target_rows):
        if source_rows is not None and target.is_contiguous() and target.dtype == source.dtype:
            torch.index_select(source, 0, source_rows, out=target)
        elif source_rows is not None:
            target.copy_(source.index_select(0, source_rows))
        elif target_rows is not None:
            target.index_copy_(0, target_rows, source.to(target.dtype))
        else:
            target.copy_(source)


def triton_fault() -> str | None:
    """None where Triton serves tensors on the current GPU, else the reason why PyTorch does."""
    if not wanted():
        return f"{TRITON_VARIABLE}=0"
    return _import_fault() if torch.cuda.is_available() else "no GPU here"


@contextlib.contextmanager
def without_triton() -> Iterator[None]:
    """PyTorch's passes inside, whatever is installed: to compare with."""
    global _compared_with
    before, _compared_with = _compared_with, True
    try:
        yield
    finally:
        _compared_with = before


def _move(pairs: Sequence[Pair], *, source_rows: torch.Tensor | None, target_rows: torch.Tensor | None) -> list[Pair]:
    """Does what Triton can; returns the pairs that are left to PyTorch."""
    pairs = [x for x in pairs if x[1].numel()]
    if not pairs or not _by_triton(pairs[0][0]):
        return pairs
    triton_row_ops = _triton()
    indexed = source_rows is not None or target_rows is not None
    walked, left = [], []
    for target, source in pairs:
        # One of the two may have more rows than are moved; the kernel goes over the others'.
        fewer = source if source_rows is None else target
        way = sweep(fewer.shape, target.stride(), source.stride(), indexed)
        if way is None:
            left.append((target, source))
        else:
            walked.append((target, source, way))
    for start in range(0, len(walked), triton_row_ops.PAIRS):
        launched = walked[start : start + triton_row_ops.PAIRS]
        triton_row_ops.move_(launched, source_rows=source_rows, target_rows=target_rows)
    return left


def _by_triton(x: torch.Tensor) -> bool:
    if not x.is_cuda or _compared_with or not _served(x.device):
        return False
    # Triton launches on the current device, whatever device the tensors are on.
    return x.device.index == torch.cuda.current_device()


@functools.cache
def _served(device: torch.device) -> bool:
    """Whether Triton does the passes of a GPU, and the environment lets it: asked once, at the first use, for asking
    takes longer than launching."""
    return triton_fault() is None


def _triton() -> ModuleType:
    return importlib.import_module("megatron_loong.kernels.triton_row_ops")


@functools.cache
def _import_fault() -> str | None:
    if torch.version.hip is not None:
        return "not tried on ROCm"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        _triton()
    except (ImportError, OSError, RuntimeError) as error:
        return f"Triton does not import ({(str(error).splitlines() or [type(error).__name__])[0]})"
    return None


# How a kernel walks over two strided tensors at once: as few dimensions, as long an inner one, as there can be.


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
