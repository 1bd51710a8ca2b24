"""2D-Attention: head parallelism x Double-Ring-Attention (LoongTrain, arXiv 2406.18485, section 4.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from megatron_loong.attention import stash
from megatron_loong.attention.double_ring import KVBlock, RingPlan, ring_backward, ring_forward
from megatron_loong.attention.head_exchange import (
    join_heads,
    replicas_per_kv_head,
    replicate_heads,
    split_heads,
    sum_replicas,
)
from megatron_loong.comm.ring import Ring
from megatron_loong.kernels.interface import AttentionKernel, KernelRequest
from megatron_loong.kernels.registry import choose_kernel
from megatron_loong.sequence.sharding import ring_runs
from megatron_loong.topology.groups import LoongGroups
from megatron_loong.topology.placement import fitting_head_parallel_sizes


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
    cu_seqlens: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    kernel: str | AttentionKernel = "auto",
    deterministic: bool = False,
) -> torch.Tensor:
    """Exact attention over a sequence of which this rank holds the tokens `token_positions` names.

    Collective over the context-parallel group of `groups`. Differentiable (once) in q, k and v.

    Shapes: q [b, s, h, d], k [b, s, g, d], v [b, s, g, dv] for `bshd`, the first two swapped for `sbhd`; s is the
    local length S / cp_size, query head i reads KV head i // (h // g). Returns q's shape with v's head width, in
    q's dtype: float64, float32, bfloat16 or float16. KV heads are replicated when `head_parallel_size` does not
    divide them. `softmax_scale` defaults to 1 / sqrt(d). `kernel` is a name of `kernels.registry` or "auto".

    Raises, on every rank alike and before anything is sent: `ValueError` for shapes, heads or lengths that do not
    fit the layout; `NotImplementedError` for `thd`, `cu_seqlens`, `window_size` and `dropout_p`.
    `CommunicationError` when a peer is lost on the way.
    """
    _refuse_unsupported(qkv_format, window_size, cu_seqlens, dropout_p)
    if qkv_format == "bshd":
        q, k, v = (x.transpose(0, 1) if x.dim() == 4 else x for x in (q, k, v))
    _check_shapes(q, k, v, groups)
    plan = _plan(q, k, v, groups, causal, softmax_scale, kernel, deterministic)
    out = _Attention2D.apply(q, k, v, groups, plan)
    return out.transpose(0, 1) if qkv_format == "bshd" else out


@dataclass(frozen=True)
class _Exchange:
    groups: LoongGroups
    replicas: int


class _Attention2D(torch.autograd.Function):
    """Saves and unpacks; the work is in `_forward` and `_backward`. Tensors are [s, b, heads, d]."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: LoongGroups, plan: RingPlan
    ) -> Any:
        exchange = _Exchange(groups, replicas_per_kv_head(k.shape[2], groups.config.head_parallel_size))
        out, q_share, kv, out_share, lse = _forward(q, k, v, exchange, plan)
        ctx.save_for_backward(q_share, kv.flat, out_share, lse)
        ctx.kv_shapes = kv.k_shape, kv.v_shape
        ctx.exchange, ctx.plan = exchange, plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        q_share, kv_flat, out_share, lse = ctx.saved_tensors
        kv = KVBlock(kv_flat, *ctx.kv_shapes)
        dq, dk, dv = _backward(dout, q_share, kv, out_share, lse, ctx.exchange, ctx.plan)
        return dq, dk, dv, None, None


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, exchange: _Exchange, plan: RingPlan
) -> tuple[torch.Tensor, torch.Tensor, KVBlock, torch.Tensor, torch.Tensor]:
    k, v = (replicate_heads(x, exchange.replicas) for x in (k, v))
    hp = exchange.groups.config.head_parallel_size
    kv_shapes = [(x.shape[0] * hp, x.shape[1], x.shape[2] // hp, x.shape[3]) for x in (k, v)]
    signature = (*(tuple(x.shape) for x in (q, k, v)), plan.causal)
    kept = stash.take(*signature)  # None unless a checkpoint replays this call
    if kept is not None and kept.exchanged is not None:
        q_share, kv_flat, out = kept.exchanged
        return out, q_share, KVBlock(kv_flat, *kv_shapes), *kept.ring
    kv = KVBlock.empty(*kv_shapes, like=k)
    q, _, _ = split_heads([q, k, v], exchange.groups, "q, k and v", into=[None, kv.k, kv.v])
    out_share, lse = ring_forward(q, kv, plan) if kept is None else kept.ring
    (out,) = join_heads([out_share], exchange.groups, "the output")
    stash.keep(*signature, ring=(out_share, lse), exchanged=(q, kv.flat, out))
    return out, q, kv, out_share, lse


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    kv: KVBlock,
    out: torch.Tensor,
    lse: torch.Tensor,
    exchange: _Exchange,
    plan: RingPlan,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (dout,) = split_heads([dout], exchange.groups, "the output's gradient")
    dq, dkv = ring_backward(dout, q, kv, out, lse, plan)
    # Summed in float32 to the end; rounded once, here, so that the all-to-all carries the input's width.
    grads = [x.to(q.dtype) for x in (dq, dkv.k, dkv.v)]
    dq, dk, dv = join_heads(grads, exchange.groups, "dq, dk and dv")
    return dq, sum_replicas(dk, exchange.replicas), sum_replicas(dv, exchange.replicas)


def kernel_request(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head_parallel_size: int, deterministic: bool
) -> KernelRequest:
    """What `attention_2d` asks of a kernel for local q, k, v with heads in dimension 2: the heads of one tile."""
    return KernelRequest(
        device_type=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[3],
        value_head_dim=v.shape[3],
        query_heads=q.shape[2] // head_parallel_size,
        kv_heads=k.shape[2] * replicas_per_kv_head(k.shape[2], head_parallel_size) // head_parallel_size,
        deterministic=deterministic,
    )


def _plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: LoongGroups,
    causal: bool,
    softmax_scale: float | None,
    kernel: str | AttentionKernel,
    deterministic: bool,
) -> RingPlan:
    config = groups.config
    ring_size = config.ring_size
    seq_len = q.shape[0] * config.context_parallel_size
    handles = [groups.handle(name) for name in ("inner", "outer", "inner_dkv", "outer_dkv")]
    return RingPlan(
        ring_rank=groups.ring_rank,
        outer_ring_size=config.outer_ring_size,
        inner_ring_size=ring_size // config.outer_ring_size,
        runs=tuple(tuple(ring_runs(config, rank, seq_len)) for rank in range(ring_size)),
        rings={handle.name: Ring(handle) for handle in handles if handle.process_group is not None},
        kernel=choose_kernel(kernel_request(q, k, v, config.head_parallel_size, deterministic), kernel),
        causal=causal,
        softmax_scale=1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale,
        deterministic=deterministic,
    )


def _refuse_unsupported(
    qkv_format: str, window_size: tuple[int, int] | None, cu_seqlens: torch.Tensor | None, dropout_p: float
) -> None:
    if qkv_format not in ("bshd", "sbhd", "thd"):
        raise ValueError(f"qkv_format={qkv_format!r} is unknown; use 'bshd' or 'sbhd'")
    if qkv_format == "thd" or cu_seqlens is not None:
        raise NotImplementedError(
            "packed sequences (qkv_format='thd', cu_seqlens) are not supported yet; "
            "use one document per sequence with qkv_format='bshd' or 'sbhd'"
        )
    if window_size is not None and tuple(window_size) != (-1, -1):
        raise NotImplementedError(f"window_size={window_size} is not supported yet; use window_size=None")
    if dropout_p:
        raise NotImplementedError(f"dropout_p={dropout_p} is not supported yet; use dropout_p=0.0")


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: LoongGroups) -> None:
    config = groups.config
    groups.require_cp_rank()
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} (sequence first)"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"q, k and v must have four dimensions; got {shapes}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must agree in sequence, batch, KV heads and q/k head width; got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must share one dtype and device; got {q.dtype}, {k.dtype}, {v.dtype} "
            f"on {q.device}, {k.device}, {v.device}"
        )
    heads, kv_heads, hp = q.shape[2], k.shape[2], config.head_parallel_size
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"the number of query heads, {heads}, is not a multiple of the number of KV heads, {kv_heads}")
    if heads % hp:
        fitting = fitting_head_parallel_sizes(config.context_parallel_size, heads)
        raise ValueError(f"head_parallel_size={hp} does not divide the {heads} query heads; try one of {fitting}")
    if q.numel() == 0 or q.shape[0] % config.chunks_per_rank:
        raise ValueError(
            f"the local sequence length {q.shape[0]} must be a positive multiple of {config.chunks_per_rank} "
            f"(global length a multiple of {config.sequence_multiple})"
        )
