"""One attention call: all-to-all, ring, all-to-all back; and the same for its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_loong.attention import stash
from megatron_loong.attention.blocks import Block, Form, accumulator_dtype
from megatron_loong.attention.double_ring import ring_backward, ring_forward
from megatron_loong.attention.expansion import LatentHeads, PlainHeads
from megatron_loong.attention.head_exchange import HeadExchange
from megatron_loong.attention.heads import HeadShares
from megatron_loong.attention.merge import sink_gradient
from megatron_loong.attention.plan import RingPlan
from megatron_loong.comm.ring import Ring
from megatron_loong.kernels.interface import AttentionKernel, Dropout, TileRules
from megatron_loong.planner.rotation import Moving, backward_moving, backward_rows
from megatron_loong.planner.schedule import ring_schedule
from megatron_loong.planner.tiles import Mask
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
    alibi_slopes: torch.Tensor | None
    dropout: tuple[float, int] | None
    """(p, seed)."""
    max_logits: torch.Tensor | None
    wire_dtype: torch.dtype
    """What gradients travel in on the rings."""
    deterministic: bool

    @property
    def query_heads(self) -> slice:
        """The query heads of this rank after the all-to-all."""
        heads = self.shares.query[self.groups.handle("head").rank]
        return slice(heads.start, heads.stop)

    def exchange(self, layout: TokenLayout) -> HeadExchange:
        """The all-to-all over the head group for tokens in `layout`."""
        return HeadExchange(self.groups.handle("head"), layout, self.groups.ring_rank)

    def kv_rows(self) -> int:
        """KV rows of this ring rank."""
        return sum(stop - start for start, stop in self.layouts[1].ring_runs(self.groups.ring_rank))

    def moving_backward(self, q: Form, kv: Form) -> Moving:
        """Which side moves in the backward pass, given the forms of q and of k and v after the all-to-all."""
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
        config, heads = self.groups.config, self.query_heads
        handles = [self.groups.handle(name) for name in ("inner", "outer", "inner_dkv", "outer_dkv")]
        assert config.inner_ring_size is not None
        narrow = self.wire_dtype.itemsize < torch.float32.itemsize
        return RingPlan(
            forward=ring_schedule(*self.layouts, self.mask, config.inner_ring_size),
            backward=ring_schedule(*self.layouts, self.mask, config.inner_ring_size, moving, narrow),
            ring_rank=self.groups.ring_rank,
            rings={handle.name: Ring(handle) for handle in handles if handle.process_group is not None},
            kernel=self.kernel,
            rules=TileRules(
                softmax_scale=self.softmax_scale,
                softcap=self.softcap,
                alibi_slopes=None if self.alibi_slopes is None else self.alibi_slopes[heads],
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
        out, q_share, kv, out_share, lse = _forward(q, k, v, call.plan(sink, up_weight), call)
        ctx.save_for_backward(q_share, kv.flat, out_share, lse, sink, up_weight)
        ctx.kv_form = kv.form
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        q_share, kv_flat, out_share, lse, sink, up_weight = ctx.saved_tensors
        call, kv = ctx.call, Block(ctx.kv_form, kv_flat)
        plan = call.plan(sink, up_weight, call.moving_backward(Form.like(q_share), kv.form))
        dq, dk, dv, dout_share = _backward(dout, q_share, kv, out_share, lse, plan, call)
        dsink = dweight = None
        if sink is not None:
            dsink = torch.zeros_like(sink)
            dsink[call.query_heads] = sink_gradient(dout_share, out_share, lse, sink[call.query_heads])
        if isinstance(plan.expansion, LatentHeads):
            dweight = torch.zeros_like(up_weight)
            dweight[call.query_heads] = plan.expansion.weight_gradient.to(dweight.dtype)
        return dq, dk, dv, dsink, dweight, None


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: RingPlan, call: Call
) -> tuple[torch.Tensor, torch.Tensor, Block, torch.Tensor, torch.Tensor]:
    shares, me = call.shares, call.groups.handle("head").rank
    form = Form.of(*(((x.shape[1], len(shares.kv[me]), x.shape[3]), x.dtype) for x in (k, v)))
    signature = (*(tuple(x.shape) for x in (q, k, v)), call.mask, call.dropout)
    kept = stash.take(*signature)  # None unless a checkpoint replays this call
    if kept is not None and kept.exchanged is not None:
        q_share, kv_flat, out = kept.exchanged
        return out, q_share, Block(form, kv_flat), *kept.ring
    kv = form.empty(call.kv_rows(), k.device)
    kv_shares = [shares.kv, shares.kv]
    q_exchange, kv_exchange = (call.exchange(layout) for layout in call.layouts)
    if call.layouts[0] is call.layouts[1]:
        q, _, _ = q_exchange.split([q, k, v], [shares.query, *kv_shares], "q, k and v", into=[None, *kv.parts])
    else:
        (q,) = q_exchange.split([q], [shares.query], "q")
        kv_exchange.split([k, v], kv_shares, "k and v", into=kv.parts)
    out_share, lse = ring_forward(q, kv, plan) if kept is None else kept.ring
    (out,) = q_exchange.join([out_share], [shares.query], "the output")
    stash.keep(*signature, ring=(out_share, lse), exchanged=(q, kv.flat, out))
    return out, q, kv, out_share, lse


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    kv: Block,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: RingPlan,
    call: Call,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) of this rank's tokens, and dout of its heads."""
    shares = call.shares
    q_exchange, kv_exchange = (call.exchange(layout) for layout in call.layouts)
    (dout,) = q_exchange.split([dout], [shares.query], "the output's gradient")
    # Summed in float32 to the end; rounded once, here, so that the all-to-all carries the input's width.
    grads = [x.to(q.dtype) for x in ring_backward(dout, q, kv, out, lse, plan)]
    if call.layouts[0] is call.layouts[1]:
        dq, dk, dv = q_exchange.join(grads, [shares.query, shares.kv, shares.kv], "dq, dk and dv")
    else:
        (dq,) = q_exchange.join(grads[:1], [shares.query], "dq")
        dk, dv = kv_exchange.join(grads[1:], [shares.kv, shares.kv], "dk and dv")
    return dq, dk, dv, dout
