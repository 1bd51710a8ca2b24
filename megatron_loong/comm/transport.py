"""How tensors travel in a process group: handed to its backend as they are, or copied through host memory.

NCCL takes CUDA tensors and orders itself by streams. gloo's point-to-point messages and its all-to-all take host memory
only, so tensors on a GPU are copied to the host before a send and back after a receive. That lets several ranks share
one GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from megatron_loong.comm.groups import GroupHandle

T = TypeVar("T")
Pending = Callable[[], T]
"""Waits for something that was begun and returns its result. To be called once."""


class Message(NamedTuple):
    """One end of a point-to-point message."""

    send: bool
    peer: int
    """Coordinate of the other end in its group."""
    block: torch.Tensor
    """Contiguous. Until the wait, a block that is sent must not be written, and one that is received not be read."""
    what: str
    """What the message carries, for errors."""


class Transport(ABC):
    """Messages and all-to-alls of one group. A simulation puts one in a `GroupHandle` in place of the process group."""

    batched: bool
    """Whether the messages of a step are posted in one call, and waited for together. If not, each is posted alone."""

    @abstractmethod
    def post(self, messages: Sequence[Message]) -> Pending[None]:
        """Begin the messages of a step, or a single one if not `batched`. Keeps their blocks alive until the wait."""

    @abstractmethod
    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_lengths: Sequence[int], sent_lengths: Sequence[int]
    ) -> Pending[None]:
        """Begin to exchange pieces of flat buffers with every coordinate of the group; lengths in elements."""


def transport_for(handle: GroupHandle, device: torch.device) -> Transport:
    """How tensors on `device` travel in a group. Chosen once, then kept in the handle."""
    if device not in handle.transports:
        handle.transports[device] = _chosen(handle, device)
    return handle.transports[device]


def _chosen(handle: GroupHandle, device: torch.device) -> Transport:
    group = handle.process_group
    assert group is not None, f"a group of one has nobody to talk to ({handle.name})"
    if isinstance(group, Transport):
        return group
    # Such as "cpu:gloo,cuda:nccl": a group may have a backend for each kind of device.
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    backend = backends.get(device.type, "gloo")
    direct = Direct(handle, backend)
    if backend != "gloo" or device.type == "cpu":
        return direct
    if device.type != "cuda":
        raise NotImplementedError(f"gloo cannot send tensors on {device.type}; staging is written for CUDA")
    return Staged(direct)


class Direct(Transport):
    """A backend that takes the tensors as they are."""

    def __init__(self, handle: GroupHandle, backend: str) -> None:
        self._handle = handle
        self._is_gloo = backend == "gloo"
        self.batched = not self._is_gloo
        # torch sorts the ranks of a group, so its order may differ from that of the coordinates.
        self._in_order = handle.order == sorted(handle.order)

    def post(self, messages: Sequence[Message]) -> Pending[None]:
        """gloo: one message. Other backends: one group call, without which a ring of two could deadlock."""
        group, ranks = self._handle.process_group, self._handle.global_ranks
        if self._is_gloo:
            (message,) = messages
            function = dist.isend if message.send else dist.irecv
            works = [function(message.block, ranks[message.peer], group=group)]
        else:
            works = dist.batch_isend_irecv(
                [dist.P2POp(dist.isend if x.send else dist.irecv, x.block, ranks[x.peer], group) for x in messages]
            )

        def wait(messages: Sequence[Message] = messages) -> None:  # the default argument keeps the blocks alive
            for work in works:
                assert work is not None
                self._wait_for(work)

        return wait

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_lengths: Sequence[int], sent_lengths: Sequence[int]
    ) -> Pending[None]:
        """One call of the backend."""
        order, in_order = self._handle.order, self._in_order
        incoming = received if in_order else torch.empty_like(received)
        if not in_order:
            pieces = sent.split(list(sent_lengths))
            sent = torch.cat([pieces[coordinate] for coordinate in order])
        incoming_lengths = [received_lengths[coordinate] for coordinate in order]
        work = dist.all_to_all_single(
            incoming,
            sent,
            incoming_lengths,
            [sent_lengths[coordinate] for coordinate in order],
            group=self._handle.process_group,
            async_op=True,
        )
        assert work is not None

        def wait() -> None:
            self._wait_for(work)
            if not in_order:
                pieces = received.split(list(received_lengths))
                for coordinate, piece in zip(order, incoming.split(incoming_lengths), strict=True):
                    pieces[coordinate].copy_(piece)

        return wait

    def _wait_for(self, work: dist.Work) -> None:
        if self._is_gloo:
            work.wait(self._handle.timeout)  # without an argument gloo ignores the timeout of the group
        else:
            # Given a timeout, NCCL's wait() would block the host until the message is here. Without one it makes the
            # current stream wait, and NCCL's watchdog ends the process after the group's timeout.
            work.wait()


class Staged(Transport):
    """gloo for tensors on a GPU, through pinned host memory."""

    batched = False

    def __init__(self, wire: Transport) -> None:
        self._wire = wire

    def host_buffer(self, block: torch.Tensor) -> torch.Tensor:
        """Uninitialised host memory of the shape of `block`."""
        return torch.empty(block.shape, dtype=block.dtype, pin_memory=True)

    def post(self, messages: Sequence[Message]) -> Pending[None]:
        """One message. A block that is received is filled at the wait."""
        (message,) = messages
        host = self.host_buffer(message.block)
        if message.send:
            host.copy_(message.block)  # blocks the host until the copy is complete, for gloo knows no streams
            return self._wire.post([message._replace(block=host)])
        return self._copied_back(self._wire.post([message._replace(block=host)]), host, message.block)

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_lengths: Sequence[int], sent_lengths: Sequence[int]
    ) -> Pending[None]:
        """Copies `sent` out and exchanges; `received` is filled at the wait."""
        outgoing, incoming = self.host_buffer(sent).copy_(sent), self.host_buffer(received)
        pending = self._wire.all_to_all(incoming, outgoing, received_lengths, sent_lengths)
        return self._copied_back(pending, incoming, received)

    @staticmethod
    def _copied_back(pending: Pending[None], host: torch.Tensor, block: torch.Tensor) -> Pending[None]:
        def wait() -> None:
            pending()
            # Runs before whatever the current stream does next; torch's allocator keeps `host` until then.
            block.copy_(host, non_blocking=True)

        return wait
