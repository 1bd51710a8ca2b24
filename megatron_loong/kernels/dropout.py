"""Which pairs attention dropout drops: a hash of their place in the batch, so that order and layout do not matter."""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF


def keep_mask(
    seed: int, p: float, batch: int, heads: range, q_places: torch.Tensor, kv_places: torch.Tensor
) -> torch.Tensor:
    """True where a pair is kept: bool [batch, heads, s_q, s_kv], the same for a pair whoever asks and whenever.

    seed: 64 bits at most. q_places, kv_places: int64 [s_q], [s_kv], places in the whole sequence.
    """
    device = q_places.device
    state = torch.arange(batch, device=device).view(-1, 1, 1, 1) ^ (seed & _MASK)
    state = _mixed(state) ^ torch.arange(heads.start, heads.stop, device=device).view(-1, 1, 1) ^ (seed >> 32 & _MASK)
    state = _mixed(state) ^ q_places.view(-1, 1)
    state = _mixed(_mixed(state) ^ _mixed(kv_places + 0x9E3779B9 & _MASK))
    return state >= int(p * 2**32)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit integer hash (xorshift and multiply, constants of C. Wellons' lowbias32); int64 in, int64 out."""
    x = (x ^ x >> 16) * 0x7FEB352D & _MASK
    x = (x ^ x >> 15) * 0x846CA68B & _MASK
    return x ^ x >> 16
