"""When each rank computes, what is under way meanwhile, and when it waits: one forward and backward, recorded.

The clock is the machine's monotonic one, so the ranks of one machine (an emulated cluster too) share a time axis.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_TILES = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "forward",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "backward",
}


class Event(NamedTuple):
    """One stretch of time of one rank."""

    kind: str
    """`tile`: computing; `under way`: a message between its posting and the end of its wait; `wait`: blocked."""
    label: str
    """Of a tile `forward` or `backward`; else the communicator's description, such as `loong_inner_dkv`."""
    start_s: float
    end_s: float


class _Tiles(TorchDispatchMode):
    def __init__(self, events: list[Event]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        label = _TILES.get(func._schema.name)
        started = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if label:
            self.events.append(Event("tile", label, started, time.perf_counter()))
        return result


def _waited(wait: Callable[[], Any], label: str, posted_s: float, events: list[Event]) -> Any:
    """Wait, and note for how long and since when the message was under way."""
    started = time.perf_counter()
    result = wait()
    ended = time.perf_counter()
    events += [Event("wait", label, started, ended), Event("under way", label, posted_s, ended)]
    return result


class _Watched:
    """A `dist.Work` whose waits are noted."""

    def __init__(self, work: dist.Work, label: str, posted_s: float, events: list[Event]) -> None:
        self._work, self._label, self._posted_s, self._events = work, label, posted_s, events

    def wait(self, *args: Any) -> Any:
        """Wait, and note for how long and since when the message was under way."""
        return _waited(lambda: self._work.wait(*args), self._label, self._posted_s, self._events)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextmanager
def record_timeline() -> Iterator[list[Event]]:
    """Events of this process inside the block, from torch.distributed and the CPU flash operator themselves.

    Knows point-to-point messages and `all_to_all_single`; code that imported these functions by value goes
    unseen.
    """
    events: list[Event] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            label = getattr(kwargs.get("group"), "group_desc", "world")
            started = time.perf_counter()
            result = function(*args, **kwargs)
            if isinstance(result, list):
                return [_Watched(work, label, started, events) for work in result]
            if result is not None:
                return _Watched(result, label, started, events)
            events.append(Event("wait", label, started, time.perf_counter()))
            return None

        return call

    names = ("isend", "irecv", "all_to_all_single")
    patches = [mock.patch.object(dist, name, watched(getattr(dist, name))) for name in names]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(_Tiles(events))
        yield events


def shares(events: list[Event], start_s: float, end_s: float) -> dict[str, float]:
    """Parts of the span that a rank spent in `tile`, in `wait` and otherwise (`other`: copies, merges, Python).

    >>> parts = shares([Event("tile", "forward", 0, 5), Event("wait", "w", 5, 7)], 0, 10)
    >>> [round(parts[name], 2) for name in ("tile", "wait", "other")]
    [0.5, 0.2, 0.3]
    """
    span = end_s - start_s
    spent = {
        kind: sum(event.end_s - event.start_s for event in events if event.kind == kind) / span
        for kind in ("tile", "wait")
    }
    return {**spent, "other": 1 - spent["tile"] - spent["wait"]}
