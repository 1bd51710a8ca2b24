"""One attention call: all-to-all, ring, all-to-all back; and the same for its gradients.

Heads may go through in parts, one after another: the all-to-all of the next part runs under the ring of this one, and
the all-to-all back of this one under the ring of the next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_loong.attention import stash
from megatron_loong.attention.block_store import own_block
from megatron_loong.attention.blocks import Block, Form, accumulator_dtype
from megatron_loong.attention.double_ring import ring_backward, ring_forward
from megatron_loong.attention.expansion import LatentHeads, PlainHeads
from megatron_loong.attention.head_exchange import Arrival, HeadExchange
from megatron_loong.attention.heads import HeadShares
from megatron_loong.attention.merge import sink_gradient
from megatron_loong.attention.plan import RingPlan
from megatron_loong.comm.ring import Ring
from megatron_loong.kernels.interface import AttentionKernel, Dropout, TileRules
from megatron_loong.schedule.rotation import Moving, backward_moving, backward_rows
from megatron_loong.schedule.steps import ring_schedule
from megatron_loong.schedule.tiles import Mask
from megatron_loong.topology.groups import LoongGroups
from megatron_loong.topology.tokens import TokenLayout


@dataclass(frozen=True, eq=False)
class Call:
    """All of a call of `attention_2d` but the tensors that it is differentiated in."""

    groups: LoongGroups
    layouts: tuple[TokenLayout, TokenLayout]
    """Of queries and of keys."""
    mask: Mask
    kernel: AttentionKernel
    shares: HeadShares
    value_dim: int
    """Width of the output's heads."""
    softmax_scale: float
    softcap: float
    dropout: tuple[float, int] | None
    """(p, seed)."""
    max_logits: torch.Tensor | None
    head_parts: int
    """Parts in which the heads go through (`HeadShares.part`)."""
    wire_dtype: torch.dtype
    """What gradients travel in on the rings."""
    deterministic: bool

    @property
    def query_heads(self) -> slice:
        """The query heads of this rank after the all-to-all."""
        heads = self.shares.query[self.groups.handle("head").rank]
        return slice(heads.start, heads.stop)

    @property
    def parts(self) -> list[Call]:
        """A call for each part of the heads."""
        if self.head_parts == 1:
            return [self]
        shares = [self.shares.part(i, self.head_parts) for i in range(self.head_parts)]
        return [replace(self, shares=part, head_parts=1) for part in shares]

    def exchange(self, layout: TokenLayout) -> HeadExchange:
        """The all-to-all over the head group for tokens in `layout`."""
        return HeadExchange(self.groups.handle("head"), layout, self.groups.ring_rank)

    @functools.cached_property
    def rings(self) -> dict[str, Ring]:
        """`inner`, `outer`, `inner_dkv`, `outer_dkv`; none for an axis of size 1."""
        handles = [self.groups.handle(name) for name in ("inner", "outer", "inner_dkv", "outer_dkv")]
        return {handle.name: Ring(handle) for handle in handles if handle.process_group is not None}

    def kv_form(self, k: torch.Tensor, v: torch.Tensor) -> Form:
        """A row of the KV block of this rank's heads."""
        heads = len(self.shares.kv[self.groups.handle("head").rank])
        return Form.of(*(((x.shape[1], heads, x.shape[3]), x.dtype) for x in (k, v)))

    def kv_rows(self) -> int:
        """KV rows of this ring rank."""
        return sum(stop - start for start, stop in self.layouts[1].ring_runs(self.groups.ring_rank))

    def moving_backward(self, q: Form, kv: Form) -> Moving:
        """Which side moves in the backward pass, given the forms of q and of k and v after the all-to-all."""
        if self.groups.config.ring_size == 1:
            return "kv"  # nothing does
        ((batch, heads, head_dim), dtype), ((_, kv_heads, k_dim), _), ((_, _, v_dim), _) = *q.parts, *kv.parts
        rows = backward_rows(
            (batch * heads, head_dim, self.value_dim),
            (batch * kv_heads, k_dim, v_dim),
            dtype.itemsize,
            self.wire_dtype.itemsize,
            accumulator_dtype(dtype).itemsize,
        )
        return backward_moving(rows, *(layout.seq_len for layout in self.layouts))

    def plan(self, sink: torch.Tensor | None, up_weight: torch.Tensor | None, moving: Moving = "kv") -> RingPlan:
        """What the ring does; `moving` says which side does in the backward pass."""
        config, heads, ring_rank = self.groups.config, self.query_heads, self.groups.ring_rank
        assert config.inner_ring_size is not None
        narrow = self.wire_dtype.itemsize < torch.float32.itemsize
        scheduled = functools.partial(
            ring_schedule, *self.layouts, self.mask, config.inner_ring_size, least_rows_to_cut=config.least_rows_to_cut
        )
        # Gradients that are rounded to travel go straight to the first rank of a ring: rounded once, not once a hop.
        return RingPlan(
            layouts=self.layouts,
            forward=scheduled().steps(ring_rank, backward=False),
            backward=scheduled(moving, direct_returns=narrow).steps(ring_rank, backward=True),
            ring_rank=ring_rank,
            rings=self.rings,
            kernel=self.kernel,
            rules=TileRules(
                softmax_scale=self.softmax_scale,
                softcap=self.softcap,
                dropout=None if self.dropout is None else Dropout(*self.dropout, first_head=heads.start),
            ),
            expansion=(
                PlainHeads(self.shares.kv_of_query(self.groups.handle("head").rank))
                if up_weight is None
                else LatentHeads(up_weight.detach()[heads], self.value_dim)
            ),
            value_dim=self.value_dim,
            wire_dtype=self.wire_dtype,
            deterministic=self.deterministic,
            sink=None if sink is None else sink.detach()[heads],
            max_logits=None if self.max_logits is None else self.max_logits[heads],
        )


class Attention2D(torch.autograd.Function):
    """Saves and unpacks; the work is in `_forward` and `_backward`. Tensors are [s, b, heads, d]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sink: torch.Tensor | None,
        up_weight: torch.Tensor | None,
        call: Call,
    ) -> Any:
        out_of_all, shares = _forward(q, k, v, sink, up_weight, call)
        ctx.save_for_backward(*(x for q, kv, out, lse in shares for x in (q, kv.flat, out, lse)), sink, up_weight)
        ctx.kv_form, ctx.call = shares[0][1].form, call
        return out_of_all

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        *saved, sink, up_weight = ctx.saved_tensors
        shares = [(q, Block(ctx.kv_form, flat), out, lse) for q, flat, out, lse in zip(*[iter(saved)] * 4, strict=True)]
        saved.clear()
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained, `shares` is all that holds them now
        return *_backward(dout, shares, sink, up_weight, ctx.call), None


Share = tuple[torch.Tensor, Block, torch.Tensor, torch.Tensor]
"""What a rank has of one part of the heads: q, its KV block, out and lse, after the all-to-all."""


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor | None,
    up_weight: torch.Tensor | None,
    call: Call,
) -> tuple[torch.Tensor, list[Share]]:
    signature = (*(tuple(x.shape) for x in (q, k, v)), call.mask, call.dropout, call.head_parts)
    parts = call.parts
    kept = [stash.take(*signature, i) for i in range(len(parts))]  # None unless a checkpoint replays this call
    out = q.new_empty(*q.shape[:3], call.value_dim) if len(parts) > 1 else None
    into = None if out is None else [out]
    shares: list[Share] = []
    under_way: list[Arrival] = []

    def begin(i: int) -> Callable[[], tuple[torch.Tensor, Block]]:
        known = kept[i]
        if known is None or known.exchanged is None:
            return _inward(q, k, v, parts[i])
        q_share, kv_flat, _ = known.exchanged
        return lambda: (q_share, Block(parts[i].kv_form(k, v), kv_flat))

    arriving = begin(0)
    for i, part in enumerate(parts):
        q_share, kv = arriving()
        if i + 1 < len(parts):
            arriving = begin(i + 1)
        known = kept[i]
        out_share, lse = ring_forward(q_share, kv, part.plan(sink, up_weight)) if known is None else known.ring
        shares.append((q_share, kv, out_share, lse))
        if known is None or known.exchanged is None:
            exchange = part.exchange(part.layouts[0])
            under_way.append(exchange.join([out_share], [part.shares.query], "the output", into))
        else:
            under_way.append(lambda joined=known.exchanged[2]: [joined])
    joined = [finish()[0] for finish in under_way][-1]
    for i, (q_share, kv, out_share, lse) in enumerate(shares):
        whole = joined if i + 1 == len(shares) else joined.new_empty(0)  # kept once
        stash.keep(*signature, i, ring=(out_share, lse), exchanged=(q_share, kv.flat, whole))
    return joined, shares


def _inward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Callable[[], tuple[torch.Tensor, Block]]:
    """Begin the all-to-all of q, k and v; the wait gives q and the KV block of this rank's heads."""
    shares = call.shares
    kv = own_block(call.rings, call.kv_form(k, v), call.kv_rows(), k.device)
    q_exchange, kv_exchange = (call.exchange(layout) for layout in call.layouts)
    if call.layouts[0] is call.layouts[1]:
        arrival = q_exchange.split([q, k, v], [shares.query, shares.kv, shares.kv], "q, k and v", [None, *kv.parts])
        return lambda: (arrival()[0], kv)
    q_arrival = q_exchange.split([q], [shares.query], "q")
    kv_arrival = kv_exchange.split([k, v], [shares.kv, shares.kv], "k and v", kv.parts)
    return lambda: (q_arrival()[0], (kv_arrival(), kv)[1])


def _backward(
    dout: torch.Tensor,
    shares: list[Share],
    sink: torch.Tensor | None,
    up_weight: torch.Tensor | None,
    call: Call,
) -> tuple[torch.Tensor | None, ...]:
    """dq, dk, dv of this rank's tokens; dsink and the gradient of up_weight of its heads and tokens.

    `shares` is emptied as it is used, so that its memory goes before the gradients are exchanged.
    """
    parts, exchange = call.parts, call.exchange(call.layouts[0])
    dsink, dweight = (None if x is None else torch.zeros_like(x) for x in (sink, up_weight))
    into = _whole_gradients(dout, shares[0], call) if len(parts) > 1 else None
    under_way: list[Arrival] = []

    def begin(i: int) -> Arrival:
        return exchange.split([dout], [parts[i].shares.query], "the output's gradient")

    arriving = begin(0)
    for i, part in enumerate(parts):
        (dout_share,) = arriving()
        if i + 1 < len(parts):
            arriving = begin(i + 1)
        q_share, kv, out_share, lse = shares.pop(0)
        plan = part.plan(sink, up_weight, part.moving_backward(Form.like(q_share), kv.form))
        grads = list(ring_backward(dout_share, q_share, kv, out_share, lse, plan))
        heads = part.query_heads
        if sink is not None and dsink is not None:
            dsink[heads] = sink_gradient(dout_share, out_share, lse, sink[heads])
        del dout_share, q_share, kv, out_share, lse
        for j, wide in enumerate(grads):  # summed in float32 to the end; rounded once, for the all-to-all
            grads[j] = wide.to(dout.dtype)
            del wide
        under_way.append(_homeward(grads, part, into))
        if dweight is not None and isinstance(plan.expansion, LatentHeads):
            dweight[heads] = plan.expansion.weight_gradient.to(dweight.dtype)
    return *[finish() for finish in under_way][-1], dsink, dweight


def _homeward(grads: list[torch.Tensor], call: Call, into: list[torch.Tensor] | None) -> Arrival:
    """Begin the all-to-all of dq, dk and dv; the list is emptied."""
    shares = call.shares
    q_exchange, kv_exchange = (call.exchange(layout) for layout in call.layouts)
    if call.layouts[0] is call.layouts[1]:
        return q_exchange.join(grads, [shares.query, shares.kv, shares.kv], "dq, dk and dv", into)
    q_arrival = q_exchange.join([grads.pop(0)], [shares.query], "dq", into and into[:1])
    kv_arrival = kv_exchange.join(grads, [shares.kv, shares.kv], "dk and dv", into and into[1:])
    return lambda: [*q_arrival(), *kv_arrival()]


def _whole_gradients(dout: torch.Tensor, share: Share, call: Call) -> list[torch.Tensor]:
    """Uninitialised dq, dk and dv of this rank's tokens, with all heads."""
    logical_rank = call.groups.logical_rank
    (batch, _, k_dim), (_, _, v_dim) = (shape for shape, _ in share[1].form.parts)
    kv_tokens, kv_heads = call.layouts[1].tokens_of(logical_rank), call.shares.kv[-1].stop
    return [
        dout.new_empty(*dout.shape[:3], share[0].shape[3]),
        dout.new_empty(kv_tokens, batch, kv_heads, k_dim),
        dout.new_empty(kv_tokens, batch, kv_heads, v_dim),
    ]
