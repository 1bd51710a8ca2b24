"""Results that come in parts: attention over further keys (the online softmax), gradients of several tiles or ranks."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from megatron_loong.kernels import row_ops
from megatron_loong.kernels.row_ops import Tensors, finite
from megatron_loong.schedule.parts import waiting_bytes

Part = tuple[slice, Tensors]
"""Some rows of a block, and the tensors that were computed for them."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What out, dq, dk and dv are summed in: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class PartialSum:
    """The sum of parts of some rows [s, ...] that come one after another, in float32 (float64) whatever they are in.

    Parts wait until there are a few, and then go into the sum in one pass over memory; the last pass writes what is
    wanted in its own dtype. Nothing is zero-filled but rows for which no part came.
    """

    def __init__(
        self, rows: int, row_shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._rows, self.row_shapes, self.device = rows, row_shapes, device
        self.wide = accumulator_dtype(dtype)
        self._row_size = sum(map(math.prod, row_shapes))
        self._forget()

    def _forget(self) -> None:
        self._waiting: list[Part] = []
        self._waiting_bytes = 0
        self._sum: Tensors | None = None

    def like(self, rows: int) -> PartialSum:
        """An empty one of the same kind for other rows."""
        other = copy.copy(self)
        other._rows = rows
        other._forget()
        return other

    def begin(self, tensors: Tensors) -> bool:
        """Use `tensors`, of all rows, as the sum so far, if they are in its dtype; before anything else has come."""
        if tensors[-1].dtype != self.wide:
            return False
        self._sum = tensors
        return True

    def add(self, rows: slice, tensors: Tensors) -> None:
        """Take in a part. It is kept, not copied: nobody else may write to it."""
        # Adding a part at once would read and write the whole sum for it. So parts wait, as far as memory allows, and
        # one pass reads each of them and writes the sum once.
        size = (rows.stop - rows.start) * self._row_size * tensors[-1].itemsize  # lse is next to nothing
        most = waiting_bytes(self._rows * self._row_size * self.wide.itemsize)
        if self._waiting and self._waiting_bytes + size > most:
            into = self._sum or self._empty(self.wide)
            self.write(into)
            self._sum = into
        self._waiting.append((rows, tensors))
        self._waiting_bytes += size

    def result(self, dtype: torch.dtype) -> Tensors:
        """The sum in `dtype`."""
        if self._sum is None and len(self._waiting) == 1:  # one part of all rows, as it should be: nothing to do
            ((rows, tensors),) = self._waiting
            # A sink alone is an expanded part: results must have memory of their own for each element.
            dense = 0 not in tensors[-1].stride()
            if rows == slice(0, self._rows) and tensors[-1].dtype == dtype and dense:
                return tensors
        # The sum so far is updated in place if it is already in the dtype that is wanted; else the last pass rounds.
        into = self._sum if self._sum is not None and dtype == self.wide else self._empty(dtype)
        self.write(into)
        return into

    def write(self, into: Tensors) -> None:
        """Write the sum into tensors of any dtype, and forget what came."""
        # Rows of the sum that no waiting part touches are left alone in place, copied into another tensor, and cleared
        # if nothing has come for them at all.
        whole = slice(0, self._rows)
        for rows, parts in _by_rows(self._waiting, whole):
            target = rows_of(into, rows)
            if self._sum is not None:
                if self._sum is into and not parts:
                    continue
                parts.insert(0, target if self._sum is into else rows_of(self._sum, rows))
            if parts:
                self._combine(target, parts)
            else:
                self._clear(target)
        self._forget()

    def _empty(self, dtype: torch.dtype) -> Tensors:
        return tuple(torch.empty((self._rows, *x), dtype=dtype, device=self.device) for x in self.row_shapes)

    def _combine(self, into: Tensors, parts: list[Tensors]) -> None:
        row_ops.add_rows(into, parts)

    def _clear(self, rows: Tensors) -> None:
        for x in rows:
            x.zero_()


class OnlineSoftmax(PartialSum):
    """Attention of some queries whose keys come in parts, each (lse [s, b, h], out [s, b, h, dv])."""

    def __init__(self, q: torch.Tensor, value_dim: int) -> None:
        s, b, h = q.shape[:3]
        super().__init__(s, ((b, h), (b, h, value_dim)), q.dtype, q.device)
        self._dtype = q.dtype

    def finish(self, sink: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """out in q's dtype, and lse.

        sink [h] gives every row one more score that has no value (softmax off by one: sink = 0): a part with out = 0.
        A row that saw no key keeps out = 0 under a sink of -inf, which adds nothing.
        """
        # One more part that attends to the sink alone: its lse is the sink's score. It joins the last pass over memory,
        # and being expanded from [h] takes none itself.
        if sink is not None:
            lse_shape, out_shape = ((self._rows, *x) for x in self.row_shapes)
            part = sink.to(self.wide).expand(lse_shape), sink.new_zeros(out_shape[-1]).expand(out_shape)
            self._waiting.append((slice(0, self._rows), part))
        lse, out = self.result(self._dtype)
        return out, lse

    def _empty(self, dtype: torch.dtype) -> Tensors:
        # In the memory order of the kernels: out [b, s, h, dv], lse [b, h, s].
        (b, h), (_, _, value_dim) = self.row_shapes
        out = torch.empty(b, self._rows, h, value_dim, dtype=dtype, device=self.device).transpose(0, 1)
        return torch.empty(b, h, self._rows, dtype=self.wide, device=self.device).permute(2, 0, 1), out

    def _combine(self, into: Tensors, parts: list[Tensors]) -> None:
        row_ops.merge_rows(into, parts)

    def _clear(self, rows: Tensors) -> None:
        lse, out = rows
        lse.fill_(-torch.inf)
        out.zero_()


def _by_rows(parts: Sequence[Part], whole: slice) -> Iterator[tuple[slice, list[Tensors]]]:
    """All rows, cut wherever a part begins or ends; each run with what came for it in the order it came.

    Zigzag has two such runs: half of the tiles have only the second half of the queries. A pack without a kernel that
    takes packs has as many as documents.
    """
    if all(rows == whole for rows, _ in parts):
        yield whole, [tensors for _, tensors in parts]
        return
    # A sweep over the rows. `beginning` has the parts that are still ahead, the next one last; `present` those that
    # cover the current run, as indices, because the sum is to be in the order in which parts came, in any sweep.
    cuts = sorted({whole.start, whole.stop, *(cut for rows, _ in parts for cut in (rows.start, rows.stop))})
    beginning = sorted(range(len(parts)), key=lambda i: -parts[i][0].start)
    present: list[int] = []
    for start, stop in itertools.pairwise(cuts):
        present = [i for i in present if parts[i][0].stop > start]
        while beginning and parts[beginning[-1]][0].start == start:
            present.append(beginning.pop())
        rows = slice(start, stop)
        yield rows, [rows_of(parts[i][1], rows, parts[i][0].start) for i in sorted(present)]


def rows_of(tensors: Tensors, rows: slice, first: int = 0) -> Tensors:
    """`rows` of tensors that begin with row `first`."""
    start, stop = rows.start - first, rows.stop - first
    if not start and stop == tensors[0].shape[0]:
        return tensors
    return tuple(x[start:stop] for x in tensors)


def sink_gradient(dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Gradient [h] of `sink` from these rows: dout, out [s, b, h, d], lse [s, b, h], both with the sink."""
    # The sink's softmax weight is exp(sink - lse). It has no value, so its score's gradient is weight * (0 - delta).
    # `finite` is for rows without a key under a sink of -inf: -inf less an lse of -inf would be NaN.
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return -((sink.to(lse.dtype) - finite(lse)).exp() * delta).sum((0, 1)).to(sink.dtype)
