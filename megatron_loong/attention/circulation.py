"""Blocks on their way round a pair of rings, and what was computed on them on its way home."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch

from megatron_loong.attention.blocks import Block, Form
from megatron_loong.comm.ring import Message, Ring, Wait
from megatron_loong.planner.rows import row_count, slice_within
from megatron_loong.planner.schedule import Hop, Passage
from megatron_loong.planner.visits import OWN, Visit

Rings = Mapping[str, Ring]
"""`inner`, `outer`, `inner_dkv`, `outer_dkv`; none for an axis of size 1."""


def own_block(rings: Rings, form: Form, rows: int, device: torch.device) -> Block:
    """An uninitialised block of this rank's own, where it can be sent from."""
    ring = next(iter(rings.values()), None)
    return form.empty(rows, device) if ring is None else Block(form, ring.buffer(form.size(rows), device))


class Traffic:
    """Messages under way on a pair of rings: posted together by step, waited for when they are due."""

    def __init__(self, rings: Rings, suffix: str, what: str) -> None:
        self._rings, self._suffix, self._what = rings, suffix, what
        self._sent: defaultdict[int, list[Wait]] = defaultdict(list)

    def buffer(self, hop: Hop, form: Form, device: torch.device) -> torch.Tensor:
        """Where a hop's rows arrive."""
        return self._rings[hop.ring + self._suffix].buffer(form.size(row_count(hop.rows)), device)

    def post(self, hops: list[tuple[Hop, torch.Tensor]]) -> list[tuple[Hop, torch.Tensor, Wait]]:
        """Begin the hops of one step; returns those that receive, each with its wait."""
        arriving = []
        for ring in ("inner", "outer"):
            ends = [(hop, block) for hop, block in hops if hop.ring == ring]
            if not ends:
                continue
            messages = [Message(hop.send, hop.peer, block, f"{self._what} {tuple(hop.visit)}") for hop, block in ends]
            waits = self._rings[ring + self._suffix].post(messages)
            for (hop, block), wait in zip(ends, waits, strict=True):
                if hop.send:
                    self._sent[hop.due].append(wait)
                else:
                    arriving.append((hop, block, wait))
        return arriving

    def finish_sends(self, step: int) -> None:
        """Wait for what was sent and is wanted by now at the other end."""
        for wait in self._sent.pop(step, ()):
            wait()


class Circulation:
    """Brings the blocks of a passage, each hop posted before the tiles that hide it.

    Outer hops are posted as soon as the block they carry is here, that is, a whole inner round ahead. Besides the
    rank's own block it holds, on each of the two rings, the block that travels and the one that arrives.
    """

    def __init__(self, rings: Rings, work: Passage, own: Block, what: str) -> None:
        self._work = work
        self._own = own
        self._blocks: dict[Visit, Block] = {OWN: own}
        self._arriving: dict[Visit, tuple[torch.Tensor, Wait]] = {}
        self._traffic = Traffic(rings, "", what)

    def begin(self, step: int) -> None:
        """Post what belongs to a step (-1: before the first)."""
        if step >= 0 and self._work.visits[step] in self._arriving:
            self.block(self._work.visits[step])
        hops = [(hop, self._buffer(hop)) for hop in self._work.hops.get(step, ())]
        for hop, buffer, wait in self._traffic.post(hops):
            self._arriving[hop.visit] = buffer, wait
        self._traffic.finish_sends(step)  # of those posted just now, too: an inner hop may be due at once

    def block(self, visit: Visit) -> Block:
        """The block of a visit, here."""
        if visit in self._arriving:
            flat, wait = self._arriving.pop(visit)
            wait()
            self._blocks[visit] = Block(self._own.form, flat)
        return self._blocks[visit]

    def end(self, step: int) -> None:
        """Drop the blocks that are not used after `step`."""
        for visit in [x for x in self._blocks if self._work.last_use[x] <= step]:
            del self._blocks[visit]

    def _buffer(self, hop: Hop) -> torch.Tensor:
        if hop.send:
            return self.block(hop.visit).chosen(self._work.rows[hop.visit], hop.rows)
        return self._traffic.buffer(hop, self._own.form, self._own.flat.device)


Fold = Callable[[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]], None]
"""Takes the tensors of some rows into those of a sum, in place."""


class Returns:
    """What was computed on visited blocks, on its way home: summed here, rounded (if at all) once for each hop.

    `home` is the sum of the rank's own block, to which others' parts come as they arrive; `wire` the form in which
    sums travel; `nothing` what a row of each tensor is before `fold` has taken anything into it.
    """

    def __init__(
        self,
        rings: Rings,
        work: Passage,
        home: tuple[torch.Tensor, ...],
        wire: Form,
        fold: Fold,
        nothing: tuple[float, ...],
        what: str,
    ) -> None:
        self._work, self._home, self._wire, self._fold, self._nothing = work, home, wire, fold, nothing
        self._form, self._device = Form.like(*home), home[0].device
        self._sums: dict[Visit, Block] = {}
        self._arriving: defaultdict[int, list[tuple[Hop, torch.Tensor, Wait]]] = defaultdict(list)
        self._traffic = Traffic(rings, "_dkv", what)

    def collect(self, step: int) -> None:
        """Wait for what is due in a step, both what others sent and what this rank did."""
        self._traffic.finish_sends(step)
        for hop, buffer, wait in self._arriving.pop(step, ()):
            wait()
            part, rows = Block(self._wire, buffer), self._work.return_rows[hop.visit]
            if hop.visit != OWN and hop.visit not in self._sums and rows == hop.rows and self._wire == self._form:
                self._sums[hop.visit] = part
                continue
            start = 0
            for run in hop.rows:
                stop = start + run[1] - run[0]
                self._take(hop.visit, slice_within(rows, run), tuple(x[start:stop] for x in part.parts))
                start = stop

    def add(self, visit: Visit, rows: slice, tensors: tuple[torch.Tensor, ...]) -> None:
        """Fold what was computed on some rows of the block that is here into the block's sum."""
        self._take(visit, self._work.return_place(visit, rows), tensors)

    def post(self, step: int) -> None:
        """Send on, or begin to receive, what belongs to a step."""
        hops = []
        for hop in self._work.return_hops.get(step, ()):
            if hop.send:
                self._sum(hop.visit)  # of nothing, where nothing was computed or came
                total = self._sums.pop(hop.visit)
                if self._wire != self._form:
                    total = Block(self._wire, self._traffic.buffer(hop, self._wire, self._device)).fill(total.parts)
                buffer = total.flat
            else:
                buffer = self._traffic.buffer(hop, self._wire, self._device)
            hops.append((hop, buffer))
        for hop, buffer, wait in self._traffic.post(hops):
            self._arriving[hop.due].append((hop, buffer, wait))

    def _take(self, visit: Visit, place: slice, tensors: tuple[torch.Tensor, ...]) -> None:
        rows = row_count(self._work.return_rows[visit])
        if visit != OWN and visit not in self._sums and place == slice(0, rows):
            self._sums[visit] = self._form.empty(rows, self._device)
            for total, x in zip(self._sums[visit].parts, tensors, strict=True):
                total.copy_(x)
            return
        self._fold(tuple(x[place] for x in self._sum(visit)), tensors)

    def _sum(self, visit: Visit) -> tuple[torch.Tensor, ...]:
        if visit == OWN:
            return self._home
        if visit not in self._sums:
            self._sums[visit] = self._form.empty(row_count(self._work.return_rows[visit]), self._device)
            for part, value in zip(self._sums[visit].parts, self._nothing, strict=True):
                part.fill_(value)
        return self._sums[visit].parts
