"""CUDA streams beside the current one: for what moves bytes while the current one computes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch


@functools.lru_cache(maxsize=16)
def side_stream(device: torch.device, use: str) -> torch.cuda.Stream:
    """The one stream of a CUDA device for a use."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def beside(stream: torch.cuda.Stream | None, *tensors: torch.Tensor) -> Iterator[Callable[[], None]]:
    """What is inside runs on `stream`, behind what the current stream has done; without a stream, at once.

    Yields what makes the stream that is current then wait for it. The allocator keeps `tensors` until it is done.
    """
    if stream is None:
        yield lambda: None
        return
    done = torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield lambda: torch.cuda.current_stream(stream.device).wait_event(done)
        done.record(stream)
    for x in tensors:
        x.record_stream(stream)
