"""Point-to-point messages along one axis of the layout: post, compute, wait."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_loong.comm import flight, ledger
from megatron_loong.comm.errors import errors_of
from megatron_loong.comm.groups import GroupHandle
from megatron_loong.comm.transport import Message, Pending, Transport, transport_for


class Ring:
    """Sends and receives between the members of one group."""

    def __init__(self, handle: GroupHandle) -> None:
        self.handle = handle

    def post(self, messages: Sequence[Message]) -> list[Pending[None]]:
        """Begin all messages of one step, whose blocks are on one device. Returns the wait of each.

        Both ends post a message in the same step, so no step depends on a later one. A wait makes the current stream
        of the device wait; with gloo it blocks the host. Raises `CommunicationError`, from here or from the wait, when
        a message fails or does not arrive within the group's timeout.
        """
        transport = transport_for(self.handle, messages[0].block.device)
        if transport.batched:
            return [self._begin(transport, messages)] * len(messages)
        return [self._begin(transport, [message]) for message in messages]

    def _begin(self, transport: Transport, messages: Sequence[Message]) -> Pending[None]:
        name, ranks = f"{self.handle.name} ring", self.handle.global_ranks
        operations = []
        for x in messages:
            size = x.block.numel() * x.block.element_size()
            if x.send:
                ledger.record(self.handle.name, size)
            way = "send" if x.send else "receive"
            operations.append(flight.begin(way, x.what, name, ranks, ranks[x.peer], size))
        # An error names both, the peer of this hop and all of the ring: a peer that only waits for a lost rank looks
        # lost itself from here.
        with errors_of(operations):
            begun = [transport.post(messages)]

        def wait() -> None:
            # A batch is waited for by each of its messages, but a second wait() of a gloo work would block until the
            # timeout. Popping it also frees its blocks.
            while begun:
                flight.wait(operations)
                with errors_of(operations):
                    begun.pop()()
                flight.done(operations)

        return wait
