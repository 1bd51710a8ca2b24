"""How blocks travel in a process group: handed to its backend as they are, or staged through host memory.

NCCL takes CUDA tensors and orders itself by streams. gloo's point-to-point messages and all-to-all take host memory
only: blocks on a GPU are copied out before a send and back in at the wait, so that several ranks can share one GPU.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from megatron_loong.comm.streams import side_stream

Pending = Callable[[timedelta], object]
"""Waits for what was posted, at most so long; to be called once. Holds what must not go before."""


class End(NamedTuple):
    """One end of a message."""

    send: bool
    peer: int
    """Global rank of the other end."""
    block: torch.Tensor
    """Contiguous."""


class Transport(ABC):
    """Messages and all-to-alls of one process group. A `GroupHandle` may have one in the place of its group."""

    batched: bool
    """Whether all that is posted together is waited for together: `post` then yields once, else once for each end."""

    @abstractmethod
    def post(self, ends: Sequence[End]) -> Iterator[Pending]:
        """Begin the messages of one step, in order; raises `RuntimeError` or `ValueError` at the one that fails."""

    @abstractmethod
    def all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_lengths: Sequence[int],
        sent_lengths: Sequence[int],
    ) -> Pending:
        """Begin to exchange pieces of flat buffers, in the group's own order of ranks; lengths in elements."""

    def buffer(self, size: int, device: torch.device) -> torch.Tensor:
        """Uninitialised uint8 [size]: for what is to be sent, and then not written any more."""
        return torch.empty(size, dtype=torch.uint8, device=device)


class Direct(Transport):
    """By a backend that takes the blocks as they are."""

    def __init__(self, group: dist.ProcessGroup, backend: str) -> None:
        self._group = group
        self.batched = backend != "gloo"

    def post(self, ends: Sequence[End]) -> Iterator[Pending]:
        """gloo: one by one. NCCL: one group call, so that no order of sends and receives can deadlock a ring of two."""
        if not self.batched:
            for end in ends:
                function = dist.isend if end.send else dist.irecv
                work = function(end.block, end.peer, group=self._group)
                assert work is not None
                yield functools.partial(_wait_for, work, end.block)
            return
        operations = [dist.P2POp(dist.isend if x.send else dist.irecv, x.block, x.peer, self._group) for x in ends]
        works = dist.batch_isend_irecv(operations)

        def wait(timeout: timedelta, blocks: Sequence[End] = ends) -> None:
            # Given a timeout, NCCL's wait() blocks the host until the message is here; without one it makes the
            # current stream wait, and NCCL's watchdog ends the process after the group's own timeout.
            for work in works:
                work.wait()

        yield wait

    def all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_lengths: Sequence[int],
        sent_lengths: Sequence[int],
    ) -> Pending:
        """One call of the backend."""
        work = dist.all_to_all_single(
            received, sent, list(received_lengths), list(sent_lengths), group=self._group, async_op=True
        )
        assert work is not None
        return (lambda timeout: work.wait()) if self.batched else work.wait


def _wait_for(work: dist.Work, block: torch.Tensor, timeout: timedelta) -> None:
    # gloo's wait() without an argument ignores the timeout of the group.
    work.wait(timeout)


class HostMemory(Protocol):
    """Buffers on the host and the copies between them and a device."""

    def buffer(self, block: torch.Tensor) -> torch.Tensor:
        """An uninitialised host tensor like `block`."""
        ...

    def copy_out(self, block: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        """Begin to copy a block to the host; returns the copy and what waits until it is complete."""
        ...

    def copy_in(self, host: torch.Tensor, block: torch.Tensor) -> None:
        """Copy to the device, before anything that the current stream does later."""
        ...


class PinnedMemory:
    """`HostMemory` of a CUDA device. Pinned buffers come from torch's caching allocator and go back to it."""

    def buffer(self, block: torch.Tensor) -> torch.Tensor:
        """Pinned."""
        return torch.empty(block.shape, dtype=block.dtype, pin_memory=True)

    def copy_out(self, block: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        """On a stream of its own, behind what the current stream has done; the host waits for this copy alone."""
        host, stream = self.buffer(block), side_stream(block.device, "staging")
        stream.wait_stream(torch.cuda.current_stream(block.device))
        with torch.cuda.stream(stream):
            host.copy_(block, non_blocking=True)
            complete = stream.record_event()
        # Whoever frees the block does so on another stream than the one that reads it here.
        block.record_stream(stream)
        return host, complete.synchronize

    def copy_in(self, host: torch.Tensor, block: torch.Tensor) -> None:
        """On the current stream, which reads the block next; the allocator keeps `host` until the copy is done."""
        block.copy_(host, non_blocking=True)


class Staged(Transport):
    """gloo for blocks of a device that it cannot read: through host memory.

    The host waits for the copies out before it posts the sends, for gloo knows no streams; all copies of a step run
    before the first of these waits.
    """

    batched = False

    def __init__(self, wire: Transport, memory: HostMemory) -> None:
        self._wire, self._memory = wire, memory

    def post(self, ends: Sequence[End]) -> Iterator[Pending]:
        """Copies out all that is to be sent, then posts one by one; blocks to receive into are filled at their wait."""
        outgoing = iter([self._memory.copy_out(end.block) for end in ends if end.send])
        for end in ends:
            if end.send:
                host, wait_for_copy = next(outgoing)
                wait_for_copy()
                yield from self._wire.post([end._replace(block=host)])
            else:
                host = self._memory.buffer(end.block)
                (arrival,) = self._wire.post([end._replace(block=host)])
                yield functools.partial(self._arrive, arrival, host, end.block)

    def _arrive(self, arrival: Pending, host: torch.Tensor, block: torch.Tensor, timeout: timedelta) -> None:
        arrival(timeout)
        self._memory.copy_in(host, block)

    def all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_lengths: Sequence[int],
        sent_lengths: Sequence[int],
    ) -> Pending:
        """Copy out, exchange; copy in at the wait."""
        outgoing, wait_for_copy = self._memory.copy_out(sent)
        incoming = self._memory.buffer(received)
        wait_for_copy()
        arrival = self._wire.all_to_all(incoming, outgoing, received_lengths, sent_lengths)
        return functools.partial(self._arrive, arrival, incoming, received)
