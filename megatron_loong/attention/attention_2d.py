"""2D-Attention: head parallelism x Double-Ring-Attention (LoongTrain, arXiv 2406.18485, section 4.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from megatron_loong.attention import stash
from megatron_loong.attention.checks import check_inputs
from megatron_loong.attention.double_ring import KVBlock, ring_backward, ring_forward
from megatron_loong.attention.head_exchange import HeadExchange
from megatron_loong.attention.heads import HeadShares, head_shares
from megatron_loong.attention.merge import sink_gradient
from megatron_loong.attention.plan import RingPlan
from megatron_loong.comm.ring import Ring
from megatron_loong.kernels.interface import AttentionKernel, Dropout, KernelRequest, TileRules
from megatron_loong.kernels.registry import choose_kernel
from megatron_loong.planner.schedule import ring_schedule
from megatron_loong.planner.tiles import Mask
from megatron_loong.sequence.sharding import Boundaries, gather_lengths, layout_of
from megatron_loong.topology.groups import LoongGroups
from megatron_loong.topology.tokens import TokenLayout


def attention_2d(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: LoongGroups,
    *,
    qkv_format: Literal["bshd", "sbhd", "thd"] = "bshd",
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] | None = None,
    cu_seqlens: Boundaries | None = None,
    dropout_p: float = 0.0,
    kernel: str | AttentionKernel = "auto",
    deterministic: bool = False,
    cu_seqlens_kv: Boundaries | None = None,
    seq_len: int | None = None,
    kv_seq_len: int | None = None,
    softmax_offset: torch.Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    dropout_seed: int | None = None,
    max_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact attention over a sequence of which this rank holds the tokens `token_positions` names.

    Collective over the context-parallel group of `groups`. Differentiable (once) in q, k, v and `softmax_offset`.

    Shapes: q [b, s, h, d], k [b, s_kv, g, d], v [b, s_kv, g, dv] for `bshd`, the first two swapped for `sbhd`,
    [t, heads, d] for `thd`; lengths are local. Query head i reads KV head i // (h // g). Any number of query heads
    from `head_parallel_size` on, KV heads in any relation to it. Returns q's shape with v's head width, in q's dtype:
    float64, float32, bfloat16 or float16; a query that sees no key gets zeros.

    cu_seqlens: int32 [documents + 1], global: packed documents of any length, each attending to itself alone; needed
        for `thd`, and for `bshd` the same in every row of the batch. The ranks hold what `token_positions(...,
        cu_seqlens=)` says. `cu_seqlens_kv` where keys come in other numbers than queries.
    causal, window_size: a query sees `window_size[0]` keys before and `window_size[1]` after its own place (-1, the
        default: all); causal closes the right side. With s != s_kv the last query stands at the last key.
    seq_len, kv_seq_len: global lengths (thd: all tokens). None: the ranks ask each other, which makes the device
        wait; give them in a training loop.
    softmax_scale: 1 / sqrt(d) by default. softcap: scores become softcap * tanh(scores / softcap).
    softmax_offset [h]: attention sink, a score without a value that joins each row's softmax (zeros: off by one). Its
        gradient is that of this rank's queries: sum it over the group.
    alibi_slopes [h]: slope times distance is taken off a score (self-attention).
    dropout_p: attention dropout; the mask depends on `dropout_seed` (drawn from torch's default generator unless
        given; the same on all ranks) and on where a pair stands, not on the layout.
    max_logits [h] float32: raised to the greatest scaled score of each head seen on this rank (QK-clip); the maximum
        over the group is that of the sequence. One more pass over q and k.
    kernel: a name of `kernels.registry`, "auto", or a kernel object. deterministic: honoured, or a `ValueError`.

    Raises, on every rank alike and before anything of q, k or v is sent: `ValueError` for shapes, heads, lengths or
    features that do not fit the layout or that no kernel here has. `CommunicationError` when a peer is lost.
    """
    if qkv_format == "thd":
        q, k, v = (x.unsqueeze(1) if x.dim() == 3 else x for x in (q, k, v))
    elif qkv_format == "bshd":
        q, k, v = (x.transpose(0, 1) if x.dim() == 4 else x for x in (q, k, v))
    check_inputs(q, k, v, groups, qkv_format, cu_seqlens, softmax_offset, alibi_slopes, dropout_p, max_logits)
    mask = Mask.of(causal, window_size)
    request = kernel_request(
        q,
        k,
        v,
        groups.config.head_parallel_size,
        deterministic,
        windowed=mask.left is not None or mask.right not in (None, 0),
        softcap=bool(softcap),
        alibi=alibi_slopes is not None,
        dropout=bool(dropout_p),
    )
    chosen = choose_kernel(request, kernel)
    layouts = _layouts(q, k, groups, cu_seqlens, cu_seqlens_kv, seq_len, kv_seq_len)
    if dropout_p and dropout_seed is None:
        dropout_seed = int(torch.randint(2**62, ()))
    call = _Call(
        groups=groups,
        layouts=layouts,
        mask=mask,
        kernel=chosen,
        shares=head_shares(q.shape[2], k.shape[2], groups.config.head_parallel_size),
        softmax_scale=1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout=(dropout_p, dropout_seed) if dropout_p and dropout_seed is not None else None,
        max_logits=max_logits,
        deterministic=deterministic,
    )
    out = _Attention2D.apply(q, k, v, softmax_offset, call)
    return out.squeeze(1) if qkv_format == "thd" else out.transpose(0, 1) if qkv_format == "bshd" else out


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of `attention_2d`: all but the tensors that it is differentiated in."""

    groups: LoongGroups
    layouts: tuple[TokenLayout, TokenLayout]
    """Of queries and of keys."""
    mask: Mask
    kernel: AttentionKernel
    shares: HeadShares
    softmax_scale: float
    softcap: float
    alibi_slopes: torch.Tensor | None
    dropout: tuple[float, int] | None
    """(p, seed)."""
    max_logits: torch.Tensor | None
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

    def plan(self, sink: torch.Tensor | None) -> RingPlan:
        """What the ring does."""
        config, heads = self.groups.config, self.query_heads
        handles = [self.groups.handle(name) for name in ("inner", "outer", "inner_dkv", "outer_dkv")]
        assert config.inner_ring_size is not None
        return RingPlan(
            schedule=ring_schedule(*self.layouts, self.mask, config.inner_ring_size),
            ring_rank=self.groups.ring_rank,
            rings={handle.name: Ring(handle) for handle in handles if handle.process_group is not None},
            kernel=self.kernel,
            rules=TileRules(
                softmax_scale=self.softmax_scale,
                softcap=self.softcap,
                alibi_slopes=None if self.alibi_slopes is None else self.alibi_slopes[heads],
                dropout=None if self.dropout is None else Dropout(*self.dropout, first_head=heads.start),
            ),
            deterministic=self.deterministic,
            kv_of_query=self.shares.kv_of_query(self.groups.handle("head").rank),
            sink=None if sink is None else sink.detach()[heads],
            max_logits=None if self.max_logits is None else self.max_logits[heads],
        )


class _Attention2D(torch.autograd.Function):
    """Saves and unpacks; the work is in `_forward` and `_backward`. Tensors are [s, b, heads, d]."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None, call: _Call
    ) -> Any:
        out, q_share, kv, out_share, lse = _forward(q, k, v, sink, call)
        ctx.save_for_backward(q_share, kv.flat, out_share, lse, sink)
        ctx.kv_rows = kv.k_row, kv.v_row
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        q_share, kv_flat, out_share, lse, sink = ctx.saved_tensors
        kv = KVBlock(kv_flat, *ctx.kv_rows)
        return *_backward(dout, q_share, kv, out_share, lse, sink, ctx.call), None


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None, call: _Call
) -> tuple[torch.Tensor, torch.Tensor, KVBlock, torch.Tensor, torch.Tensor]:
    shares, me = call.shares, call.groups.handle("head").rank
    k_row, v_row = ((x.shape[1], len(shares.kv[me]), x.shape[3]) for x in (k, v))
    signature = (*(tuple(x.shape) for x in (q, k, v)), call.mask, call.dropout)
    kept = stash.take(*signature)  # None unless a checkpoint replays this call
    if kept is not None and kept.exchanged is not None:
        q_share, kv_flat, out = kept.exchanged
        return out, q_share, KVBlock(kv_flat, k_row, v_row), *kept.ring
    kv = KVBlock.empty(call.kv_rows(), k_row, v_row, like=k)
    kv_shares = [shares.kv, shares.kv]
    q_exchange, kv_exchange = (call.exchange(layout) for layout in call.layouts)
    if call.layouts[0] is call.layouts[1]:
        q, _, _ = q_exchange.split([q, k, v], [shares.query, *kv_shares], "q, k and v", into=[None, kv.k, kv.v])
    else:
        (q,) = q_exchange.split([q], [shares.query], "q")
        kv_exchange.split([k, v], kv_shares, "k and v", into=[kv.k, kv.v])
    out_share, lse = ring_forward(q, kv, call.plan(sink)) if kept is None else kept.ring
    (out,) = q_exchange.join([out_share], [shares.query], "the output")
    stash.keep(*signature, ring=(out_share, lse), exchanged=(q, kv.flat, out))
    return out, q, kv, out_share, lse


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    kv: KVBlock,
    out: torch.Tensor,
    lse: torch.Tensor,
    sink: torch.Tensor | None,
    call: _Call,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    shares = call.shares
    q_exchange, kv_exchange = (call.exchange(layout) for layout in call.layouts)
    (dout,) = q_exchange.split([dout], [shares.query], "the output's gradient")
    dq, dkv = ring_backward(dout, q, kv, out, lse, call.plan(sink))
    # Summed in float32 to the end; rounded once, here, so that the all-to-all carries the input's width.
    grads = [x.to(q.dtype) for x in (dq, dkv.k, dkv.v)]
    if call.layouts[0] is call.layouts[1]:
        dq, dk, dv = q_exchange.join(grads, [shares.query, shares.kv, shares.kv], "dq, dk and dv")
    else:
        (dq,) = q_exchange.join(grads[:1], [shares.query], "dq")
        dk, dv = kv_exchange.join(grads[1:], [shares.kv, shares.kv], "dk and dv")
    dsink = None
    if sink is not None:
        dsink = torch.zeros_like(sink)
        dsink[call.query_heads] = sink_gradient(dout, out, lse, sink.detach()[call.query_heads])
    return dq, dk, dv, dsink


def _layouts(
    q: torch.Tensor,
    k: torch.Tensor,
    groups: LoongGroups,
    cu_seqlens: Boundaries | None,
    cu_seqlens_kv: Boundaries | None,
    seq_len: int | None,
    kv_seq_len: int | None,
) -> tuple[TokenLayout, TokenLayout]:
    """Layouts of queries and keys (the same object for self-attention), checked against what this rank holds."""
    config = groups.config
    same = cu_seqlens_kv is None and kv_seq_len is None and q.shape[0] == k.shape[0]
    if config.context_parallel_size == 1:
        seq_len, kv_seq_len = q.shape[0], k.shape[0]
    if seq_len is None or (kv_seq_len is None and not same):
        held = gather_lengths([q.shape[0], k.shape[0]], groups, q.device)
        same = cu_seqlens_kv is None and all(a == b for a, b in held)
        seq_len, kv_seq_len = (sum(side) for side in zip(*held, strict=True))
    q_layout = layout_of(config, seq_len, cu_seqlens)
    if same:
        kv_layout = q_layout
    else:
        kv_boundaries = cu_seqlens if cu_seqlens_kv is None else cu_seqlens_kv
        kv_layout = layout_of(config, kv_seq_len or seq_len, kv_boundaries)
        if len(q_layout.documents) != len(kv_layout.documents):
            raise ValueError(
                f"cu_seqlens has {len(q_layout.documents) - 1} documents with queries, cu_seqlens_kv has "
                f"{len(kv_layout.documents) - 1} with keys; they must be as many (leave empty ones out of both)"
            )
    for name, x, layout in (("q", q, q_layout), ("k and v", k, kv_layout)):
        held_here, expected = x.shape[0], layout.tokens_of(groups.logical_rank)
        if held_here != expected:
            raise ValueError(
                f"{name} of logical rank {groups.logical_rank} has {held_here} tokens; of {layout.seq_len} tokens in "
                f"this layout it holds {expected} (see shard_sequence, token_positions)"
            )
    return q_layout, kv_layout


def kernel_request(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    head_parallel_size: int,
    deterministic: bool,
    **features: bool,
) -> KernelRequest:
    """What `attention_2d` asks of a kernel for local q, k, v with heads in dimension 2: the heads of one tile.

    `features` as in `KernelRequest`. Where ranks get different numbers of heads, the first gets most.
    """
    shares = head_shares(q.shape[2], k.shape[2], head_parallel_size)
    usual_rule = all(shares.kv_of_query(rank) is None for rank in range(head_parallel_size))
    query_heads = len(shares.query[0])
    return KernelRequest(
        device_type=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[3],
        value_head_dim=v.shape[3],
        query_heads=query_heads,
        kv_heads=len(shares.kv[0]) if usual_rule else query_heads,
        deterministic=deterministic,
        **features,
    )
