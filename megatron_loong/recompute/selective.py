"""Selective Checkpoint++: recompute all of a layer but its attention (LoongTrain, arXiv 2406.18485, section 4.5).

The first forward keeps attention's `out` and `lse`; the replay before the backward takes them instead of running the
ring again. Bytes kept per attention call and rank: `S h d / N` elements of out and `4 S h / N` of lse (`kept_bytes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

from megatron_loong.attention.stash import Park, Stash, keeping

__all__ = ["Stash", "StashedFunction", "checkpoint", "context_fn", "keeping", "kept_bytes"]


class StashedFunction:
    """A function for a reentrant checkpoint (Megatron's, TransformerEngine's): run once, and again before backward.

    The first call records, each later one replays. The stash lives and dies with this object, which lives on the
    checkpoint's `ctx`: pipeline schedules may interleave as they like, and a graph that is thrown away after an
    exception takes its stash along.
    """

    def __init__(self, function: Callable[..., Any], *park: Park) -> None:
        self.function = function
        self.stash = Stash(*park)
        self._ran = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.stash.replaying() if self._ran else self.stash.recording():
            self._ran = True
            return self.function(*args, **kwargs)


def context_fn(*park: Park) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=context_fn)`.

    Returns the contexts of the first run and of the replay. torch calls it once per checkpointed call, so each has
    a stash of its own.
    """
    stash = Stash(*park)
    return stash.recording(), _Reusable(stash)


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`torch.utils.checkpoint` of `function(*args, **kwargs)` in which `attention_2d` runs its ring only once.

    Non-reentrant: works under `autograd.grad`, with keyword arguments and with inputs that need no gradient. RNG
    states are kept and put back, as torch does.
    """
    return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, context_fn=context_fn, **kwargs)


def kept_bytes(
    *,
    seq_len: int,
    batch: int,
    heads: int,
    value_head_dim: int,
    cp_size: int,
    dtype: torch.dtype,
    qk_head_dim: int | None = None,
    kv_heads: int | None = None,
    head_parallel_size: int = 1,
) -> int:
    """Bytes that one attention call keeps on a rank: `S b h d / N` elements of out and `S b h / N` of float32 lse.

    With `qk_head_dim` and `kv_heads` also what level "exchange" adds: q, k and v after the all-to-all, and, if there
    is one, the output after the all-to-all back.

    >>> kept_bytes(seq_len=1024, batch=1, heads=8, value_head_dim=64, cp_size=4, dtype=torch.bfloat16)
    270336
    """
    rows = seq_len * batch // cp_size
    out_bytes = rows * heads * value_head_dim * dtype.itemsize
    kept = out_bytes + rows * heads * max(4, dtype.itemsize)
    if qk_head_dim is None or kv_heads is None:
        return kept
    replicated = kv_heads * head_parallel_size // math.gcd(kv_heads, head_parallel_size)
    kept += rows * (heads * qk_head_dim + replicated * (qk_head_dim + value_head_dim)) * dtype.itemsize
    return kept + (out_bytes if head_parallel_size > 1 else 0)


class _Reusable:
    """A replay that torch may enter again, for a second backward through the same graph."""

    def __init__(self, stash: Stash) -> None:
        self.stash = stash

    def __enter__(self) -> None:
        self._replay = self.stash.replaying()
        self._replay.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._replay.__exit__(*error)
