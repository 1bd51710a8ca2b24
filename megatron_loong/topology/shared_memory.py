"""Memory that processes of one node share, and boxes in it in which one finds what another put down for it.

To ranks on CPUs what NCCL's shared-memory transport is to GPUs. A process makes one file that exists in memory alone
(`memfd_create`), which its neighbours map by `/proc/PID/fd/FD`: there is nothing to name, nothing outlives a process
that is killed, and containers keep `/dev/shm` small. Counting semaphores in it (sem_overview(7)) wake whoever waits;
nobody polls.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import select
import struct
import time
import weakref
from collections import defaultdict
from typing import Any, NamedTuple

_TOKEN_BYTES = 64
_SEMAPHORE_BYTES = 64
_LETTER = struct.Struct("=qq")
"""Where in the sender's file, and length in bytes."""
_RECEIPT = struct.Struct("=q")
"""Number of a letter that has been read."""
_LETTERS = 64
"""That can lie in a box unread."""
_BOX_BYTES = 3 * _SEMAPHORE_BYTES + _LETTERS * (_LETTER.size + _RECEIPT.size)
_LARGEST_BYTES = 256 << 30
_PATIENCE_S = 0.5
"""After which somebody who waits looks whether the other still lives."""
_MONOTONIC = 1


def why_not() -> str | None:
    """None where this process can share memory with its neighbours, else the reason."""
    if os.environ.get("LOONG_SHM_DISABLE", "0") not in ("", "0"):
        return "LOONG_SHM_DISABLE is set"
    if not hasattr(os, "memfd_create") or not hasattr(os, "pidfd_open"):
        return "needs Linux 5.3"
    if not hasattr(ctypes.CDLL(None), "sem_clockwait"):
        return "needs glibc 2.30"
    return None


class Address(NamedTuple):
    """Where a process finds another's `Region`."""

    pid: int
    fd: int
    size: int
    token: bytes
    """At the beginning of the file, lest the same numbers mean another file there."""


class Region:
    """The memory of one process that its neighbours can read and write: boxes, then what they are told of.

    Pages are taken when they are first written: the size costs nothing, and is more than the machine could hold.
    """

    def __init__(self, fd: int, address: Address) -> None:
        self.address = address
        self.map = mmap.mmap(fd, address.size)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self._process = os.pidfd_open(address.pid)
        weakref.finalize(self, os.close, self._process)

    @classmethod
    def make(cls, boxes: int) -> Region:
        """This process's own, with so many boxes for others to put letters into."""
        fd = os.memfd_create("megatron_loong")
        # Pieces are powers of two, less than twice what they hold, and some of each size may lie idle.
        size = min(_LARGEST_BYTES, 4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        os.ftruncate(fd, size)
        region = cls(fd, Address(os.getpid(), fd, size, secrets.token_bytes(_TOKEN_BYTES)))
        weakref.finalize(region, os.close, fd)
        region.map[:_TOKEN_BYTES] = region.address.token
        for box in range(boxes):
            for semaphore in region.semaphores(box):
                semaphore.make()
        return region

    @classmethod
    def of(cls, address: Address) -> Region | None:
        """A neighbour's; None where it cannot be reached: another machine or container, or no right to."""
        try:
            fd = os.open(f"/proc/{address.pid}/fd/{address.fd}", os.O_RDWR | os.O_CLOEXEC)
            try:
                if os.pread(fd, _TOKEN_BYTES, 0) != address.token:
                    return None
                return cls(fd, address)
            finally:
                os.close(fd)
        except OSError:
            return None

    def box(self, index: int) -> int:
        """Where a box begins."""
        return _TOKEN_BYTES + index * _BOX_BYTES

    def semaphores(self, box: int) -> list[Semaphore]:
        """Of one box: letters that came, were expected, and were read."""
        first = self.start + self.box(box)
        return [Semaphore(first + i * _SEMAPHORE_BYTES) for i in range(3)]

    @property
    def lives(self) -> bool:
        """Whether its process is there."""
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        return not poll.poll(0)


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class Semaphore:
    """A counter in shared memory."""

    _libc: Any = ctypes.CDLL(None)

    def __init__(self, address: int) -> None:
        self._where = ctypes.c_void_p(address)

    def make(self) -> None:
        """Once, by the owner of the memory: a count of 0."""
        self._libc.sem_init(self._where, 1, 0)

    def post(self) -> None:
        """One more. What was written before is seen by whoever takes it."""
        self._libc.sem_post(self._where)

    def take(self) -> bool:
        """One less, if there is one."""
        return self._libc.sem_trywait(self._where) == 0

    def wait(self, seconds: float) -> bool:
        """One less, as soon as there is one; False when there was none for so long, or when a signal came."""
        end = time.monotonic() + seconds
        until = _Timespec(int(end), int(end % 1 * 1e9))
        return self._libc.sem_clockwait(self._where, _MONOTONIC, ctypes.byref(until)) == 0


class _Box:
    """A box in `region`, between its owner and another process."""

    def __init__(self, region: Region, index: int, other: Region) -> None:
        self._region, self._other = region, other
        self._came, self._is_expected, self._was_read = region.semaphores(index)
        self._first = region.box(index) + 3 * _SEMAPHORE_BYTES

    def _letter(self, number: int) -> int:
        return self._first + number % _LETTERS * _LETTER.size

    def _receipt(self, number: int) -> int:
        return self._first + _LETTERS * _LETTER.size + number % _LETTERS * _RECEIPT.size

    def _wait(self, semaphore: Semaphore, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not semaphore.take() and not semaphore.wait(min(_PATIENCE_S, timeout_s)):
            if not self._other.lives and not semaphore.take():
                raise RuntimeError(f"process {self._other.address.pid} of this node is gone")
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing from process {self._other.address.pid} of this node in {timeout_s:g} s")


class Inbox(_Box):
    """Where this process finds letters of one neighbour, in the order in which they were sent."""

    def __init__(self, own: Region, index: int, neighbour: Region) -> None:
        super().__init__(own, index, neighbour)
        self._expected = self._arrived = self._read = 0

    def expect(self) -> int:
        """The number of the next letter that nobody expects yet; tells the sender that it is now."""
        self._is_expected.post()
        self._expected += 1
        return self._expected - 1

    def read(self, number: int, target: int, length: int, timeout_s: float) -> None:
        """Copy a letter to an address, once it is here; `RuntimeError` when it does not come or is not so long."""
        while self._arrived <= number:
            self._wait(self._came, timeout_s)
            self._arrived += 1
        start, sent = _LETTER.unpack_from(self._region.map, self._letter(number))
        if sent != length:
            raise RuntimeError(f"process {self._other.address.pid} of this node sent {sent} bytes for {length}")
        ctypes.memmove(target, self._other.start + start, length)
        _RECEIPT.pack_into(self._region.map, self._receipt(self._read), number)
        self._read += 1
        self._was_read.post()


class Outbox(_Box):
    """Where this process puts letters for one neighbour."""

    def __init__(self, neighbour: Region, index: int, slots: Slots) -> None:
        super().__init__(neighbour, index, neighbour)
        self._slots = slots
        self._sent = self._expected = self._receipts = 0
        self._unread: dict[int, Any] = {}

    def put(self, start: int, length: int, content: Any, timeout_s: float) -> int:
        """Leave some bytes of this process's region to be read; the number of this letter.

        `content`, which stands for them, is held until then. Waits only where 64 letters lie unread.
        """
        if self._sent - _LETTERS in self._unread:
            self.wait_until_read(self._sent - _LETTERS, timeout_s)
        number, self._sent = self._sent, self._sent + 1
        _LETTER.pack_into(self._region.map, self._letter(number), start, length)
        self._unread[number] = content
        self._slots.unread.add(self)
        self._came.post()
        return number

    def wait_until_expected(self, number: int, timeout_s: float) -> None:
        """Until the neighbour expects a letter: so far may who sends be ahead of who receives."""
        while self._expected <= number:
            self._wait(self._is_expected, timeout_s)
            self._expected += 1
        self.collect()

    def wait_until_read(self, number: int, timeout_s: float) -> None:
        """Until a letter has been read."""
        while number in self._unread:
            self._wait(self._was_read, timeout_s)
            self._take_receipt()

    def collect(self) -> None:
        """Take note of what has been read."""
        while self._was_read.take():
            self._take_receipt()

    def _take_receipt(self) -> None:
        (number,) = _RECEIPT.unpack_from(self._region.map, self._receipt(self._receipts))
        self._receipts += 1
        del self._unread[number]
        if not self._unread:
            self._slots.unread.discard(self)


class Slots:
    """The pieces of a region behind its boxes: powers of two, used again once they are given back."""

    def __init__(self, region: Region, boxes: int) -> None:
        self.region = region
        self.unread: set[Outbox] = set()
        self.taken: set[int] = set()
        """Where pieces in use begin."""
        self._next = -(-region.box(boxes) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._free: defaultdict[int, list[int]] = defaultdict(list)

    def take(self, size: int) -> int:
        """Where a piece of at least `size` bytes begins."""
        for outbox in list(self.unread):
            outbox.collect()
        rounded = self._rounded(size)
        if self._free[rounded]:
            start = self._free[rounded].pop()
        else:
            start, self._next = self._next, self._next + rounded
            if self._next > self.region.address.size:
                gib = self.region.address.size >> 30
                raise RuntimeError(f"the {gib} GiB that this process shares are full; LOONG_SHM_DISABLE=1 does without")
        self.taken.add(start)
        return start

    def give_back(self, start: int, size: int) -> None:
        """A piece, with the size for which it was taken."""
        self.taken.remove(start)
        self._free[self._rounded(size)].append(start)

    def _rounded(self, size: int) -> int:
        return max(mmap.PAGESIZE, 1 << (size - 1).bit_length())


class Neighbours(NamedTuple):
    """The members of one communicator whose memory this process can reach."""

    slots: Slots
    boxes: dict[int, tuple[Outbox, Inbox]]
    """By global rank."""
