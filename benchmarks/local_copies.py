"""A network in which everyone else sends what this rank just sent: one rank's schedule without its peers.

A receive is answered by a copy on the same device, on a stream of its own for each communicator, as NCCL has: the
device reads and writes as many bytes as for a message, and nobody is waited for. What it leaves out: the time of the
wire, and the multiprocessors that NCCL's kernels take. The numbers that arrive are of the right kind, and wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_loong.comm.transport import Message, Pending, Transport

BACKEND = "loong_local_copies"


@contextlib.contextmanager
def beside(stream: torch.cuda.Stream | None, *tensors: torch.Tensor) -> Iterator[Callable[[], None]]:
    """What is inside runs on `stream`, behind what the current stream has done; without a stream, at once.

    Yields what makes the stream that is current then wait for it. The allocator keeps `tensors` until it is done.
    """
    if stream is None:
        yield lambda: None
        return
    done = torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield lambda: torch.cuda.current_stream(stream.device).wait_event(done)
        done.record(stream)
    for x in tensors:
        x.record_stream(stream)


class Copies:
    """The copies of one communicator."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._sent: torch.Tensor | None = None

    def send(self, block: torch.Tensor) -> None:
        """What the next receive of this size gets."""
        self._sent = block

    def receive(self, block: torch.Tensor) -> Callable[[], None]:
        """Begin to fill a block, with zeros where nothing of its size was sent; returns what waits for it."""
        sent = self._sent
        if sent is None or sent.numel() != block.numel() or sent.dtype != block.dtype:
            sent = torch.zeros((), dtype=block.dtype, device=block.device)
        sent = sent.view(block.shape) if sent.numel() == block.numel() else sent
        if block.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(block.device)
        with beside(self._stream, block, sent) as wait:
            block.copy_(sent, non_blocking=True)
        return wait


class LocalCopies(Transport):
    """`Copies` for our rings and all-to-alls; the arguments are those of `simulate.TransportMaker`."""

    batched = True

    def __init__(self, name: str, cp_rank: int, members: tuple[int, ...]) -> None:
        self._copies = Copies()

    def post(self, messages: Sequence[Message]) -> Pending[None]:
        """Fill what is to be received."""
        for message in messages:
            if message.send:
                self._copies.send(message.block)
        waits = [self._copies.receive(message.block) for message in messages if not message.send]

        def wait() -> None:
            for one in waits:
                one()

        return wait

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_lengths: Sequence[int], sent_lengths: Sequence[int]
    ) -> Pending[None]:
        """What is sent comes back; of another length, zeros."""
        self._copies.send(sent)
        return self._copies.receive(received)


class _Work:
    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def wait(self, timeout: Any = None) -> bool:
        self._wait()
        return True


class LocalCopiesGroup(dist.ProcessGroup):
    """The same behind `torch.distributed`, for implementations that call it themselves: sends and receives."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._copies = Copies()

    def getBackendName(self) -> str:
        """The name under which `torch.distributed` knows it."""
        return BACKEND

    def _get_backend(self, device: torch.device) -> Any:
        # Asked by `batch_isend_irecv` whether it coalesces; it does not.
        return self

    def send(self, tensors: list[torch.Tensor], *_: Any) -> Any:
        """Done at once."""
        self._copies.send(tensors[0])
        return _Work(lambda: None)

    def recv(self, tensors: list[torch.Tensor], *_: Any) -> Any:
        """A copy of what was sent last."""
        return _Work(self._copies.receive(tensors[0]))


def init_world_of_one(rank: int, world_size: int) -> None:
    """Make `torch.distributed` believe that this process is `rank` of a world whose peers are `LocalCopiesGroup`."""
    if BACKEND.upper() not in dir(dist.Backend):
        dist.Backend.register_backend(
            BACKEND, lambda store, rank, size, timeout: LocalCopiesGroup(rank, size), devices=["cpu", "cuda"]
        )
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=world_size)
