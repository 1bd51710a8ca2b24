"""The sequence in two halves, so that all-to-alls hide where the heads of a rank cannot be parted.

Without a ring nothing hides the all-to-all of Ulysses but the attention itself. In zigzag every rank holds as much of
the first half of the sequence as of the second, and under a causal mask the first half needs nothing of the second:

    forward     q, k, v of 1 |  q, k, v of 2  |                       |
                             |  1 attends to 1 |  2 attends to 1 and 2  |
                             |                 |  out of 1              |  out of 2
    backward    dout of 2    |  dout of 1                               |
                             |  2 with 1 and 2  |  1 with 1             |
                             |                  |  dq, dk, dv of 2      |  dq, dk, dv of 1

A quarter of the attention is in the first half, three in the second. The bytes are those of one exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from megatron_loong.attention import stash
from megatron_loong.attention.blocks import Block, accumulator_dtype
from megatron_loong.attention.double_ring import ring_backward, ring_forward
from megatron_loong.attention.head_exchange import Arrival, HeadExchange
from megatron_loong.attention.merge import sink_gradient

if TYPE_CHECKING:
    from megatron_loong.attention.call import Call, Share


@dataclass(frozen=True)
class _Half:
    """The queries of one half of the sequence, and the keys up to their end."""

    call: Call
    exchange: HeadExchange
    local: slice
    """Rows of what a rank holds."""
    shared: slice
    """Rows of what it has of its heads, after the all-to-all."""

    def inward(self, tensors: list[torch.Tensor], into: list[torch.Tensor | None], what: str) -> Arrival:
        """Begin the all-to-all of q (and k and v), or of dout; `into` are results for the whole sequence."""
        shares = self.call.shares
        places = [None if x is None else x[self.shared] for x in into]
        heads = [shares.query, shares.kv, shares.kv][: len(tensors)]
        return self.exchange.split([x[self.local] for x in tensors], heads, what, places)

    def outward(self, tensors: list[torch.Tensor], what: str) -> Arrival:
        """Begin the all-to-all back of out, or of dq, dk and dv. The list is emptied."""
        shares = self.call.shares
        return self.exchange.join(tensors, [shares.query, shares.kv, shares.kv][: len(tensors)], what)


def _halves(call: Call) -> tuple[_Half, _Half]:
    layouts = call.layouts[0].halves
    assert layouts is not None
    found, local, shared = [], 0, 0
    for layout, keys in zip(layouts, (layouts[0], call.layouts[1]), strict=True):
        tokens = layout.tokens_of(call.groups.logical_rank)
        half = replace(call, layouts=(layout, keys), sequence_parts=1)
        rows = slice(local, local + tokens), slice(shared, shared + layout.seq_len)
        found.append(_Half(half, half.exchange(layout), *rows))
        local, shared = rows[0].stop, rows[1].stop
    return found[0], found[1]


def forward_in_halves(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None, call: Call
) -> tuple[torch.Tensor, list[Share]]:
    """Out of this rank's tokens; of each half its q, out and lse after the all-to-all, and all KV with the first."""
    signature = (*(tuple(x.shape) for x in (q, k, v)), call.mask, "halves")
    both = _halves(call)
    kept = [stash.take(*signature, i) for i in range(2)]  # None unless a checkpoint replays this call
    known = kept[0].exchanged if kept[0] is not None else None
    form, rows = call.kv_form(k, v), call.kv_rows()
    kv = form.empty(rows, k.device) if known is None else Block(form, known[1])
    shares: list[Share] = []
    under_way: list[Arrival] = []

    def begin(i: int) -> Callable[[], torch.Tensor]:
        before = kept[i]
        if before is not None and before.exchanged is not None:
            return lambda q_share=before.exchanged[0]: q_share
        arrival = both[i].inward([q, k, v], [None, *kv.parts], "q, k and v")
        return lambda: arrival()[0]

    arriving = begin(0)
    for i, half in enumerate(both):
        q_share = arriving()
        if i == 0:
            arriving = begin(1)
        before = kept[i]
        if before is None:
            out_share, lse = ring_forward(q_share, kv.leading(half.shared.stop), half.call.plan(sink, None))
        else:
            out_share, lse = before.ring
        # The KV block is kept once.
        shares.append((q_share, kv if i == 0 else Block(form, kv.flat.new_empty(0)), out_share, lse))
        if before is None or before.exchanged is None:
            under_way.append(half.outward([out_share], "the output"))
        else:
            under_way.append(lambda joined=before.exchanged[2]: [joined])
    parts = [finish()[0] for finish in under_way]
    for i, ((q_share, block, out_share, lse), part) in enumerate(zip(shares, parts, strict=True)):
        stash.keep(*signature, i, ring=(out_share, lse), exchanged=(q_share, block.flat, part))
    return torch.cat(parts), shares


def backward_in_halves(
    dout: torch.Tensor, shares: list[Share], sink: torch.Tensor | None, call: Call
) -> tuple[torch.Tensor | None, ...]:
    """dq, dk, dv of this rank's tokens, and dsink of its heads and tokens. `shares` is emptied as it is used."""
    first, second = both = _halves(call)
    dsink = None if sink is None else torch.zeros_like(sink)
    wide = accumulator_dtype(dout.dtype)
    kv, middle = shares[0][1], first.shared.stop
    carried: tuple[torch.Tensor, ...] = ()
    under_way: list[Arrival] = []
    arriving = second.inward([dout], [None], "the output's gradient")
    for half in both[::-1]:
        (dout_share,) = arriving()
        if half is second:
            arriving = first.inward([dout], [None], "the output's gradient")
        q_share, _, out_share, lse = shares.pop()
        block = kv.leading(half.shared.stop)
        dq, *dkv = ring_backward(dout_share, q_share, block, out_share, lse, half.call.plan(sink, None))
        if sink is not None and dsink is not None:
            dsink[half.call.query_heads] += sink_gradient(dout_share, out_share, lse, sink[half.call.query_heads])
        del dout_share, q_share, out_share, lse, block
        if half is second:
            carried = tuple(x[:middle] for x in dkv)
            dkv = [x[middle:] for x in dkv]
        else:
            dkv = [x.to(wide).add_(before) for x, before in zip(dkv, carried, strict=True)]
        grads = [dq.to(dout.dtype), *(x.to(dout.dtype) for x in dkv)]
        del dq, dkv
        under_way.append(half.outward(grads, "dq, dk and dv"))
    parts = [finish() for finish in under_way][::-1]
    return *(torch.cat(pair) for pair in zip(*parts, strict=True)), dsink, None
