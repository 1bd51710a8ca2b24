"""How trainers on Megatron cut a pack over context-parallel ranks, written anew from what they do. Helpers, no tests.

Each takes whole documents, pads them as that trainer does, and gives this rank's tokens and what the trainer tells
Megatron. All of them give rank r the chunks r and 2 * cp - 1 - r of each document.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


def cut_by_verl(x: torch.Tensor, cu_seqlens: Sequence[int], cp_size: int, cp_rank: int) -> torch.Tensor:
    """verl: a buffer of a rank's share of each document, its two halves filled from the front and from the back."""
    share = [(stop - start) // cp_size for start, stop in itertools.pairwise(cu_seqlens)]
    local = x.new_zeros(sum(share), *x.shape[1:])
    at = 0
    for (start, stop), held in zip(itertools.pairwise(cu_seqlens), share, strict=True):
        half = held // 2
        local[at : at + half] = x[start + cp_rank * half : start + (cp_rank + 1) * half]
        local[at + half : at + held] = x[stop - (cp_rank + 1) * half : stop - cp_rank * half]
        at += held
    return local


def verl(documents: Sequence[torch.Tensor], cp_size: int, cp_rank: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Documents padded to a multiple of 2 x cp; the padded boundaries twice."""
    padded = [_padded(x, 2 * cp_size) for x in documents]
    cu_seqlens = _boundaries(padded)
    told = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_q_padded": cu_seqlens}
    return cut_by_verl(torch.cat(padded), cu_seqlens, cp_size, cp_rank), told


def slime(documents: Sequence[torch.Tensor], cp_size: int, cp_rank: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Each document cut alone, then joined; the rank's pack padded at its end; its own boundaries times cp, alone."""
    parts = []
    for x in documents:
        chunk = -(-len(x) // (2 * cp_size))
        x = _padded(x, 2 * cp_size)
        first, second = cp_rank * chunk, (2 * cp_size - cp_rank - 1) * chunk
        parts.append(torch.cat([x[first : first + chunk], x[second : second + chunk]]))
    local = torch.cat(parts)
    missing = -len(local) % 6  # of a rank's pack, as tensor parallelism and fp8 want it; even, so that halves exist
    if missing:
        parts.append(local.new_zeros(missing, *local.shape[1:]))
    return torch.cat(parts), {"cu_seqlens_q": [cp_size * x for x in _boundaries(parts)]}


def nemo_rl(documents: Sequence[torch.Tensor], cp_size: int, cp_rank: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Each padded document seen as 2 x cp chunks, two of which are picked; the padded boundaries twice."""
    padded = [_padded(x, 2 * cp_size) for x in documents]
    picked = torch.tensor([cp_rank, 2 * cp_size - cp_rank - 1])
    parts = [x.view(2 * cp_size, -1, *x.shape[1:]).index_select(0, picked).flatten(0, 1) for x in padded]
    cu_seqlens = _boundaries(padded)
    return torch.cat(parts), {"cu_seqlens_q": cu_seqlens, "cu_seqlens_q_padded": cu_seqlens}


def bridge(documents: Sequence[torch.Tensor], cp_size: int, cp_rank: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Megatron-Bridge and Megatron's schedulers: real boundaries beside padded ones."""
    padded = [_padded(x, 2 * cp_size) for x in documents]
    told = {"cu_seqlens_q": _boundaries(documents), "cu_seqlens_q_padded": _boundaries(padded)}
    return cut_by_verl(torch.cat(padded), told["cu_seqlens_q_padded"], cp_size, cp_rank), told


PROGRAMS = {"verl": verl, "slime": slime, "nemo_rl": nemo_rl, "bridge": bridge}


def _padded(x: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -len(x) % multiple
    return F.pad(x, (*(0, 0) * (x.dim() - 1), 0, missing))


def _boundaries(parts: Sequence[torch.Tensor]) -> list[int]:
    ends = [0]
    for x in parts:
        ends.append(ends[-1] + len(x))
    return ends
