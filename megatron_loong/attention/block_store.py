"""Blocks on their way round a pair of rings, and the results for them on their way back to the owner."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_loong.attention.merge import Part, PartialSum
from megatron_loong.comm.ring import Ring
from megatron_loong.comm.transport import Message, Pending
from megatron_loong.schedule.rotation import Moving
from megatron_loong.schedule.rows import Rows, row_count, slice_within
from megatron_loong.schedule.steps import Hop, Step


# A hop is one message, so all tensors of a block lie in one buffer of bytes: first all rows of k, then all rows of v.
# Kernels read views of it, and nothing is packed or unpacked on the way.
@dataclass(frozen=True)
class Form:
    """What one row of a block holds, tensor by tensor: (shape, dtype), wider dtypes first so that all are aligned."""

    parts: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    @classmethod
    def of(cls, *parts: tuple[Iterable[int], torch.dtype]) -> Form:
        """From shapes and dtypes."""
        form = cls(tuple((tuple(shape), dtype) for shape, dtype in parts))
        widths = [dtype.itemsize for _, dtype in form.parts]
        assert widths == sorted(widths, reverse=True), f"{form} is not aligned"
        return form

    @classmethod
    def like(cls, *tensors: torch.Tensor) -> Form:
        """The form of rows of these tensors [s, ...]."""
        return cls.of(*((x.shape[1:], x.dtype) for x in tensors))

    @cached_property
    def widths(self) -> list[int]:
        """Bytes of a row, by tensor."""
        return [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.parts]

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return sum(self.widths)

    def buffer(self, rows: int, device: torch.device) -> torch.Tensor:
        """Uninitialised bytes for so many rows."""
        return torch.empty(rows * self.row_bytes, dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class Block:
    """Rows of a form in one buffer, tensor after tensor."""

    form: Form
    flat: torch.Tensor
    """uint8."""

    @classmethod
    def copy_of(cls, *tensors: torch.Tensor) -> Block:
        """A block with copies of tensors [s, ...]."""
        form = Form.like(*tensors)
        block = cls(form, form.buffer(tensors[0].shape[0], tensors[0].device))
        for part, x in zip(block.parts, tensors, strict=True):
            part.copy_(x)
        return block

    @property
    def rows(self) -> int:
        """Number of rows s."""
        return self.flat.numel() // self.form.row_bytes

    @cached_property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """Views [s, ...] of the tensors."""
        rows = self.rows
        return tuple(
            piece.view(dtype).view(rows, *shape)
            for piece, (shape, dtype) in zip(self._pieces, self.form.parts, strict=True)
        )

    def chosen(self, held: Rows, wanted: Rows) -> torch.Tensor:
        """The buffer of the rows `wanted` out of this block, which holds `held`; a copy unless it wants all."""
        if wanted == held:
            return self.flat
        places = [slice_within(held, run) for run in wanted]
        rows = [piece.view(self.rows, width) for piece, width in zip(self._pieces, self.form.widths, strict=True)]
        return torch.cat([x[place].reshape(-1) for x in rows for place in places])

    @property
    def _pieces(self) -> tuple[torch.Tensor, ...]:
        rows = self.rows
        return self.flat.split([rows * width for width in self.form.widths])


Rings = Mapping[str, Ring]
"""`inner`, `outer`, and `inner_dkv`, `outer_dkv` for results of any kind (dK and dV, dQ, partial outputs); none for an
axis of size 1."""


class _Messages:
    """Messages under way on a pair of rings."""

    def __init__(self, rings: Rings, suffix: str) -> None:
        self._rings, self._suffix = rings, suffix
        self._sent: defaultdict[int, list[Pending[None]]] = defaultdict(list)

    def post(
        self, sends: list[tuple[Hop, torch.Tensor]], receives: list[tuple[Hop, torch.Tensor]], what: str
    ) -> list[tuple[Hop, torch.Tensor, Pending[None]]]:
        """Begin the hops of one step. Returns each hop that is received, with its buffer and its wait."""
        arriving = []
        # All hops of a step on one ring go to it together: with NCCL a send and a receive between the same two ranks
        # must be one group call, or each may wait for the other.
        for name in ("inner", "outer"):
            ends = [(send, *end) for send, ends in ((True, sends), (False, receives)) for end in ends]
            ends = [(send, hop, buffer) for send, hop, buffer in ends if hop.ring == name]
            if not ends:
                continue
            messages = [Message(send, x.peer, buffer, f"{what} of ring rank {x.owner}") for send, x, buffer in ends]
            waits = self._rings[name + self._suffix].post(messages)
            for (send, hop, buffer), wait in zip(ends, waits, strict=True):
                if send:
                    self._sent[hop.due].append(wait)
                else:
                    arriving.append((hop, buffer, wait))
        return arriving

    def finish_sends(self, index: int) -> None:
        """Wait for what was sent and is due in a step. The receiver has it by then, so this does not wait long."""
        for wait in self._sent.pop(index, ()):
            wait()


class BlockStore:
    """The blocks that are here or on their way: `store[step]` is that of a step.

    `own` are this rank's blocks, by kind. Besides them there are at most two of a kind on each of the two rings: the
    block that is attended to or still being sent, and the one that is arriving. An outer hop is posted a whole inner
    round before it is needed, so its block is here, or arriving, for that long.
    """

    def __init__(self, rings: Rings, steps: Sequence[Step], own: Mapping[Moving, Block], ring_rank: int) -> None:
        self._own = own
        self._held = {(step.moving, step.owner): step.rows for step in steps}
        self._here: dict[tuple[Moving, int], Block] = {(moving, ring_rank): block for moving, block in own.items()}
        self._arriving: dict[tuple[Moving, int], tuple[torch.Tensor, Pending[None]]] = {}
        self._messages = _Messages(rings, "")

    def post(self, index: int, step: Step) -> None:
        """Post the hops of a step, which its tiles hide."""
        # No deadlock, by induction over the steps: both ends post a hop in the same step. Before posting, a rank waits
        # only for blocks that it sends on, which were posted in earlier steps; for what is posted here it waits later.
        if step.sends or step.receives:
            sends = [(hop, self._rows_of(hop)) for hop in step.sends]
            receives = [(hop, self._buffer(hop)) for hop in step.receives]
            for hop, buffer, wait in self._messages.post(sends, receives, "block"):
                self._arriving[hop.moving, hop.owner] = buffer, wait
        # After posting, because a hop may be due in the very step that posts it (an inner ring of two, short blocks).
        self._messages.finish_sends(index)

    def __getitem__(self, step: Step) -> Block:
        """The block that a step attends to; waits for it if it is on its way."""
        return self._block(step.moving, step.owner)

    def drop(self, step: Step) -> None:
        """Free the blocks that are not needed after a step."""
        # A block that was passed on may still be under way: the wait of its send holds the buffer until the hop is due.
        for owner in step.last_use:
            self._here.pop((step.moving, owner), None)

    def _block(self, moving: Moving, owner: int) -> Block:
        key = moving, owner
        if key in self._arriving:
            buffer, wait = self._arriving.pop(key)
            wait()
            self._here[key] = Block(self._own[moving].form, buffer)
        return self._here[key]

    def _rows_of(self, hop: Hop) -> torch.Tensor:
        return self._block(hop.moving, hop.owner).chosen(self._held[hop.moving, hop.owner], hop.rows)

    def _buffer(self, hop: Hop) -> torch.Tensor:
        own = self._own[hop.moving]
        return own.form.buffer(hop.row_count, own.flat.device)


class Returns:
    """Results for the blocks of one kind on their way back: summed here, and rounded, if at all, once for each hop.

    `home` is the sum for the rank's own block, to which others' parts are added as they arrive; `wire` the form in
    which sums travel.

    Results use communicators of their own. NCCL carries out the messages of one communicator in the order in which they
    were posted, so on those of the blocks a block would wait behind the results that were posted before it.
    """

    def __init__(self, rings: Rings, steps: Sequence[Step], home: PartialSum, wire: Form, ring_rank: int) -> None:
        self._home, self._wire = home, wire
        self._rows: dict[int, Rows] = {step.owner: step.return_rows for step in steps}
        self._sums = {ring_rank: home}
        self._begun: dict[int, Block] = {}
        self._arriving: defaultdict[int, list[tuple[Hop, torch.Tensor, Pending[None]]]] = defaultdict(list)
        self._messages = _Messages(rings, "_dkv")

    def exchange(self, index: int, step: Step, parts: Sequence[Part]) -> None:
        """The end of a step: take in what has arrived and what was computed for its block, and send the sums on."""
        self._collect(index)  # what was posted in the step before has had this step's tiles to arrive
        for rows, tensors in parts:
            self._sum(step.owner).add(step.return_place(rows), tensors)
        sends = [(hop, self._outgoing(hop)) for hop in step.return_sends]
        receives = [(hop, self._buffer(hop)) for hop in step.return_receives]
        for hop, buffer, wait in self._messages.post(sends, receives, "results for block"):
            self._arriving[hop.due].append((hop, buffer, wait))

    def _collect(self, index: int) -> None:
        self._messages.finish_sends(index)
        for hop, buffer, wait in self._arriving.pop(index, ()):
            wait()
            part, start, rows = Block(self._wire, buffer), 0, self._rows[hop.owner]
            # A sum that arrives before anything was computed for its block, for the same rows and unrounded, need not
            # be added to anything: its buffer becomes the sum here, and is sent on in its turn.
            if hop.owner not in self._sums and hop.rows == rows and self._sum(hop.owner).begin(part.parts):
                self._begun[hop.owner] = part
                continue
            for run in hop.rows:
                stop = start + run[1] - run[0]
                self._sum(hop.owner).add(slice_within(rows, run), tuple(x[start:stop] for x in part.parts))
                start = stop

    def _sum(self, owner: int) -> PartialSum:
        if owner not in self._sums:
            self._sums[owner] = self._home.like(row_count(self._rows[owner]))
        return self._sums[owner]

    def _outgoing(self, hop: Hop) -> torch.Tensor:
        # Writing rounds to the communication dtype. The wide sum is dropped at once: until the hop is due its rounded
        # copy is all that this rank has of it.
        block = self._begun.pop(hop.owner, None) or Block(self._wire, self._buffer(hop))
        self._sum(hop.owner).write(block.parts)
        del self._sums[hop.owner]
        return block.flat

    def _buffer(self, hop: Hop) -> torch.Tensor:
        return self._wire.buffer(hop.row_count, self._home.device)
