"""One attention call: all-to-all, ring, all-to-all back; and the same for its gradients.

Heads may go through in parts, one after another. The all-to-all of the next part then runs while the ring of this one
computes, and the all-to-all back of this one while the ring of the next does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_loong.attention import stash
from megatron_loong.attention.block_store import Block, Form
from megatron_loong.attention.double_ring import ring_backward, ring_forward
from megatron_loong.attention.expansion import LatentHeads
from megatron_loong.attention.merge import sink_gradient
from megatron_loong.attention.plan import Call
from megatron_loong.comm.transport import Pending


class Attention2D(torch.autograd.Function):
    """Saves and unpacks; the work is in `forward_pass` and `backward_pass`. Tensors are [s, b, heads, d]."""

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
        out, shares = forward_pass(q, k, v, sink, up_weight, call)
        flat = [x for q_share, kv, out_share, lse in shares for x in (q_share, kv.flat, out_share, lse)]
        ctx.save_for_backward(*flat, sink, up_weight)
        ctx.kv_form, ctx.call = shares[0][1].form, call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        *saved, sink, up_weight = ctx.saved_tensors
        shares = shares_of(saved, ctx.kv_form)
        # `saved`, the context and `shares` hold the same tensors. `backward_pass` frees each part of the heads as it
        # is done with it, and that frees memory only if `shares` alone is left. (With a retained graph the context
        # keeps them.)
        saved.clear()
        ctx.maybe_clear_saved_tensors()
        return *backward_pass(dout, shares, sink, up_weight, ctx.call), None


Share = tuple[torch.Tensor, Block, torch.Tensor, torch.Tensor]
"""What a rank has of one part of the heads after the all-to-all: q, its KV block, out and lse."""


def shares_of(saved: list[torch.Tensor], kv_form: Form) -> list[Share]:
    """Shares from a flat list of their tensors, four for each."""
    return [(saved[i], Block(kv_form, saved[i + 1]), saved[i + 2], saved[i + 3]) for i in range(0, len(saved), 4)]


def forward_pass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor | None,
    up_weight: torch.Tensor | None,
    call: Call,
) -> tuple[torch.Tensor, list[Share]]:
    """The output for this rank's tokens; and the shares, which the backward pass needs."""
    # A checkpoint that replays this call may have kept the ring's result, or also what both all-to-alls gave. Then only
    # what is missing is computed again: nothing, the all-to-alls, or everything. What comes of it is offered to a stash
    # in any case, because checkpoints may be nested.
    parts = call.parts
    shapes = (tuple(x.shape) for x in (q, k, v))
    signature = (*shapes, call.options.mask, call.rules.dropout, call.head_parts)
    kept = [stash.take(*signature, i) for i in range(len(parts))]  # None unless a checkpoint replays this call
    exchanged = [x.exchanged for x in kept if x is not None and x.exchanged is not None]
    if exchanged:
        form = parts[0].kv_form(k, v)
        shares = [
            (q_share, Block(form, kv_flat), *x.ring)
            for (q_share, kv_flat, _), x in zip(exchanged, kept, strict=True)
            if x is not None
        ]
        out = exchanged[-1][2]
    else:
        results = [None if x is None else x.ring for x in kept]
        out, shares = _exchange_and_attend(q, k, v, sink, up_weight, call, results)
    for i, (q_share, kv, out_share, lse) in enumerate(shares):
        # The output of all heads is kept once, with the last part.
        whole = out if i + 1 == len(shares) else out.new_empty(0)
        stash.keep(*signature, i, ring=(out_share, lse), exchanged=(q_share, kv.flat, whole))
    return out, shares


def _exchange_and_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor | None,
    up_weight: torch.Tensor | None,
    call: Call,
    known: list[tuple[torch.Tensor, torch.Tensor] | None],
) -> tuple[torch.Tensor, list[Share]]:
    """As `forward_pass`; known: out and lse of each part, where a checkpoint kept them and the ring need not run."""
    # A pipeline of two stages: the all-to-all of the next part is posted before the ring of this one, and this one's
    # output is sent back while the next ring runs. All outputs are awaited after the last ring, and each part's heads
    # are written where they belong in one tensor of all heads.
    parts, q_exchange = call.parts, call.exchanges[0]
    into = [q.new_empty(*q.shape[:3], call.value_dim)] if len(parts) > 1 else None
    shares: list[Share] = []
    returning: list[Pending[list[torch.Tensor]]] = []
    arriving = _split_qkv(q, k, v, parts[0])
    for i, part in enumerate(parts):
        q_share, kv = arriving()
        if i + 1 < len(parts):
            arriving = _split_qkv(q, k, v, parts[i + 1])  # this part's ring hides it
        result = known[i]
        out_share, lse = ring_forward(q_share, kv, part.plan(sink, up_weight)) if result is None else result
        shares.append((q_share, kv, out_share, lse))
        returning.append(q_exchange.join([out_share], [part.shares.query], "the output", into))
    outs = [pending()[0] for pending in returning]  # one tensor: the parts are written to the same output
    return outs[-1], shares


def backward_pass(
    dout: torch.Tensor,
    shares: list[Share],
    sink: torch.Tensor | None,
    up_weight: torch.Tensor | None,
    call: Call,
) -> tuple[torch.Tensor | None, ...]:
    """dq, dk, dv of this rank's tokens; dsink and the gradient of up_weight of its heads and tokens.

    `shares` is emptied as it is used, so that its memory is free before the gradients are exchanged.
    """
    parts, q_exchange = call.parts, call.exchanges[0]
    dsink, dweight = (None if x is None else torch.zeros_like(x) for x in (sink, up_weight))
    into = _whole_gradients(dout, shares[0], call) if len(parts) > 1 else None
    returning: list[Pending[list[torch.Tensor]]] = []
    arriving = q_exchange.split([dout], [parts[0].shares.query], "the output's gradient")
    for i, part in enumerate(parts):
        (dout_share,) = arriving()
        if i + 1 < len(parts):  # this part's ring hides it
            arriving = q_exchange.split([dout], [parts[i + 1].shares.query], "the output's gradient")
        # Popped, so that these names alone hold the part: the `del` below frees it.
        q_share, kv, out_share, lse = shares.pop(0)
        plan = part.plan(sink, up_weight, part.moving_backward(Form.like(q_share), kv.form))
        grads = list(ring_backward(dout_share, q_share, kv, out_share, lse, plan))
        heads = part.query_heads
        if sink is not None and dsink is not None:
            dsink[heads] = sink_gradient(dout_share, out_share, lse, sink[heads])
        if dweight is not None and isinstance(plan.expansion, LatentHeads):
            dweight[heads] = plan.expansion.weight_gradient.to(dweight.dtype)
        # The sums are in dout's dtype already. A kernel that is called once may give wider gradients, which are rounded
        # here: the operands go before, and each wide gradient as soon as it is rounded.
        del dout_share, q_share, kv, out_share, lse
        for j, wide in enumerate(grads):
            grads[j] = wide.to(dout.dtype)
            del wide
        returning.append(_join_gradients(grads, part, into))
    grads = [pending() for pending in returning][-1]  # one set: the parts are written to the same gradients
    return *grads, dsink, dweight


def _split_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Pending[tuple[torch.Tensor, Block]]:
    """Begin the all-to-all of q, k and v; what it returns waits for q and the KV block of this rank's heads."""
    # k and v are received straight into views of the KV block that will go round the ring, and kernels read the same
    # views: nothing is copied between the all-to-all and the first hop.
    shares, (q_layout, kv_layout), (q_exchange, kv_exchange) = call.shares, call.layouts, call.exchanges
    form = call.kv_form(k, v)
    kv = Block(form, form.buffer(call.rows_after_exchange(kv_layout), k.device))
    if q_layout is kv_layout:  # one message a peer for all three
        heads = [shares.query, shares.kv, shares.kv]
        pending = q_exchange.split([q, k, v], heads, "q, k and v", [None, *kv.parts])
        return lambda: (pending()[0], kv)
    q_pending = q_exchange.split([q], [shares.query], "q")
    kv_pending = kv_exchange.split([k, v], [shares.kv, shares.kv], "k and v", kv.parts)

    def wait() -> tuple[torch.Tensor, Block]:
        (q_share,) = q_pending()
        kv_pending()
        return q_share, kv

    return wait


def _join_gradients(
    grads: list[torch.Tensor], call: Call, into: list[torch.Tensor] | None
) -> Pending[list[torch.Tensor]]:
    """Begin the all-to-all of dq, dk and dv back to this rank's tokens; the list is emptied."""
    shares, (q_layout, kv_layout), (q_exchange, kv_exchange) = call.shares, call.layouts, call.exchanges
    if q_layout is kv_layout:
        return q_exchange.join(grads, [shares.query, shares.kv, shares.kv], "dq, dk and dv", into)
    q_pending = q_exchange.join([grads.pop(0)], [shares.query], "dq", into and into[:1])
    kv_pending = kv_exchange.join(grads, [shares.kv, shares.kv], "dk and dv", into and into[1:])
    return lambda: [*q_pending(), *kv_pending()]


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
