"""All ranks of a context-parallel group in one process on one device: a thread each, messages through queues.

What runs is the attention's own code, schedule and all; only the transport is another. For exactness on a single GPU,
or on a CPU, without any process group. Not for timing: the ranks take turns.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch

from megatron_loong.comm.groups import COMMUNICATORS, GroupHandle, LoongGroups
from megatron_loong.comm.transport import Message, Pending, Transport
from megatron_loong.config import LoongConfig
from megatron_loong.layout.ranks import group_members

Result = TypeVar("Result")
Boxes = dict[tuple[str, int, int, int], queue.SimpleQueue[torch.Tensor]]
"""By communicator, sender, receiver and number of the message between them."""
TransportMaker = Callable[[str, int, tuple[int, ...]], Transport]
"""(name of the communicator, own cp_rank, members in the order of their coordinates) -> its transport."""


def groups_without_processes(
    config: LoongConfig, cp_rank: int, make: TransportMaker, timeout: timedelta = timedelta(minutes=1)
) -> LoongGroups:
    """The groups of one rank as `build_groups` would make them, with other transports in the place of process groups.

    Global ranks are cp_ranks.
    """
    handles = {}
    for name, axis in COMMUNICATORS.items():
        members = tuple(next(x for x in group_members(config, axis) if cp_rank in x))
        group: Any = make(name, cp_rank, members) if len(members) > 1 else None
        handles[name] = GroupHandle(name, members, members.index(cp_rank), group, timeout)
    return LoongGroups(config, tuple(range(config.context_parallel_size)), cp_rank, handles)


def simulate(
    config: LoongConfig, function: Callable[[LoongGroups], Result], timeout: timedelta = timedelta(minutes=1)
) -> list[Result]:
    """`function(groups)` on every rank at the same time; results by cp_rank.

    Raises what a rank raised; ranks that then wait for it in vain end after `timeout`, and their errors are dropped.
    Global lengths must be given to `attention_2d` (`seq_len`), for there is no group to ask.
    """
    boxes: Boxes = {}
    results: list[Any] = [None] * config.context_parallel_size
    errors: list[BaseException] = []
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run(cp_rank: int) -> None:
        if device is not None:
            torch.cuda.set_device(device)
        groups = groups_without_processes(config, cp_rank, lambda *own: _Mailbox(boxes, timeout, *own), timeout)
        try:
            # Otherwise the backward of all ranks runs on one thread per GPU, on which they would wait for each other.
            with torch.autograd.set_multithreading_enabled(False):
                results[cp_rank] = function(groups)
        except BaseException as error:  # raised again by the caller
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(config.context_parallel_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


class _Mailbox(Transport):
    """One rank's end of one communicator.

    Strict where a network is lenient: a block to receive into is poisoned until it is waited for, and a block that
    was changed between its sending and the wait is an error.
    """

    batched = False

    def __init__(self, boxes: Boxes, timeout: timedelta, name: str, rank: int, members: tuple[int, ...]) -> None:
        self._boxes, self._name, self._rank, self._members = boxes, name, rank, members
        self._timeout_s = timeout.total_seconds()
        self._counts: Counter[tuple[bool, int]] = Counter()

    def post(self, messages: Sequence[Message]) -> Pending[None]:
        """A send leaves at once; a receive takes what has come when it is waited for."""
        (message,) = messages
        if message.send:
            snapshot = message.block.clone()
            self._box(True, message.peer).put(snapshot)
            return functools.partial(_check_unchanged, message.block, snapshot)
        message.block.view(torch.uint8).fill_(255)  # NaN, whatever the bytes are taken for
        # Messages pair up in the order of posting, whatever is waited for first.
        return functools.partial(self._fill, message.block, message.peer, self._box(False, message.peer))

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_lengths: Sequence[int], sent_lengths: Sequence[int]
    ) -> Pending[None]:
        """A message from everyone to everyone."""
        for peer, piece in enumerate(sent.split(list(sent_lengths))):
            self._box(True, peer).put(piece.clone())
        pieces = [(piece, x, self._box(False, x)) for x, piece in enumerate(received.split(list(received_lengths)))]

        def arrive() -> None:
            for piece in pieces:
                self._fill(*piece)

        return arrive

    def _box(self, send: bool, peer: int) -> queue.SimpleQueue[torch.Tensor]:
        """Where the next message to or from a peer is handed over."""
        index = self._counts[send, peer]
        self._counts[send, peer] += 1
        other = self._members[peer]
        sender, receiver = (self._rank, other) if send else (other, self._rank)
        return self._boxes.setdefault((self._name, sender, receiver, index), queue.SimpleQueue())

    def _fill(self, block: torch.Tensor, peer: int, box: queue.SimpleQueue[torch.Tensor]) -> None:
        try:
            block.copy_(box.get(timeout=self._timeout_s))
        except queue.Empty:
            sender = f"rank {self._members[peer]}"
            raise RuntimeError(f"{sender} sent nothing on {self._name} in {self._timeout_s:g} s") from None


def _check_unchanged(block: torch.Tensor, snapshot: torch.Tensor) -> None:
    if not torch.equal(block.view(torch.uint8), snapshot.view(torch.uint8)):
        raise RuntimeError("a block was written between its sending and the wait for it")
