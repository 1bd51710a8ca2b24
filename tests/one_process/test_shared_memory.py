"""Memory that processes of a node share: letters and their order, slots and their use, processes that are gone."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_loong.topology import shared_memory
from megatron_loong.topology.shared_memory import Address, Inbox, Outbox, Region, Slots

pytestmark = pytest.mark.skipif(shared_memory.why_not() is not None, reason=str(shared_memory.why_not()))


class Content:
    """Gives its piece back when nobody holds it, as a tensor does."""

    def __init__(self, slots: Slots, start: int, size: int) -> None:
        weakref.finalize(self, slots.give_back, start, size)


class Pair:
    """Both ends of one box: a sender in this process, unless its region is another's."""

    def __init__(self) -> None:
        self.receiver, self.sender = Region.make(1), Region.make(1)
        reached = Region.of(self.receiver.address)
        assert reached is not None
        self.slots = Slots(self.sender, 1)
        self.outbox, self.inbox = Outbox(reached, 0, self.slots), Inbox(self.receiver, 0, self.sender)

    def send(self, values: list[int], timeout_s: float = 1.0) -> None:
        """Values below 256."""
        start = self.slots.take(len(values))
        self.sender.map[start : start + len(values)] = bytes(values)
        self.outbox.put(start, len(values), Content(self.slots, start, len(values)), timeout_s)

    def read(self, number: int, length: int) -> list[int]:
        """The letter of a number."""
        target = torch.zeros(length, dtype=torch.uint8)
        self.inbox.read(number, target.data_ptr(), length, 0.2)
        return target.tolist()


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_letters_pair_up_in_the_order_of_sending_whatever_is_read_first(pair: Pair) -> None:
    for letter in ([1, 2, 3], [4], [5, 6]):
        pair.send(letter)
    numbers = [pair.inbox.expect() for _ in range(3)]
    assert [pair.read(numbers[i], n) for i, n in ((2, 2), (0, 3), (1, 1))] == [[5, 6], [1, 2, 3], [4]]


def test_a_piece_is_used_again_once_it_was_read_and_not_before(pair: Pair) -> None:
    pair.send([1])
    (first,) = pair.slots.taken
    pair.send([2])
    assert len(pair.slots.taken) == 2 and first in pair.slots.taken
    assert pair.read(pair.inbox.expect(), 1) == [1]
    second = pair.slots.take(1)
    assert second == first, "the one that was read"
    others = set(pair.slots.taken)
    assert pair.slots.take(1) not in others
    assert pair.read(pair.inbox.expect(), 1) == [2]


def test_thousands_of_letters_go_through_few_slots(pair: Pair) -> None:
    for i in range(3000):
        pair.send([i % 256])
        if i >= 5:
            assert pair.read(pair.inbox.expect(), 1) == [(i - 5) % 256]
    assert pair.slots._next - shared_memory.mmap.PAGESIZE <= 8 * shared_memory.mmap.PAGESIZE


def test_whoever_sends_more_than_a_box_holds_waits(pair: Pair) -> None:
    for i in range(64):
        pair.send([i])
    with pytest.raises(RuntimeError, match="nothing from process .* in 0.2 s"):
        pair.send([64], timeout_s=0.2)
    assert pair.read(pair.inbox.expect(), 1) == [0]
    pair.send([64])
    assert [pair.read(pair.inbox.expect(), 1)[0] for _ in range(64)] == list(range(1, 65))


def test_a_letter_that_does_not_come_or_is_not_so_long_is_an_error(pair: Pair) -> None:
    with pytest.raises(RuntimeError, match="nothing from process"):
        pair.read(pair.inbox.expect(), 1)
    pair.send([1, 2])
    with pytest.raises(RuntimeError, match="sent 2 bytes for 3"):
        pair.read(0, 3)


def send_and_go(address: Address, neighbour: Any, how: str) -> None:
    """Map the parent's region, put down a letter and end."""
    parent, own = Region.of(address), Region.make(1)
    assert parent is not None
    neighbour.send(own.address)
    neighbour.recv()
    slots = Slots(own, 1)
    start = slots.take(2)
    own.map[start : start + 2] = b"\x07\x08"
    Outbox(parent, 0, slots).put(start, 2, None, 1.0)
    os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else None


@pytest.fixture(params=["ended", "killed"])
def gone(request: pytest.FixtureRequest) -> Iterator[Callable[[], tuple[Inbox, Address]]]:
    def start() -> tuple[Inbox, Address]:
        own = Region.make(1)
        ours, theirs = mp.get_context("spawn").Pipe()
        process = mp.get_context("spawn").Process(target=send_and_go, args=(own.address, theirs, request.param))
        process.start()
        address = ours.recv()
        region = Region.of(address)
        assert region is not None and region.lives
        ours.send("go")
        process.join()
        assert not region.lives
        return Inbox(own, 0, region), address

    yield start


def test_what_a_process_sent_outlives_it_and_then_nothing_comes(
    gone: Callable[[], tuple[Inbox, Address]],
) -> None:
    inbox, address = gone()
    target = torch.zeros(2, dtype=torch.uint8)
    inbox.read(inbox.expect(), target.data_ptr(), 2, 1.0)
    assert target.tolist() == [7, 8]
    with pytest.raises(RuntimeError, match=f"process {address.pid} of this node is gone"):
        inbox.read(inbox.expect(), target.data_ptr(), 2, 30.0)
    assert Region.of(address) is None


def test_another_file_under_the_same_number_is_not_taken_for_the_memory() -> None:
    own = Region.make(1)
    assert Region.of(own.address._replace(token=bytes(64))) is None
    with open(__file__) as other:
        assert Region.of(own.address._replace(fd=other.fileno())) is None


def test_switched_off_as_nccl_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("1", "LOONG_SHM_DISABLE is set"), ("0", None), ("", None)):
        monkeypatch.setenv("LOONG_SHM_DISABLE", value)
        assert shared_memory.why_not() == expected
