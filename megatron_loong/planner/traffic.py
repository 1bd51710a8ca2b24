"""Bytes that one rank sends for the attention of one layer: what `comm.ledger` counts, before anything is sent."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from megatron_loong.config import LoongConfig
from megatron_loong.planner.programs import Tokens, backward_program, forward_program
from megatron_loong.schedule.rotation import Moving, RowBytes, backward_moving, backward_rows


@dataclass(frozen=True)
class AttentionShape:
    """The attention of one layer as one TP rank sees it. Lengths are global, heads those of the TP rank."""

    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int | None = None
    """None: as `head_dim`."""
    batch: int = 1
    causal: bool = True
    dtype_bytes: int = 2

    @property
    def value_dim(self) -> int:
        """Width of a value head."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def sum_bytes(self) -> int:
        """Width of what gradients are summed in: float32, or float64 for float64 inputs."""
        return max(4, self.dtype_bytes)


def shared_kv_heads(config: LoongConfig, kv_heads: int) -> int:
    """KV heads after the copies that make the head group divide them.

    >>> shared_kv_heads(LoongConfig(8, 4), 2), shared_kv_heads(LoongConfig(8, 4), 8)
    (4, 8)
    """
    return kv_heads * config.head_parallel_size // math.gcd(kv_heads, config.head_parallel_size)


def shared_heads(config: LoongConfig, shape: AttentionShape) -> tuple[int, int]:
    """Query and KV heads that one rank has after the all-to-all."""
    hp = config.head_parallel_size
    return shape.heads // hp, shared_kv_heads(config, shape.kv_heads) // hp


def moving_bytes(
    config: LoongConfig, shape: AttentionShape, backward: bool, gradient_width: int, either_side_moves: bool
) -> tuple[Moving, RowBytes]:
    """What moves, and bytes of one token of it that goes round the ring, and of its results that return, of one rank.

    Forward, keys and values move; backward also the queries may, where the implementation can do either.
    """
    heads, kv_heads = (shape.batch * n for n in shared_heads(config, shape))
    widths = shape.head_dim, shape.value_dim
    rows = backward_rows((heads, *widths), (kv_heads, *widths), shape.dtype_bytes, gradient_width, shape.sum_bytes)
    moving = backward_moving(rows, 1, 1) if backward and either_side_moves else "kv"
    return moving, rows[moving]


def exchange_bytes(config: LoongConfig, shape: AttentionShape) -> tuple[int, int]:
    """Bytes that a rank sends to others in the all-to-all of q, k, v (dq, dk, dv), and in that of out (dout)."""
    hp = config.head_parallel_size
    tokens = shape.batch * shape.seq_len // config.context_parallel_size
    kv_heads = shared_kv_heads(config, shape.kv_heads)
    inward = shape.heads * shape.head_dim + kv_heads * (shape.head_dim + shape.value_dim)
    sent = tokens * shape.dtype_bytes * (hp - 1)
    return sent * inward // hp, sent * shape.heads * shape.value_dim // hp


def attention_bytes(config: LoongConfig, shape: AttentionShape) -> tuple[dict[str, int], dict[str, int]]:
    """(forward, backward) bytes of one rank by communicator, from the hops of the schedule; zeros are left out.

    >>> forward, backward = attention_bytes(LoongConfig(4, 2), AttentionShape(64, 8, 2, 16))
    >>> forward
    {'head': 5120, 'inner': 2048}
    >>> backward
    {'head': 5120, 'inner': 2048, 'inner_dkv': 2048}
    """
    tokens = Tokens(config, shape.seq_len, shape.causal).block_tokens(0)
    results = []
    inner = config.ring_size // config.outer_ring_size
    for program in (forward_program, backward_program):
        _, (there, home) = moving_bytes(config, shape, program is backward_program, shape.dtype_bytes, True)
        sent = Counter({"head": sum(exchange_bytes(config, shape))})
        for op in program(config.outer_ring_size, inner):
            if op.kind == "post":
                sent[op.ring] += tokens * (home if op.ring.endswith("dkv") else there)
        results.append({name: count for name, count in sent.items() if count})
    return results[0], results[1]
