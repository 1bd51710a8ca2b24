"""What a checkpointed function keeps of its attention, so that its replay need not run the ring again.

A `Stash` belongs to one call of a checkpointed function. It records in the first run and hands the results out in the
replay, in call order. Attention calls `take` and `keep`. Which stashes listen is kept for each thread, because autograd
runs the backward pass, and so a replay, on a thread of its own. (LoongTrain, arXiv 2406.18485, section 4.5)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

#: How much of an attention call is kept: nothing, the ring's result, or also both all-to-alls' results.
Level = Literal["nothing", "ring", "exchange"]
LEVELS: tuple[Level, ...] = ("nothing", "ring", "exchange")


@dataclass(frozen=True)
class Kept:
    """What one attention call leaves behind. Tensors have no graph; `exchanged` is None at level `ring`."""

    ring: tuple[torch.Tensor, torch.Tensor]
    """out [S/ring, b, h/hp, dv] in q's dtype and lse [S/ring, b, h/hp] in float32 (float64): after the all-to-all."""
    exchanged: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    """q after the all-to-all, the flat KV block after it, and the output after the all-to-all back."""


Tensors = tuple[torch.Tensor, ...]

#: Given tensors, puts them away and returns how to get them back.
Park = Callable[[Tensors], Callable[[], Tensors]]


def _leave_in_place(tensors: Tensors) -> Callable[[], Tensors]:
    return lambda: tensors


class Stash:
    """The attention results of one call of a checkpointed function.

    `park` decides where they are kept meanwhile: by default on the device, in `recompute.offload` on the host. An entry
    is dropped when it is handed out, so its memory is free as soon as the backward pass of the replayed layer is done.
    A second replay (a backward pass with `retain_graph=True`) finds nothing and runs the ring again, with the same
    results.
    """

    def __init__(self, park: Park = _leave_in_place) -> None:
        self._park = park
        self._entries: list[tuple[tuple[Any, ...], Callable[[], Tensors]]] = []
        self._recorded = 0
        self._replays = 0

    def __len__(self) -> int:
        """Calls whose results are still here."""
        return len(self._entries)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Attention of this thread is kept here. An exception in the function leaves the stash empty."""
        self._entries.clear()
        try:
            with _listening(self, "record"):
                yield
        except BaseException:
            self._entries.clear()
            raise
        self._recorded = len(self._entries)
        self._entries.reverse()  # so that handing out in order is a pop from the end

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """Attention of this thread is answered from here. `RuntimeError` when it calls other attention than it did."""
        self._replays += 1
        try:
            with _listening(self, "replay"):
                yield
            if self._entries:
                calls = self._recorded - len(self._entries)
                raise RuntimeError(
                    f"a checkpointed function called attention {self._recorded} times in its first run and {calls} "
                    "times in the replay; what it does must not change in between"
                )
        finally:
            self._entries.clear()

    def next(self, signature: tuple[Any, ...]) -> Kept | None:
        """The next entry; None from the second replay on. `RuntimeError` when the first run went another way."""
        # Entries are dropped when they are handed out, so only the first replay finds any.
        if self._replays > 1:
            return None
        recorded, restore = self._entries.pop() if self._entries else (None, None)
        if restore is None or recorded != signature:
            raise RuntimeError(
                f"a checkpointed function called attention with {signature} in its replay, and with {recorded} in its "
                "first run; what it does must not change in between"
            )
        out, lse, *exchanged = restore()
        return Kept((out, lse), (exchanged[0], exchanged[1], exchanged[2]) if exchanged else None)

    def add(self, signature: tuple[Any, ...], tensors: Tensors) -> None:
        """Keep one entry: the tensors of a `Kept`."""
        # What `park` returns is all that is kept: if it has them on the host, their device memory can be freed.
        self._entries.append((signature, self._park(tensors)))


def take(*signature: Any) -> Kept | None:
    """What the first run kept of this attention call; None outside of a replay, and where nothing was kept.

    `signature` is anything that must be equal in both runs, such as shapes.
    """
    if _thread.level == "nothing":
        return None
    # Nested checkpoints: every stash that replays must move on by one entry, whichever entry is used. The innermost is
    # the last of the stack.
    kept = None
    for stash, mode in _thread.stack:
        if mode == "replay":
            kept = stash.next(signature)
    return kept


def keep(
    *signature: Any,
    ring: tuple[torch.Tensor, torch.Tensor],
    exchanged: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Offer an attention call's results to every stash that records (checkpoints may be nested)."""
    recording = [stash for stash, mode in _thread.stack if mode == "record"]
    if not recording or _thread.level == "nothing":
        return
    tensors = tuple(map(_apart, ring + exchanged if _thread.level == "exchange" else ring))
    for stash in recording:
        stash.add(signature, tensors)


def _apart(x: torch.Tensor) -> torch.Tensor:
    """x without a graph (autograd may be about to give it one) and without a larger buffer that it is a view of."""
    x = x.detach()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


@contextlib.contextmanager
def keeping(level: Level) -> Iterator[None]:
    """How much of the attention inside is kept; "nothing" leaves it alone in first run and replay. Default: "ring"."""
    before, _thread.level = _thread.level, level
    try:
        yield
    finally:
        _thread.level = before


class _Thread(threading.local):
    def __init__(self) -> None:
        self.level: Level = "ring"
        self.stack: list[tuple[Stash, str]] = []


_thread = _Thread()


@contextlib.contextmanager
def _listening(stash: Stash, mode: str) -> Iterator[None]:
    _thread.stack.append((stash, mode))
    try:
        yield
    finally:
        _thread.stack.pop()
