"""Bytes of tensors that are alive, and their peak, counted as operators run: works on a CPU, where no allocator tells.

What is counted is storage, each once, from the operator that returned it until it is freed. Memory that an operator
takes and gives back inside itself is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as live: ...; live.peak_bytes`: storage made inside the block, and what `watch` was given.

    A backward inside the block is seen too: autograd runs CPU operators on the calling thread, under the same modes.
    Without an operator there is no event: `torch.empty` counts, a `.data` swap is noticed at the next operator on it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        """Bytes alive now."""
        self.peak_bytes = 0
        """Most bytes alive at once since the block began, or since `reset_peak`."""
        self.at_peak: str | None = None
        """The operator that reached the peak."""
        self._seen: dict[int, int] = {}
        self._paused = False

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were made before the block, such as parameters."""
        for x in tensors:
            self._count(x, "watch")

    def reset_peak(self) -> None:
        """Begin the search for the peak anew, from what is alive now."""
        self.peak_bytes, self.at_peak = self.live_bytes, None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is made inside is not counted, then or later, unless an operator outside returns a view of it."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and not self._paused:
                self._count(x, str(func))
        return result

    def _count(self, x: torch.Tensor, name: str) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return
        self._seen[key] = size
        self.live_bytes += size
        weakref.finalize(storage, self._forget, key)
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.at_peak = self.live_bytes, name

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._seen.pop(key, 0)
