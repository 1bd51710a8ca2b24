"""Messages between processes of one node by memory that they share (`topology.shared_memory`).

A message costs its receiver one copy, and its sender one more unless what is sent was written into the memory to begin
with, as what is packed for an all-to-all, and blocks that are sent on. gloo's go through the sockets of the kernel and
wake a thread at either end, which costs more where ranks share cores.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch

from megatron_loong.comm import ledger
from megatron_loong.comm.transport import End, Pending, Transport
from megatron_loong.topology.groups import GroupHandle
from megatron_loong.topology.shared_memory import Neighbours, Outbox


class SharedMemory(Transport):
    """Messages and all-to-alls of a communicator whose members are neighbours, all of them."""

    batched = False

    def __init__(self, handle: GroupHandle, neighbours: Neighbours) -> None:
        self.name = handle.name
        self._timeout_s = handle.timeout.total_seconds()
        self._slots, self._boxes = neighbours
        self._members, self._place = sorted(handle.global_ranks), handle.slots[handle.rank]

    def buffer(self, size: int, device: torch.device) -> torch.Tensor:
        """In the shared memory, where neighbours read it; used again when nobody holds its storage."""
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        start = self._slots.take(size)
        memory = memoryview(self._slots.region.map)[start : start + size]
        # The storage of the tensor holds this view, and nobody else does.
        weakref.finalize(memory, self._slots.give_back, start, size).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8)

    def post(self, ends: Sequence[End]) -> Iterator[Pending]:
        """What is sent is read where it is, or in a copy if it is none of `buffer`; what arrives is read at the wait.

        The wait for what is sent ends, as with gloo, when its receiver has posted: nobody runs farther ahead.
        """
        for end in ends:
            if not end.send:
                yield self._arrival(end.peer, end.block)
                continue
            block = self._shared(end.block.view(-1).view(torch.uint8))
            yield functools.partial(_until_expected, *self._put(end.peer, block))

    def all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_lengths: Sequence[int],
        sent_lengths: Sequence[int],
    ) -> Pending:
        """Of uint8 buffers. The wait ends when the others have read theirs, so that the memory is free then.

        Everyone waits at this place, and nobody needs for that what others send later.
        """
        ours, theirs = self._shared(sent).split(sent_lengths), received.split(received_lengths)
        me, size = self._place, len(self._members)
        others = [*range(me + 1, size), *range(me)]  # not all to and from the same at once
        sent_to = [self._put(self._members[i], ours[i]) for i in others]
        arrivals = [self._arrival(self._members[i], theirs[i]) for i in others]
        theirs[me].copy_(ours[me])

        def wait(timeout: timedelta) -> None:
            for arrival in arrivals:
                arrival(timeout)
            for outbox, number in sent_to:
                outbox.wait_until_read(number, timeout.total_seconds())

        return wait

    def _shared(self, block: torch.Tensor) -> torch.Tensor:
        """A block of bytes where neighbours can read it."""
        where = block.data_ptr() - self._slots.region.start
        return block if where in self._slots.taken else self.buffer(block.numel(), block.device).copy_(block)

    def _put(self, peer: int, block: torch.Tensor) -> tuple[Outbox, int]:
        """Leave a block of the region to be read, which is not to be written any more."""
        length = block.numel()
        ledger.hand_over(peer, length)
        outbox, _ = self._boxes[peer]
        start = block.data_ptr() - self._slots.region.start
        return outbox, outbox.put(start, length, block, self._timeout_s)

    def _arrival(self, peer: int, block: torch.Tensor) -> Pending:
        _, inbox = self._boxes[peer]
        number, length = inbox.expect(), block.numel() * block.element_size()
        return lambda timeout: inbox.read(number, block.data_ptr(), length, timeout.total_seconds())


def _until_expected(outbox: Outbox, number: int, timeout: timedelta) -> None:
    outbox.wait_until_expected(number, timeout.total_seconds())
