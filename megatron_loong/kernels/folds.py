"""The memory-bound passes of attention: fold a block into the running result, add up gradients, pack rows.

On NVIDIA GPUs with Triton each is one kernel (`triton_folds`), elsewhere a few of PyTorch's; the numbers agree to
rounding. Nothing here is recorded by autograd.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch

from megatron_loong.kernels.sweep import sweep

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


def merge_(out: torch.Tensor, lse: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor) -> None:
    """Fold (block_out, block_lse) into (out, lse), in place: the online softmax.

    Shapes: out, block_out [b, s, h, d]; lse, block_lse [b, s, h], natural log; strided views are fine. `out` and `lse`
    are float32 or wider: ring_size folds in bfloat16 multiply the RMS error by 5 or more. A row that has seen nothing
    yet has out = 0 and lse = -inf, in the block too. LoongTrain algorithm 1; FlashAttention
    (arXiv 2205.14135) section 3.1.

        lse' = log(exp(lse) + exp(block_lse))      out' = out + sigmoid(block_lse - lse) * (block_out - out)
    """
    if out.numel() and _by_triton(out):
        _triton().merge_(out, lse, block_out, block_lse)
        return
    out.lerp_(block_out.to(out.dtype), torch.sigmoid(block_lse - finite(lse)).unsqueeze(-1).to(out.dtype))
    torch.logaddexp(lse, block_lse.to(lse.dtype), out=lse)


def finite(lse: torch.Tensor) -> torch.Tensor:
    """lse with the least finite number for -inf, so that -inf less it is -inf and not NaN, and exp of that 0."""
    return lse.clamp_min(torch.finfo(lse.dtype).min)


def add_rows_(pairs: Sequence[Pair]) -> None:
    """target += source for every pair, in the target's dtype; three pairs a launch.

    For gradients of a tile, such as dk and dv, that go into float32 sums: sources [s, b, heads, d] in any memory order
    (a kernel's [b, s, heads, d], transposed), targets rows of the sums. Targets must not overlap.
    """
    for target, source in _move(pairs, add=True):
        target.add_(source)


def copy_rows_(
    pairs: Sequence[Pair], *, source_rows: torch.Tensor | None = None, target_rows: torch.Tensor | None = None
) -> None:
    """target = source for every pair; three pairs a launch.

    source_rows (int64): row i of a target is row source_rows[i] of its source. target_rows (int64): row i of a source
    goes to row target_rows[i] of its target, each row of the target at most once. One of them at most; not checked
    against the number of rows, since that would make the device wait.
    """
    assert source_rows is None or target_rows is None
    for target, source in _move(pairs, add=False, source_rows=source_rows, target_rows=target_rows):
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


def _move(
    pairs: Sequence[Pair],
    *,
    add: bool,
    source_rows: torch.Tensor | None = None,
    target_rows: torch.Tensor | None = None,
) -> list[Pair]:
    """Does what Triton can; returns the pairs that are left to PyTorch."""
    pairs = [x for x in pairs if x[1].numel()]
    if not pairs or not _by_triton(pairs[0][0]):
        return pairs
    triton_folds = _triton()
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
    for start in range(0, len(walked), triton_folds.PAIRS):
        launched = walked[start : start + triton_folds.PAIRS]
        triton_folds.move_(launched, add=add, source_rows=source_rows, target_rows=target_rows)
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
    return importlib.import_module("megatron_loong.kernels.triton_folds")


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
