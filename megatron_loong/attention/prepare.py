"""What a call of `attention_2d` comes to on this rank: arguments checked, layouts, kernel and parts chosen."""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_loong.attention.agreement import can_be_told, compare, is_known, kind_of
from megatron_loong.attention.blocks import accumulator_dtype
from megatron_loong.attention.call import Call
from megatron_loong.attention.checks import check_changing, check_heads, check_inputs, check_latent, check_types
from megatron_loong.attention.heads import head_shares, latent_shares
from megatron_loong.config import GRADIENT_WIRES
from megatron_loong.kernels.interface import AttentionKernel, KernelRequest
from megatron_loong.kernels.registry import choose_kernel
from megatron_loong.schedule.parts import Queries, parts_of_heads
from megatron_loong.schedule.tiles import Mask
from megatron_loong.sequence.sharding import Boundaries, gather_lengths, layouts_of
from megatron_loong.topology.groups import LoongGroups
from megatron_loong.topology.tokens import TokenLayout


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: LoongGroups,
    *,
    qkv_format: str,
    causal: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int] | None,
    cu_seqlens: Boundaries | None = None,
    dropout_p: float = 0.0,
    kernel: str | AttentionKernel,
    deterministic: bool,
    cu_seqlens_kv: Boundaries | None = None,
    seq_len: int | None,
    kv_seq_len: int | None,
    softmax_offset: torch.Tensor | None,
    softcap: float,
    dropout_seed: int | None = None,
    max_logits: torch.Tensor | None = None,
    kv_up_weight: torch.Tensor | None = None,
    gradient_wire: str = "auto",
    head_parts: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Call]:
    """q, k, v sequence first, and all else that the call needs; arguments and errors are those of `attention_2d`."""
    if dropout_p and dropout_seed is None:
        dropout_seed = int(torch.randint(2**62, ()))
    if isinstance(window_size, list):
        window_size = tuple(window_size)  # type: ignore[assignment]  # hashable: see `kind_of`
    asked: dict[str, Any] = {
        "qkv_format": qkv_format, "causal": causal, "softmax_scale": softmax_scale, "window_size": window_size,
        "dropout_p": dropout_p, "kernel": getattr(kernel, "name", kernel), "deterministic": deterministic,
        "softcap": softcap, "gradient_wire": gradient_wire, "head_parts": head_parts,
    }  # fmt: skip
    changing = {
        "cu_seqlens": cu_seqlens, "cu_seqlens_kv": cu_seqlens_kv, "seq_len": seq_len, "kv_seq_len": kv_seq_len,
        "dropout_seed": dropout_seed,
    }  # fmt: skip
    optional = {
        "softmax_offset": softmax_offset, "max_logits": max_logits,
        "kv_up_weight": kv_up_weight,
    }  # fmt: skip
    kind = kind_of((q, k, v), asked, changing, optional)
    is_new, fault = not is_known(groups, kind), None
    try:
        check_changing(changing, optional)
        if is_new:
            check_types(groups, {"q": q, "k": k, "v": v}, asked)
    except ValueError as error:
        # In the first call of all the other ranks are about to compare: they are told, and do not wait in vain.
        if not can_be_told(groups, (q, k, v)):
            raise
        fault = error
    if qkv_format == "thd":
        q, k, v = (x.unsqueeze(1) if x.dim() == 3 else x for x in (q, k, v))
    elif qkv_format == "bshd":
        q, k, v = (x.transpose(0, 1) if x.dim() == 4 else x for x in (q, k, v))
    held = compare(groups, kind, (q, k, v), asked | changing, optional, fault) if is_new or fault else None
    check_inputs(q, k, v, groups, qkv_format, cu_seqlens, softmax_offset, dropout_p, max_logits)
    mask, hp = Mask.of(causal, window_size), groups.config.head_parallel_size
    features = {
        "windowed": mask.left is not None or mask.right not in (None, 0),
        "softcap": bool(softcap),
        "dropout": bool(dropout_p),
        "varying": cu_seqlens is not None,
    }
    if kv_up_weight is None:
        check_heads(q, k, v)
        shares, value_dim = head_shares(q.shape[2], k.shape[2], hp), v.shape[3]
        request = kernel_request(q, k, v, hp, deterministic, **features)
    else:
        value_dim = check_latent(q, k, v, kv_up_weight)
        shares = latent_shares(q.shape[2], hp)
        request = kernel_request(q, q, q[..., :1].expand(*q.shape[:3], value_dim), hp, deterministic, **features)
    chosen = choose_kernel(request, kernel)
    layouts = _layouts(q, k, groups, cu_seqlens, cu_seqlens_kv, seq_len, kv_seq_len, held)
    rows = q.shape[1] * layouts[0].seq_len // layouts[0].ring_size * len(shares.query[0])
    queries = Queries(rows, max(q.shape[3], v.shape[3]) * q.dtype.itemsize, q.is_cuda, groups.nodes > 1)
    call = Call(
        groups=groups,
        layouts=layouts,
        mask=mask,
        kernel=chosen,
        shares=shares,
        value_dim=value_dim,
        softmax_scale=1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale,
        softcap=softcap,
        dropout=(dropout_p, dropout_seed) if dropout_p and dropout_seed is not None else None,
        max_logits=max_logits,
        head_parts=_head_parts(head_parts, hp, shares.most_parts, queries),
        wire_dtype=wire_dtype(q.dtype, gradient_wire),
        deterministic=deterministic,
    )
    return q, k, v, call


def _head_parts(asked: int | None, head_parallel_size: int, most: int, queries: Queries) -> int:
    """Parts in which the heads go through: what was asked for, or by size. The same on every rank."""
    if asked is None:
        return parts_of_heads(most, queries) if head_parallel_size > 1 else 1
    if head_parallel_size == 1 and asked != 1:
        raise ValueError(f"head_parts={asked}, but head_parallel_size=1: there is no all-to-all to hide; leave it out")
    if asked < 1 or most % asked:
        raise ValueError(f"head_parts={asked} does not divide the {most} KV heads of a rank that can be parted")
    return asked


def wire_dtype(dtype: torch.dtype, gradient_wire: str) -> torch.dtype:
    """What gradients of tensors in `dtype` travel in; float16 might overflow where a sum of parts does not."""
    if gradient_wire not in GRADIENT_WIRES:
        raise ValueError(f"gradient_wire={gradient_wire!r} is unknown; use {', '.join(GRADIENT_WIRES)}")
    if gradient_wire == "input" or (gradient_wire == "auto" and dtype == torch.bfloat16):
        return dtype
    return accumulator_dtype(dtype)


def _layouts(
    q: torch.Tensor,
    k: torch.Tensor,
    groups: LoongGroups,
    cu_seqlens: Boundaries | None,
    cu_seqlens_kv: Boundaries | None,
    seq_len: int | None,
    kv_seq_len: int | None,
    held: list[list[int]] | None,
) -> tuple[TokenLayout, TokenLayout]:
    """Layouts of queries and keys (the same object for self-attention), checked against what is held.

    held: tokens of q and k by logical rank, where the ranks have told each other; else this rank looks at its own.
    """
    config, mine = groups.config, groups.logical_rank
    if config.context_parallel_size == 1:
        held = [[q.shape[0], k.shape[0]]]
        kv_seq_len = k.shape[0] if kv_seq_len is None else kv_seq_len
    elif seq_len is None and held is None:
        held = gather_lengths([q.shape[0], k.shape[0]], groups, q.device)
    if seq_len is None:
        assert held is not None
        seq_len, keys = (sum(side) for side in zip(*held, strict=True))
        kv_seq_len = keys if kv_seq_len is None else kv_seq_len
    q_layout, kv_layout = layouts_of(config, seq_len, cu_seqlens, kv_seq_len, cu_seqlens_kv)
    known = {mine: [q.shape[0], k.shape[0]]} if held is None else dict(enumerate(held))
    for rank, counts in known.items():
        for name, count, layout in zip(("q", "k and v"), counts, (q_layout, kv_layout), strict=True):
            if count != (expected := layout.tokens_of(rank)):
                raise ValueError(
                    f"{name} of logical rank {rank} has {count} tokens; of {layout.seq_len} tokens in this layout it "
                    f"holds {expected} (see shard_sequence, token_positions)"
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
