"""The sequence in parts, so that all-to-alls hide where the heads of a rank cannot be parted.

Without a ring nothing hides the all-to-all of Ulysses but the attention itself. In zigzag every rank holds as much of
the first half of the sequence as of the second. Under a causal mask each half attends to itself, and the second to all
of the first: a square of queries and keys, half of the attention, of which any part can be computed as soon as its
queries and keys are here. In slices of both halves (a, b, ...), each with its share of every rank, it grows by a
corner as they come, and of what is left of it at last every tile completes a slice, which goes. What stands in one box
travels together:

    forward     q of 2a, kv of 1a | q of 2b, kv of 1b | q of 1    | kv of 2  |
                                  | 2a with 1a        | 2b with 1 | 1 with 1 | 2 with 2 | 2a with 1b |
                                                                             | out of 1 | out of 2b  | out of 2a
    backward    dout of 2a | dout of 2b | dout of 1 |
                           | 2a with 1b | 2 with 2  | 1 with 1 | 2b with 1 | 2a with 1a          |
                                                    | dkv of 2 | dq of 1   | dq of 2b, dkv of 1b | dq of 2a, dkv of 1a

The bytes are those of one exchange.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_loong.attention import stash
from megatron_loong.attention.blocks import Block, accumulator_dtype
from megatron_loong.attention.double_ring import Result, alone, tile_backward, tile_forward
from megatron_loong.attention.head_exchange import Arrival, HeadExchange
from megatron_loong.attention.merge import sink_gradient
from megatron_loong.attention.plan import RingPlan
from megatron_loong.comm.all_to_all import Bundle
from megatron_loong.config import CAUSAL, FULL
from megatron_loong.kernels.common import on_device
from megatron_loong.kernels.folds import add_rows_, copy_rows_
from megatron_loong.sequence.sharding import places_of
from megatron_loong.topology.tokens import TokenLayout

if TYPE_CHECKING:
    from megatron_loong.attention.call import Call, Share

Pair = tuple[torch.Tensor, torch.Tensor]
"""k and v, or out and lse."""


@dataclass(frozen=True)
class _Part:
    """Rows that travel together: one half of the sequence, or a slice of it."""

    call: Call
    exchange: HeadExchange
    local: slice
    """Rows of what a rank holds."""
    shared: slice
    """Rows of what it has of its heads, after the all-to-all: of all, or for a slice of its half slice after slice."""

    def inward(
        self,
        tensors: Sequence[torch.Tensor],
        what: str,
        bundle: Bundle | None = None,
        into: Sequence[torch.Tensor] | None = None,
    ) -> Arrival:
        """Begin the all-to-all of q or dout, or of k and v."""
        return self.exchange.split([x[self.local] for x in tensors], self._heads(tensors), what, into, bundle)

    def outward(self, tensors: list[torch.Tensor], what: str, bundle: Bundle | None = None) -> Arrival:
        """Begin the all-to-all back of out or dq, or of dk and dv. The list is emptied."""
        return self.exchange.join(tensors, self._heads(tensors), what, bundle=bundle)

    def of(self, tensors: Sequence[torch.Tensor]) -> Pair:
        """Its rows of two tensors."""
        first, second = tensors
        return first[self.shared], second[self.shared]

    def _heads(self, tensors: Sequence[torch.Tensor]) -> list[tuple[range, ...]]:
        shares = self.call.shares
        return [shares.query] if len(tensors) == 1 else [shares.kv, shares.kv]

    @functools.cached_property
    def slices(self) -> list[_Part]:
        """Of a half: as many as the call asks for."""
        count = self.call.sequence_parts // 2
        rows = slice(0, self.shared.stop - self.shared.start)
        if count == 1:
            return [_Part(self.call, self.exchange, self.local, rows)]
        return _parts(self.call, _slices(self.exchange.layout, count), self.local.start)

    def apart(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of a half slice after slice."""
        if len(self.slices) == 1:
            return x
        found = torch.empty_like(x)
        copy_rows_([(found, x)], source_rows=self._rows(x.device))
        return found

    def together(self, x: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """The rows of a half in the order of the sequence, from slice after slice."""
        if len(self.slices) == 1:
            return x
        found = torch.empty_like(x) if into is None else into
        copy_rows_([(found, x)], target_rows=self._rows(x.device))
        return found

    def last_slice(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The rows of the last slice of tensors that have the rows of a half in the order of the sequence."""
        rows = self._rows(tensors[0].device)[self.slices[-1].shared]
        return [x.index_select(0, rows) for x in tensors]

    def _rows(self, device: torch.device) -> torch.Tensor:
        return _slice_rows(self.exchange.layout, len(self.slices), device)


_slices = functools.lru_cache(maxsize=64)(TokenLayout.slices)


@functools.lru_cache(maxsize=64)
def _slice_rows(half: TokenLayout, count: int, device: torch.device) -> torch.Tensor:
    return on_device(places_of(half.slice_runs(count)), device)


def _halves(call: Call) -> tuple[_Part, _Part]:
    layouts = call.layouts[0].halves
    assert layouts is not None
    first, second = _parts(call, layouts, first_row=0)
    return first, second


def _parts(call: Call, layouts: Sequence[TokenLayout], first_row: int) -> list[_Part]:
    """One after another, from a local row on."""
    found, local, shared = [], first_row, 0
    for layout in layouts:
        tokens = layout.tokens_of(call.groups.logical_rank)
        rows = slice(local, local + tokens), slice(shared, shared + layout.seq_len)
        found.append(_Part(call, call.exchange(layout), *rows))
        local, shared = rows[0].stop, rows[1].stop
    return found


class _Coming:
    """q, k and v on their way: all packed at once, begun in order, the next two messages when one is here.

    Begun together they would share the link, and the tile that needs only the first would wait for more; begun one by
    one, the link would be idle while a tile is computed.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> None:
        self.halves = first, second = _halves(call)
        self._kv = call.kv_form(k, v).empty(call.kv_rows(), k.device)
        k_rows, v_rows = first.of(self._kv.parts)
        sliced = len(first.slices) > 1
        self.early = (torch.empty_like(k_rows), torch.empty_like(v_rows)) if sliced else (k_rows, v_rows)
        """k and v of the first half, slice after slice."""
        heads = call.query_heads
        rows = second.shared.stop - second.shared.start
        self.q2 = q.new_empty(rows, q.shape[1], heads.stop - heads.start, q.shape[3])
        """q of the second half, slice after slice; ours to the end."""
        self._messages: list[Bundle] = []
        self._begun = 0
        self._corners = [
            (
                two.inward([q], "q", now, [self.q2[two.shared]]),
                one.inward([k, v], "k and v", now, one.of(self.early)),
            )
            for one, two in zip(first.slices, second.slices, strict=True)
            for now in [self._message("q, k and v")]
        ]
        self._q1 = first.inward([q], "q", self._message("q"))
        self._late = second.inward([k, v], "k and v", self._message("k and v"), second.of(self._kv.parts))
        self._begin(1)

    def corner(self, index: int) -> None:
        """Wait for a slice of `q2` and of `early`; each once, in order."""
        q2, early = self._corners[index]
        q2()
        self._begin(index + 3)
        early()

    def first(self) -> tuple[torch.Tensor, Pair]:
        """q, k and v of the first half; once, after the corners."""
        here = self._q1()[0]
        self._begin(len(self._messages))
        keys = self.halves[0].of(self._kv.parts)
        for x, kept in zip(self.early, keys, strict=True):
            self.halves[0].together(x, kept)
        del self.early
        return here, keys

    def late(self) -> Pair:
        """k and v of the second half; once, after the first."""
        self._late()
        return self.halves[1].of(self._kv.parts)

    def shares(self, q1: torch.Tensor, ring1: Pair, ring2: Pair) -> list[Share]:
        """Of each half q, out and lse, of the second slice after slice; the KV block is kept once."""
        return [(q1, self._kv, *ring1), (self.q2, Block(self._kv.form, self._kv.flat.new_empty(0)), *ring2)]

    def _message(self, what: str) -> Bundle:
        self._messages.append(self.halves[0].call.bundle(what))
        return self._messages[-1]

    def _begin(self, count: int) -> None:
        """Have so many messages begun."""
        for message in self._messages[self._begun : count]:
            message.post()
            self._begun += 1


def forward_in_halves(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None, call: Call
) -> tuple[torch.Tensor, list[Share]]:
    """Out of this rank's tokens; of each half its q, out and lse after the all-to-all, and all KV with the first."""
    signature = (*(tuple(x.shape) for x in (q, k, v)), call.mask, "halves")
    kept = [x for i in range(2) if (x := stash.take(*signature, i))]  # none unless a checkpoint replays this call
    exchanged = [x.exchanged for x in kept if x.exchanged is not None]
    if exchanged:
        blocks = [Block(call.kv_form(k, v), flat) for _, flat, _ in exchanged]
        shares: list[Share] = [(x[0], kv, *y.ring) for x, kv, y in zip(exchanged, blocks, kept, strict=True)]
        outs = [out for _, _, out in exchanged]
    else:
        coming = _Coming(q, k, v, call)
        if kept:
            first, second = coming.halves
            for index in range(len(second.slices)):
                coming.corner(index)
            (q1, _), _ = coming.first(), coming.late()
            shares = coming.shares(q1, kept[0].ring, kept[1].ring)
            under_way = [first.outward([shares[0][2]], "the output")]
            under_way += [two.outward([shares[1][2][two.shared]], "the output") for two in second.slices]
        else:
            shares, under_way = _attend(coming, call.plan(sink, None))
        outs = [finish()[0] for finish in under_way]
    out = torch.cat(outs)
    for i, ((q_share, kv, out_share, lse), half) in enumerate(zip(shares, _halves(call), strict=True)):
        stash.keep(*signature, i, ring=(out_share, lse), exchanged=(q_share, kv.flat, out[half.local]))
    return out, shares


def _attend(coming: _Coming, plan: RingPlan) -> tuple[list[Share], list[Arrival]]:
    """Attention of both halves; their outputs are on their way back, in the order of this rank's tokens."""
    first, second = coming.halves
    full, causal = plan.rules_between(FULL), plan.rules_between(CAUSAL)
    result = _square(coming, plan)
    q1, early = coming.first()
    ring1 = alone(tile_forward(q1, *early, causal, plan), q1.dtype, plan)
    home1 = first.outward([ring1[0]], "the output")
    late = coming.late()
    part = [x.transpose(0, 1) for x in tile_forward(second.together(coming.q2), *late, causal, plan)]
    out, lse = (second.apart(x).transpose(0, 1) for x in part)
    result.take(slice(0, coming.q2.shape[0]), (out, lse), first_keys=False)
    del part, out, lse
    out2 = torch.empty_like(result.out, dtype=q1.dtype)
    home2: list[Arrival] = []
    *strips, last = second.slices
    k, v = first.last_slice(early) if strips else early
    for two in (last, *strips):
        if two is not last:
            result.take(two.shared, tile_forward(coming.q2[two.shared], k, v, full, plan), first_keys=False)
        out2[two.shared] = result.finish(plan.sink, two.shared)[0]
        home2.append(two.outward([out2[two.shared]], "the output"))
    return coming.shares(q1, ring1, (out2, result.lse)), [home1, *home2[1:], home2[0]]


def _square(coming: _Coming, plan: RingPlan) -> Result:
    """What q of the second half gets from the keys of the first as they come; slice after slice."""
    halves, full = coming.halves, plan.rules_between(FULL)
    result = Result(coming.q2, plan.value_dim)
    for index, two in enumerate(halves[1].slices):
        coming.corner(index)
        for rows, keys in _corner(halves, index):
            k, v = (x[keys] for x in coming.early)
            result.take(rows, tile_forward(coming.q2[rows], k, v, full, plan), first_keys=rows == two.shared)
    return result


def _corner(halves: tuple[_Part, _Part], index: int) -> list[tuple[slice, slice]]:
    """Queries and keys of the tiles by which another slice of both halves makes the square grow: the new queries first.

    Earlier queries with the keys of the last slice are left to the end, for they complete a slice with each tile.
    """
    one, two = (half.slices[index] for half in halves)
    tiles = [(two.shared, slice(0, one.shared.stop)), (slice(0, two.shared.start), one.shared)]
    return tiles if 0 < index < len(halves[0].slices) - 1 else tiles[:1]


def backward_in_halves(
    dout: torch.Tensor, shares: list[Share], sink: torch.Tensor | None, call: Call
) -> tuple[torch.Tensor | None, ...]:
    """dq, dk, dv of this rank's tokens, and dsink of its heads and tokens. `shares` is emptied as it is used."""
    halves, plan = _halves(call), call.plan(sink, None)
    (first, second), causal, wide = halves, plan.rules_between(CAUSAL), accumulator_dtype(dout.dtype)
    (q1, kv, out1, lse1), (q2, _, out2, lse2) = shares
    shares.clear()
    early, late = (half.of(kv.parts) for half in halves)
    queries2 = [q2.new_empty(out2.shape), q2, out2, lse2]
    del q2, out2, lse2
    dout1_arrival, dq2, column = _strips_backward(dout, queries2, early, halves, plan)

    for index, x in enumerate(queries2):
        queries2[index] = second.together(x)
        del x
    # In slices dkv has the link to itself while the other half is computed; else one message costs less than two.
    within = call.bundle("dq, dk and dv") if dq2 is None else None
    part, *dkv = tile_backward(tuple(queries2), *late, causal, plan)
    dkv2_home = second.outward([x.to(dout.dtype) for x in dkv], "dk and dv", within)
    part = second.apart(part)
    if dq2 is None:
        dq2 = part.to(wide)
    else:
        add_rows_([(dq2, part)])
    del part, dkv
    queries1 = dout1_arrival()[0], q1, out1, lse1
    dq, *dkv1 = tile_backward(queries1, *early, causal, plan)
    dq1_home = first.outward([dq.to(dout.dtype)], "dq", within)
    dsink = None if sink is None else _sink_gradient((queries1, queries2), sink, call.query_heads)
    del q1, out1, lse1, queries1, dq  # before the message is put together
    if within is not None:
        within.post()

    operands = [*queries2, *early, dq2]
    del kv, early, late, queries2, dq2
    dq2_home, dkv1_home = _square_backward(operands, dkv1, column, halves, plan)
    dq = torch.cat([dq1_home()[0], *(arrival()[0] for arrival in dq2_home)])
    dkv_home = [*(arrival() for arrival in dkv1_home), dkv2_home()]
    dk, dv = (torch.cat(x) for x in zip(*dkv_home, strict=True))
    return dq, dk, dv, dsink, None


def _strips_backward(
    dout: torch.Tensor, queries: list[torch.Tensor], keys: Pair, halves: tuple[_Part, _Part], plan: RingPlan
) -> tuple[Arrival, torch.Tensor | None, list[torch.Tensor]]:
    """Gradients of what ended the forward pass, as dout of the second half comes: it is written to `queries`.

    queries: dout, q, out, lse of the second half, slice after slice; keys: k, v of the first. Returns what waits for
    dout of the first half, and so far dq of the second and dk, dv of the last slice of the first, wide.
    """
    (first, second), full, what = halves, plan.rules_between(FULL), "the output's gradient"
    coming = [functools.partial(two.inward, [dout], what, None, [queries[0][two.shared]]) for two in second.slices]
    coming.append(functools.partial(first.inward, [dout], what))
    arrivals = [coming[0]()]
    *strips, last = second.slices
    dq = torch.zeros_like(queries[1], dtype=accumulator_dtype(dout.dtype)) if strips else None
    column: list[torch.Tensor] = []
    k, v = first.last_slice(keys) if strips else keys
    for index, two in enumerate(second.slices):
        arrivals[index]()
        arrivals += [begin() for begin in coming[len(arrivals) : index + 3]]  # two messages ahead, as in `_Coming`
        if dq is None or two is last:
            continue
        part, *grads = tile_backward(tuple(x[two.shared] for x in queries), k, v, full, plan)
        add_rows_([(dq[two.shared], part)])
        column = column or [torch.zeros_like(x, dtype=dq.dtype) for x in grads]
        add_rows_(tuple(zip(column, grads, strict=True)))
    return arrivals[-1], dq, column


def _square_backward(
    operands: list[torch.Tensor],
    dkv: list[torch.Tensor],
    column: list[torch.Tensor],
    halves: tuple[_Part, _Part],
    plan: RingPlan,
) -> tuple[list[Arrival], list[Arrival]]:
    """Gradients of the square, on their way home with those so far: dq of the second half, dkv of the first, by slice.

    operands: dout, q, out, lse of the second half, k, v of the first, dq so far, wide and slice after slice. dkv: so
    far; column: more of its last slice. All three are emptied. The last corner of the forward pass comes first, after
    which its slices want no more.
    """
    (first, second), full, dtype = halves, plan.rules_between(FULL), dkv[0].dtype
    for tensors, owners in ((operands, [*[second] * 4, first, first]), (dkv, [first, first])):
        for index, half in enumerate(owners):
            tensors[index] = half.apart(tensors[index])
    *queries, k, v, dq_sum = operands
    operands.clear()
    for index, part in enumerate(column):
        dkv[index] = dkv[index].to(part.dtype)
        add_rows_([(dkv[index][first.slices[-1].shared], part)])
    column.clear()
    home: list[tuple[Arrival, Arrival]] = []
    for corner, (one, two) in reversed(list(enumerate(zip(first.slices, second.slices, strict=True)))):
        for rows, keys in _corner(halves, corner):
            dq, *grads = tile_backward(tuple(x[rows] for x in queries), k[keys], v[keys], full, plan)
            if not corner:
                del queries, k, v
            add_rows_([(dq_sum[rows], dq)])
            del dq
            for index, part in enumerate(grads):  # one after the other, for they are wide
                total = dkv[index].to(dq_sum.dtype)
                add_rows_([(total[keys], part)])
                dkv[index] = total if corner else total[keys].to(dtype)
            del grads, part, total
        bundle = first.call.bundle("dq, dk and dv")
        gone = [x[one.shared].to(dtype) for x in dkv] if corner else dkv
        dkv_arrival = one.outward(gone, "dk and dv", bundle)
        gone = [dq_sum[two.shared].to(dtype)]
        if not corner:
            del dq_sum
        home.append((two.outward(gone, "dq", bundle), dkv_arrival))
        bundle.post()
    home.reverse()
    return [x for x, _ in home], [x for _, x in home]


def _sink_gradient(halves: Sequence[Sequence[torch.Tensor]], sink: torch.Tensor, heads: slice) -> torch.Tensor:
    dsink = torch.zeros_like(sink)
    for dout, _, out, lse in halves:
        dsink[heads] += sink_gradient(dout, out, lse, sink[heads])
    return dsink
