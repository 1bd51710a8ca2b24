"""The all-to-all inside a node by the GPUs' copy engines, over memory that they share: no multiprocessor takes part.

NCCL's all-to-all is a kernel that takes multiprocessors from the attention which hides it. Here every rank writes its
pieces into its peers' buffers by copies over NVLink, between two barriers on the device. Off unless asked for: it has
never run on a GPU (`docs/gpu.md`); its order of copies and barriers is tested with memory of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_loong.comm.streams import beside, side_stream
from megatron_loong.comm.transport import End, Pending, Transport


class PeerMemory(Protocol):
    """A buffer of every member of a group, which all members can write."""

    size: int
    """Bytes of each."""

    def buffer(self, peer: int, start: int, length: int) -> torch.Tensor:
        """uint8 [length] of a member's buffer."""
        ...

    def barrier(self) -> None:
        """Behind it, on the current stream, every member has done what it did before its own."""
        ...


class SymmetricMemory:
    """`PeerMemory` by PyTorch's symmetric memory. Making one is collective."""

    def __init__(self, group: dist.ProcessGroup, size: int, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory

        self.size = size
        self._memory: Any = _symmetric_memory.rendezvous(
            _symmetric_memory.empty(size, dtype=torch.uint8, device=device), group
        )

    def buffer(self, peer: int, start: int, length: int) -> torch.Tensor:
        """A view of memory of the peer's GPU."""
        return self._memory.get_buffer(peer, (length,), torch.uint8, start)

    def barrier(self) -> None:
        """A kernel of one block."""
        self._memory.barrier()


def why_not(device: torch.device, nodes: int) -> str | None:
    """None where copy engines can do the all-to-all of a head group spread over so many nodes, else the reason."""
    if device.type != "cuda":
        return f"needs GPUs, and q is on {device.type}"
    if nodes > 1:
        return f"stays inside a node, and the ranks of a head group are on {nodes}"
    try:
        from torch.distributed import _symmetric_memory  # noqa: F401
    except ImportError:
        return f"needs PyTorch's symmetric memory, which torch {torch.__version__} does not have"
    return None


class CopyEngines(Transport):
    """All-to-alls of equal pieces by `PeerMemory`; messages and unequal pieces go another way.

    `kept` is where a group's memory is kept between calls; it grows when a larger exchange comes. Pieces are equal on
    one rank if and only if they are on all, so that all go the same way.
    """

    def __init__(
        self,
        otherwise: Transport,
        rank: int,
        kept: dict[str, PeerMemory],
        make: Callable[[int], PeerMemory],
    ) -> None:
        self._otherwise, self._rank, self._kept, self._make = otherwise, rank, kept, make
        self.batched = otherwise.batched

    def post(self, ends: Sequence[End]) -> Iterator[Pending]:
        """As without copy engines."""
        return self._otherwise.post(ends)

    def all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_lengths: Sequence[int],
        sent_lengths: Sequence[int],
    ) -> Pending:
        """Pieces of uint8 buffers, each written where its receiver expects it."""
        if len({*received_lengths, *sent_lengths}) > 1:
            return self._otherwise.all_to_all(received, sent, received_lengths, sent_lengths)
        length, members = sent_lengths[0], len(sent_lengths)
        memory = self._kept.get("all-to-all")
        if memory is None or memory.size < length * members:
            self._kept["all-to-all"] = memory = self._make(length * members)
        pieces = sent.split(length)
        stream = side_stream(sent.device, "all-to-all") if sent.is_cuda else None
        with beside(stream, sent, received) as wait:
            memory.barrier()  # everyone has read what came last time
            for step in range(members):  # not all to the same at once
                peer = (self._rank + step) % members
                memory.buffer(peer, self._rank * length, length).copy_(pieces[peer], non_blocking=True)
            memory.barrier()  # everyone's pieces are here
            received.copy_(memory.buffer(self._rank, 0, length * members), non_blocking=True)
        return lambda timeout: wait()
