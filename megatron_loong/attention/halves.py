"""The sequence in two halves, so that all-to-alls hide where the heads of a rank cannot be parted.

Without a ring nothing hides the all-to-all of Ulysses but the attention itself. In zigzag every rank holds as much of
the first half of the sequence as of the second. Under a causal mask each half attends to itself, and the second to all
of the first: a rectangle, half of the attention, which is computed where most has to come or to go. What stands in one
box travels together:

    forward     q of 2, kv of 1 | q of 1, kv of 2 |
                                | 2 with 1        | 1 with 1 | 2 with 2 |
                                                             | out of 1 | out of 2
    backward    dout of 2 | dout of 1 |
                          | 2 with 2  | 1 with 1  | 2 with 1          |
                                                  | dq of 1, dkv of 2 | dq of 2, dkv of 1

The bytes are those of one exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_loong.attention import stash
from megatron_loong.attention.blocks import Block, accumulator_dtype
from megatron_loong.attention.double_ring import Queries, Result, alone, tile_backward, tile_forward
from megatron_loong.attention.head_exchange import Arrival, HeadExchange
from megatron_loong.attention.merge import sink_gradient
from megatron_loong.attention.plan import RingPlan
from megatron_loong.comm.all_to_all import Bundle
from megatron_loong.config import CAUSAL, FULL
from megatron_loong.kernels.folds import add_rows_

if TYPE_CHECKING:
    from megatron_loong.attention.call import Call, Share

Pair = tuple[torch.Tensor, torch.Tensor]
"""k and v, or out and lse."""


@dataclass(frozen=True)
class _Half:
    """One half of the sequence."""

    call: Call
    exchange: HeadExchange
    local: slice
    """Rows of what a rank holds."""
    shared: slice
    """Rows of what it has of its heads, after the all-to-all."""

    def inward(
        self, tensors: Sequence[torch.Tensor], what: str, bundle: Bundle | None = None, into: Pair | None = None
    ) -> Arrival:
        """Begin the all-to-all of q or dout, or of k and v."""
        return self.exchange.split([x[self.local] for x in tensors], self._heads(tensors), what, into, bundle)

    def outward(self, tensors: list[torch.Tensor], what: str, bundle: Bundle | None = None) -> Arrival:
        """Begin the all-to-all back of out or dq, or of dk and dv. The list is emptied."""
        return self.exchange.join(tensors, self._heads(tensors), what, bundle=bundle)

    def keys(self, kv: Block) -> Pair:
        """Its k and v."""
        k, v = kv.parts
        return k[self.shared], v[self.shared]

    def _heads(self, tensors: Sequence[torch.Tensor]) -> list[tuple[range, ...]]:
        shares = self.call.shares
        return [shares.query] if len(tensors) == 1 else [shares.kv, shares.kv]


def _halves(call: Call) -> tuple[_Half, _Half]:
    layouts = call.layouts[0].halves
    assert layouts is not None
    found, local, shared = [], 0, 0
    for layout in layouts:
        tokens = layout.tokens_of(call.groups.logical_rank)
        rows = slice(local, local + tokens), slice(shared, shared + layout.seq_len)
        found.append(_Half(call, call.exchange(layout), *rows))
        local, shared = rows[0].stop, rows[1].stop
    return found[0], found[1]


class _Coming:
    """q, k and v on their way, in two messages: the second is packed at once, and begun when the first is here.

    Begun together they would share the link, and the tile that needs only the first would wait for more.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> None:
        self.halves = first, second = _halves(call)
        self._kv = call.kv_form(k, v).empty(call.kv_rows(), k.device)
        self._keys = first.keys(self._kv), second.keys(self._kv)
        now, self._later = (call.bundle("q, k and v") for _ in range(2))
        q2, early = second.inward([q], "q", now), first.inward([k, v], "k and v", now, self._keys[0])
        now.post()
        q1, late = first.inward([q], "q", self._later), second.inward([k, v], "k and v", self._later, self._keys[1])
        self._opening, self._rest = (q2, early), (q1, late)

    def opening(self) -> tuple[torch.Tensor, Pair]:
        """q of the second half, k and v of the first; to be asked for once, before the rest."""
        q2, early = self._opening
        here = q2()[0]
        self._later.post()
        early()
        return here, self._keys[0]

    def rest(self) -> tuple[torch.Tensor, Pair]:
        """q of the first half, k and v of the second; to be asked for once."""
        q1, late = self._rest
        late()
        return q1()[0], self._keys[1]

    def shares(self, q1: torch.Tensor, q2: torch.Tensor, ring1: Pair, ring2: Pair) -> list[Share]:
        """Of each half q, out and lse; the KV block is kept once."""
        return [(q1, self._kv, *ring1), (q2, Block(self._kv.form, self._kv.flat.new_empty(0)), *ring2)]


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
            (q2, _), (q1, _) = coming.opening(), coming.rest()
            shares = coming.shares(q1, q2, kept[0].ring, kept[1].ring)
            under_way = [x.outward([share[2]], "the output") for x, share in zip(coming.halves, shares, strict=True)]
        else:
            shares, under_way = _attend(coming, call.plan(sink, None))
        outs = [finish()[0] for finish in under_way]
    for i, ((q_share, kv, out_share, lse), out) in enumerate(zip(shares, outs, strict=True)):
        stash.keep(*signature, i, ring=(out_share, lse), exchanged=(q_share, kv.flat, out))
    return torch.cat(outs), shares


def _attend(coming: _Coming, plan: RingPlan) -> tuple[list[Share], list[Arrival]]:
    """Attention of both halves; their outputs are on their way back."""
    first, second = coming.halves
    full, causal = plan.rules_between(FULL), plan.rules_between(CAUSAL)
    q2, early = coming.opening()
    every, result = slice(0, q2.shape[0]), Result(q2, plan.value_dim)
    result.take(every, tile_forward(q2, *early, full, plan), first_keys=True)
    q1, late = coming.rest()
    ring1 = alone(tile_forward(q1, *early, causal, plan), q1.dtype, plan)
    under_way = [first.outward([ring1[0]], "the output")]
    result.take(every, tile_forward(q2, *late, causal, plan), first_keys=False)
    ring2 = result.finish(plan.sink)
    del result
    under_way.append(second.outward([ring2[0]], "the output"))
    return coming.shares(q1, q2, ring1, ring2), under_way


def backward_in_halves(
    dout: torch.Tensor, shares: list[Share], sink: torch.Tensor | None, call: Call
) -> tuple[torch.Tensor | None, ...]:
    """dq, dk, dv of this rank's tokens, and dsink of its heads and tokens. `shares` is emptied as it is used."""
    (first, second), plan = _halves(call), call.plan(sink, None)
    full, causal = plan.rules_between(FULL), plan.rules_between(CAUSAL)
    dout2_arrival = second.inward([dout], "the output's gradient")
    (q1, kv, out1, lse1), (q2, _, out2, lse2) = shares
    shares.clear()
    early, late = first.keys(kv), second.keys(kv)
    now, later = (call.bundle("dq, dk and dv") for _ in range(2))

    queries2 = dout2_arrival()[0], q2, out2, lse2
    dout1_arrival = first.inward([dout], "the output's gradient")
    dq, *dkv = tile_backward(queries2, *late, causal, plan)
    dkv2_home = second.outward([x.to(dout.dtype) for x in dkv], "dk and dv", now)
    dq2 = dq.to(accumulator_dtype(dout.dtype))
    del dq, dkv
    queries1 = dout1_arrival()[0], q1, out1, lse1
    dq, *dkv1 = tile_backward(queries1, *early, causal, plan)
    dq1_home = first.outward([dq.to(dout.dtype)], "dq", now)
    dsink = None if sink is None else _sink_gradient((queries1, queries2), sink, call.query_heads)
    del q1, out1, lse1, queries1, dq  # before the message is put together
    now.post()

    dq, *dkv = tile_backward(queries2, *early, full, plan)
    del kv, early, late, q2, out2, lse2, queries2
    add_rows_([(dq2, dq)])
    del dq
    for i, part in enumerate(dkv):
        dkv[i] = dkv1[i].to(dq2.dtype).add_(part).to(dout.dtype)
        del part
    dkv1_home = first.outward(dkv, "dk and dv", later)
    dq2_home = second.outward([dq2.to(dout.dtype)], "dq", later)
    del dkv1, dq2
    later.post()
    dq = torch.cat([dq1_home()[0], dq2_home()[0]])
    dk, dv = (torch.cat(x) for x in zip(dkv1_home(), dkv2_home(), strict=True))
    return dq, dk, dv, dsink, None


def _sink_gradient(halves: Sequence[Queries], sink: torch.Tensor, heads: slice) -> torch.Tensor:
    dsink = torch.zeros_like(sink)
    for dout, _, out, lse in halves:
        dsink[heads] += sink_gradient(dout, out, lse, sink[heads])
    return dsink
