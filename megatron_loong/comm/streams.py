"""CUDA streams beside the current one: for what moves bytes while the current one computes."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=16)
def side_stream(device: torch.device, use: str) -> torch.cuda.Stream:
    """The one stream of a CUDA device for a use."""
    return torch.cuda.Stream(device)
