"""The hops of a ring: post, compute, wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_loong.comm import ledger
from megatron_loong.comm.errors import CommunicationError
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


class Ring:
    """Point-to-point messages between the members of one communicator."""

    def __init__(self, handle: GroupHandle) -> None:
        self.handle = handle

    def post(self, messages: Sequence[Message]) -> list[Wait]:
        """Begin all messages of one step; returns, for each, the function that waits for it (once).

        Both ends post a message in the same step, so a step never depends on a later one. A failure to post or to
        arrive in the group's timeout raises `CommunicationError` from the wait or from here, naming group, message
        and peer.
        """
        group = self.handle.process_group
        assert group is not None, f"a ring of size 1 has nobody to talk to ({self.handle.name})"
        for message in messages:
            if message.send:
                ledger.record(self.handle.name, message.block.numel() * message.block.element_size())
        if dist.get_backend(group) == "gloo":
            return [self._waiting([message], self._post_alone(message, group)) for message in messages]
        # NCCL: one group call, so that a ring of two cannot deadlock on the order of its sends and receives.
        try:
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend if x.send else dist.irecv, x.block, self._global_rank(x), group)
                    for x in messages
                ]
            )
        except (RuntimeError, ValueError) as error:
            raise self._failure(messages, error) from error
        if len(works) == len(messages):
            return [self._waiting([message], work) for message, work in zip(messages, works, strict=True)]
        wait = self._waiting(messages, *works)
        return [wait] * len(messages)

    def _post_alone(self, message: Message, group: dist.ProcessGroup) -> dist.Work:
        peer = self._global_rank(message)
        try:
            if message.send:
                work = dist.isend(message.block, dst=peer, group=group)
            else:
                work = dist.irecv(message.block, src=peer, group=group)
        except (RuntimeError, ValueError) as error:
            raise self._failure([message], error) from error
        assert work is not None
        return work

    def _waiting(self, messages: Sequence[Message], *works: dist.Work) -> Wait:
        remaining = list(works)

        def wait() -> None:
            # A second wait() on a gloo p2p work blocks until the timeout, so each is waited for once, here; and
            # gloo's wait() without an argument ignores the timeout of the group.
            while remaining:
                try:
                    remaining.pop().wait(self.handle.timeout)
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
