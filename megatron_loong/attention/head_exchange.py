"""The all-to-all that trades a share of the sequence for a share of the heads (DeepSpeed-Ulysses; LoongTrain 4.2).

    shares of the sequence [S/cp, b, h, d]  <->  shares of the heads [S/ring, b, h/hp, d]

All tensors of one exchange travel in one message per peer, packed by one copy each and put in the order of the
sequence by one copy each on arrival.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_loong.comm.all_to_all import all_to_all
from megatron_loong.sequence.sharding import head_group_chunk_order
from megatron_loong.topology.groups import LoongGroups


def replicas_per_kv_head(kv_heads: int, head_parallel_size: int) -> int:
    """Copies of each KV head so that the head group divides them evenly.

    >>> [replicas_per_kv_head(g, 4) for g in (1, 2, 4, 6, 8)]
    [4, 2, 1, 2, 1]
    """
    return head_parallel_size // math.gcd(kv_heads, head_parallel_size)


def replicate_heads(x: torch.Tensor, replicas: int) -> torch.Tensor:
    """[s, b, g, d] -> [s, b, g * replicas, d], copies of a head adjacent."""
    return x if replicas == 1 else x.repeat_interleave(replicas, dim=2)


def sum_replicas(x: torch.Tensor, replicas: int) -> torch.Tensor:
    """The adjoint of `replicate_heads`, summed in float32 (float64)."""
    if replicas == 1:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.unflatten(2, (-1, replicas)).sum(3, dtype=wide).to(x.dtype)


def split_heads(
    tensors: Sequence[torch.Tensor],
    groups: LoongGroups,
    what: str,
    into: Sequence[torch.Tensor | None] | None = None,
) -> list[torch.Tensor]:
    """Shares of the sequence to shares of the heads: each [s, b, heads, d] -> [s * hp, b, heads / hp, d].

    The result is in the order of `ring_runs`. Every heads must be a multiple of hp; one dtype for all. `into` gives
    contiguous tensors to write the results to; without one, and without a head group, a tensor is returned as it is.
    """
    handle, config = groups.handle("head"), groups.config
    into = into or [None] * len(tensors)
    if handle.size == 1:
        return [x if out is None else out.copy_(x) for x, out in zip(tensors, into, strict=True)]
    chunks = config.chunks_per_rank
    shapes = [_chunk_shape(x, chunks, x.shape[2] // handle.size) for x in tensors]
    send = _buffer(tensors[0], handle.size, chunks, shapes)
    for x, part in zip(tensors, _parts(send, shapes), strict=True):
        # part [peer, chunk, chunk_len, b, heads/hp, d]
        part.copy_(x.unflatten(0, (chunks, -1)).unflatten(3, (handle.size, -1)).permute(3, 0, 1, 2, 4, 5))
    received = all_to_all(send, handle, what)
    rows = received.flatten(0, 1)
    order = _order(groups).to(rows.device)
    results = []
    for (shape, span), out in zip(_spans(shapes), into, strict=True):
        out_rows = None if out is None else out.view(rows.shape[0], -1)
        in_order = torch.index_select(rows[:, span], 0, order, out=out_rows)
        results.append(in_order.view(-1, *shape[1:]))
    return results


def join_heads(tensors: Sequence[torch.Tensor], groups: LoongGroups, what: str) -> list[torch.Tensor]:
    """The inverse of `split_heads`: each [s * hp, b, heads / hp, d] -> [s, b, heads, d]."""
    handle, config = groups.handle("head"), groups.config
    if handle.size == 1:
        return list(tensors)
    chunks = config.chunks_per_rank
    shapes = [_chunk_shape(x, chunks * handle.size, x.shape[2]) for x in tensors]
    send = _buffer(tensors[0], handle.size, chunks, shapes)
    order = _order(groups).tolist()
    for x, part in zip(tensors, _parts(send, shapes), strict=True):
        rows = part.flatten(0, 1)
        for piece, row in zip(x.unflatten(0, (len(order), -1)).unbind(0), order, strict=True):
            rows[row].copy_(piece)
    received = all_to_all(send, handle, what)
    # part [peer, chunk, chunk_len, b, heads/hp, d] -> [chunk, chunk_len, b, peer, heads/hp, d]
    joined = [part.permute(1, 2, 3, 0, 4, 5).flatten(3, 4) for part in _parts(received, shapes)]
    return [x.reshape(-1, *x.shape[2:]) for x in joined]


def _order(groups: LoongGroups) -> torch.Tensor:
    """Row `head * chunks_per_rank + chunk` of the exchange buffer, in the order of the sequence."""
    pairs = head_group_chunk_order(groups.config, groups.ring_rank)
    return torch.tensor([head * groups.config.chunks_per_rank + chunk for head, chunk in pairs])


def _chunk_shape(x: torch.Tensor, chunks: int, heads: int) -> tuple[int, ...]:
    return (x.shape[0] // chunks, x.shape[1], heads, x.shape[3])


def _spans(shapes: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], slice]]:
    spans, start = [], 0
    for shape in shapes:
        spans.append((shape, slice(start, start := start + math.prod(shape))))
    return spans


def _buffer(like: torch.Tensor, peers: int, chunks: int, shapes: Sequence[tuple[int, ...]]) -> torch.Tensor:
    return torch.empty(peers, chunks, sum(map(math.prod, shapes)), dtype=like.dtype, device=like.device)


def _parts(buffer: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Views [peer, chunk, *shape] of an exchange buffer, one per tensor."""
    return [buffer[:, :, span].unflatten(2, shape) for shape, span in _spans(shapes)]
