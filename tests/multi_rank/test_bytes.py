"""Bytes counted in the communication layer equal the formulas of LoongTrain's 2D-Attention."""

from __future__ import annotations

import pytest
import torch

from megatron_loong.config import LoongConfig, divisors
from tests.multi_rank import cases
from tests.multi_rank.pool import WorkerPool

LAYOUTS = [(cp, hp, w) for cp in (4, 8) for hp in divisors(cp) for w in divisors(cp // hp)]


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cp", "hp", "w"), LAYOUTS, ids=str)
def test_bytes_sent_equal_the_formula(
    pool: WorkerPool, cp: int, hp: int, w: int, dtype: torch.dtype, kv_heads: int
) -> None:
    """Per rank and layer, P = hp, C = ring, N = P*C, g' = max(g, P), in elements:

    all-to-all, each direction    (P-1)/P * S/N * d * (2h + 2g')
    inner ring hops               (w-1) * C/w     of a KV block of 2 * S/C * g'/P * d
    outer ring hops               C/w - 1
    backward                      the same number of hops there and home again, for KV and dKV or for queries (q, dout,
                                  lse, delta) and dQ, whichever is fewer bytes; bfloat16 gradients travel as such
    """
    seq_len, heads, head_dim = 64, 8, 16
    ring, g = cp // hp, max(kv_heads, hp)
    width, wire = dtype.itemsize, dtype.itemsize
    exchange = (hp - 1) * (seq_len // cp) * head_dim * (2 * heads + 2 * g) // hp * width
    block = 2 * (seq_len // ring) * (g // hp) * head_dim
    inner, outer = (w - 1) * (ring // w), ring // w - 1
    forward = {"head": exchange, "inner": inner * block * width, "outer": outer * block * width}
    rows = seq_len // ring * heads // hp
    kv, queries = (block * width, block * wire), (rows * (2 * head_dim * width + 2 * 4), rows * head_dim * wire)
    there, home = min(kv, queries, key=sum)
    backward = {
        "head": exchange,
        "inner": inner * there,
        "outer": outer * there,
        "inner_dkv": inner * home,
        "outer_dkv": outer * home,
    }
    expected = tuple({name: n for name, n in x.items() if n} for x in (forward, backward))
    results = pool.run(cases.bytes_sent, LoongConfig(cp, hp, w), (seq_len, heads, kv_heads, head_dim), dtype)
    for rank, counted in enumerate(results[:cp]):
        assert counted == expected, f"rank {rank}"
