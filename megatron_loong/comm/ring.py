"""The hops of a ring: post, compute, wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from megatron_loong.comm import ledger
from megatron_loong.comm.errors import CommunicationError
from megatron_loong.comm.routes import transport_for
from megatron_loong.comm.transport import End, Pending
from megatron_loong.topology.groups import GroupHandle

Wait = Callable[[], None]


class Message(NamedTuple):
    """One end of a hop."""

    send: bool
    peer: int
    """Coordinate of the other end on this ring."""
    block: torch.Tensor
    """Contiguous. Sent: not to be written until waited for. Received into: not to be read until waited for."""
    what: str
    """Says in errors where in the schedule this hop belongs."""


_NOTHING = torch.empty(0)


class Ring:
    """Point-to-point messages between the members of one communicator."""

    def __init__(self, handle: GroupHandle) -> None:
        self.handle = handle

    def buffer(self, size: int, device: torch.device) -> torch.Tensor:
        """Uninitialised uint8 [size]: to receive into, and send on."""
        return transport_for(self.handle, device).buffer(size, device)

    def post(self, messages: Sequence[Message]) -> list[Wait]:
        """Begin all messages of one step; returns, for each, the function that waits for it (once).

        Both ends post a message in the same step, so a step never depends on a later one. All blocks of a step are on
        one device; a wait makes its current stream wait, and the host only where gloo is. A failure to post or to
        arrive in the group's timeout raises `CommunicationError` from the wait or from here, naming group, message
        and peer.
        """
        for message in messages:
            if message.send:
                ledger.record(self.handle.name, message.block.numel() * message.block.element_size())
        transport = transport_for(self.handle, messages[0].block.device)
        pending: list[Pending] = []
        try:
            for one in transport.post([End(x.send, self._global_rank(x), x.block) for x in messages]):
                pending.append(one)
        except (RuntimeError, ValueError) as error:
            failed = messages if transport.batched else messages[len(pending) : len(pending) + 1]
            raise self._failure(failed, error) from error
        described = [x._replace(block=_NOTHING) for x in messages]  # how long blocks are kept is for the transport
        if transport.batched:
            return [self._waiting(described, pending)] * len(messages)
        return [self._waiting([message], [one]) for message, one in zip(described, pending, strict=True)]

    def _waiting(self, messages: Sequence[Message], pending: Sequence[Pending]) -> Wait:
        remaining = list(pending)

        def wait() -> None:
            # A second wait() on a gloo p2p work blocks until the timeout, so each is waited for once, here.
            while remaining:
                try:
                    remaining.pop()(self.handle.timeout)
                except RuntimeError as error:
                    raise self._failure(messages, error) from error

        return wait

    def _global_rank(self, message: Message) -> int:
        return self.handle.global_ranks[message.peer]

    def _failure(self, messages: Sequence[Message], error: Exception) -> CommunicationError:
        steps = ", ".join(dict.fromkeys(x.what for x in messages))
        ends = " and ".join(f"rank {self._global_rank(x)} ({'sending' if x.send else 'receiving'})" for x in messages)
        return CommunicationError(
            f"{self.handle.name} ring {list(self.handle.global_ranks)}, {steps}: the hop with {ends} did not complete; "
            f"that process is gone, or did not get here within the group's timeout. Cause: {error}"
        )
