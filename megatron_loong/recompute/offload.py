"""Tensors that wait in host memory between forward and backward, brought back one checkpoint ahead of their use.

A `Parking` has one `Lot` per checkpointed call. Whoever asks for the first parcel of a lot gets the whole lot, and
the lot before it, which a backward wants next, sets off on a side stream. A wrong guess (an interleaved pipeline
schedule went elsewhere) costs one copy and no memory: the guess is dropped as soon as another lot is asked for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from megatron_loong.attention.stash import Tensors


class Parking:
    """The lots that wait, in the order in which they were opened."""

    def __init__(self) -> None:
        self._waiting: list[weakref.ref[Lot]] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.fetched_ahead = 0
        """Lots that set off before they were asked for and were then wanted."""
        self.fetched_late = 0
        """Lots that nobody had sent for when they were asked for."""

    def lot(self) -> Lot:
        """A place for what one checkpointed call leaves behind."""
        lot = Lot(self)
        self._waiting.append(weakref.ref(lot))
        return lot

    def waiting(self) -> list[Lot]:
        """Lots not asked for yet, oldest first; those whose owner is gone (an exception) are forgotten."""
        alive = [(ref, lot) for ref in self._waiting if (lot := ref()) is not None]
        self._waiting = [ref for ref, _ in alive]
        return [lot for _, lot in alive]

    def arrive(self, lot: Lot) -> None:
        """`lot` is wanted now: bring it, drop other guesses, send for the lot before it."""
        waiting = self.waiting()
        if lot not in waiting:
            return  # its later parcels
        index = waiting.index(lot)
        if lot.under_way:
            self.fetched_ahead += 1
        else:
            self.fetched_late += 1
        for other in waiting:
            if other is not lot:
                other.send_back()
        lot.send_for()
        del self._waiting[index]
        if index:
            waiting[index - 1].send_for()

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The side stream on which copies of a device run, both ways."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class Lot:
    """Parcels of one checkpointed call, which leave and return together."""

    def __init__(self, parking: Parking) -> None:
        self._parking = parking
        self._parcels: list[_Parcel] = []

    def park(self, tensors: Tensors) -> Callable[[], Tensors]:
        """Copy `tensors` to host memory; the caller lets go of them. Returns how to get them back.

        The host copy lasts as long as what is returned: a second backward through the same graph asks again.
        """
        parcel = _Parcel(tensors, self._parking)
        self._parcels.append(parcel)

        def restore() -> Tensors:
            self._parking.arrive(self)
            if parcel in self._parcels:
                self._parcels.remove(parcel)
            return parcel.take()

        return restore

    @property
    def under_way(self) -> bool:
        """Whether its parcels were sent for."""
        return bool(self._parcels) and all(parcel.on_device is not None for parcel in self._parcels)

    def send_for(self) -> None:
        """Start the way back of every parcel."""
        for parcel in self._parcels:
            parcel.send_for()

    def send_back(self) -> None:
        """Drop what was sent for; the host copies are still there."""
        for parcel in self._parcels:
            parcel.on_device = None


def inputs_wait_in(lot: Lot, args: tuple[Any, ...]) -> torch.autograd.graph.saved_tensors_hooks:
    """`with inputs_wait_in(lot, args): checkpoint(function, *args)`: the checkpointed inputs wait in `lot`.

    Those that carry a gradient; what layers share, such as rotary angles, stays. The function's first run saves
    nothing under these hooks: it has no graph (reentrant), or hooks of its own (non-reentrant).
    """
    moving = {x.data_ptr() for x in args if isinstance(x, torch.Tensor) and x.requires_grad}

    def pack(x: torch.Tensor) -> Callable[[], Tensors]:
        return lot.park((x,)) if x.data_ptr() in moving else lambda: (x,)

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda restore: restore()[0])


class _Parcel:
    """Tensors on the host, and, once sent for, on their device. On a CPU a copy in host memory is a plain copy."""

    def __init__(self, tensors: Tensors, parking: Parking) -> None:
        self.devices = [x.device for x in tensors]
        self.parking = parking
        self.on_device: list[torch.Tensor] | None = None
        self.ready: dict[torch.device, Any] = {}
        self.on_host = [self._to_host(x) for x in tensors]

    def _to_host(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cuda":
            return x.clone()
        host = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, pin_memory=True)
        stream = self.parking.stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is not given away before the copy has read it
        return host

    def send_for(self) -> None:
        if self.on_device is None:
            self.on_device = [self._to_device(x, d) for x, d in zip(self.on_host, self.devices, strict=True)]

    def _to_device(self, host: torch.Tensor, device: torch.device) -> torch.Tensor:
        if device.type != "cuda":
            return host.clone()
        stream = self.parking.stream(device)
        with torch.cuda.stream(stream):
            x = torch.empty_strided(host.size(), host.stride(), dtype=host.dtype, device=device)
            x.copy_(host, non_blocking=True)
        self.ready[device] = stream.record_event()
        return x

    def take(self) -> Tensors:
        self.send_for()
        assert self.on_device is not None
        tensors, self.on_device = tuple(self.on_device), None
        for device, event in self.ready.items():
            torch.cuda.current_stream(device).wait_event(event)
        for x in tensors:
            if x.device.type == "cuda":
                x.record_stream(torch.cuda.current_stream(x.device))
        return tensors
