"""`torch.compile` with `fullgraph=True` around 2D-Attention on several ranks over gloo."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

from megatron_loong import LoongConfig, build_groups, shard_sequence
from megatron_loong.attention.attention_2d import attention_2d
from megatron_loong.comm.ledger import count_bytes
from tests.dense import dense_with_gradients
from tests.multi_rank.cases import assert_close, random_inputs


def compiled_in_parts(rank: int, cp: int, hp: int, heads: tuple[int, int]) -> int:
    """Ranks that find themselves on two nodes, and as much of q as is exchanged in two parts between nodes."""
    with mock.patch.dict(os.environ, {"GROUP_RANK": str(rank % 2)}):
        return compiled_layer(rank, cp, hp, heads, tokens=128, width=64)


def compiled_layer(rank: int, cp: int, hp: int, heads: tuple[int, int], tokens: int = 8, width: int = 8) -> int:
    """All comparisons; returns the messages of the head group in a forward pass."""
    groups = build_groups(LoongConfig(cp, hp), range(cp))
    if rank >= cp:
        return 0
    torch._dynamo.reset()  # workers stay alive, and torch counts the graphs of a function over all tests
    full = random_inputs(1, tokens * cp, *heads, width, torch.float64)
    expected = {name: shard_sequence(x, groups) for name, x in dense_with_gradients(*full, True).items()}
    q, k, v, dout = (shard_sequence(x, groups).detach() for x in full)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def layer(q, k, v):
        return 2 * attention_2d(q, k, v, groups, seq_len=tokens * cp)

    with count_bytes() as ledger:
        out = torch.compile(layer, fullgraph=True, backend="aot_eager")(*leaves) / 2
    results = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    assert_close(dict(zip(("out", "dq", "dk", "dv"), results, strict=True)), expected, 1e-12, f"on rank {rank}")
    eager = attention_2d(*leaves, groups, seq_len=tokens * cp)
    assert torch.equal(out, eager)
    # Without seq_len the ranks ask each other, outside the graph.
    asking = torch.compile(lambda *x: attention_2d(*x, groups), backend="eager")
    assert torch.equal(asking(*leaves), eager)
    packed_layers(groups, full)
    groups.destroy()
    return ledger.messages["head"]


def packed_layers(groups, full) -> None:
    """One graph for packs of several documents, in both ways of laying them out."""
    length = full[0].shape[1]
    begins = torch.zeros(1, length, dtype=torch.bool)
    begins[0, [0, 3, length // 2 + 1]] = True
    boundaries = torch.tensor([0, 3, length // 2 + 1, length], dtype=torch.int32)
    for cu_seqlens, window in ((boundaries, None), (begins, None), (begins, (2, 0))):

        def layer(q, k, v, cu_seqlens=cu_seqlens, window=window):
            return 2 * attention_2d(q, k, v, groups, seq_len=length, cu_seqlens=cu_seqlens, window_size=window)

        q, k, v, dout = (shard_sequence(x, groups, cu_seqlens=cu_seqlens).detach() for x in full)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        want = layer(*leaves)
        right = torch.autograd.grad(want, leaves, dout)
        out = torch.compile(layer, fullgraph=True, backend="aot_eager")(*leaves)
        got = torch.autograd.grad(out, leaves, dout)
        assert all(torch.equal(x, y) for x, y in zip((out, *got), (want, *right), strict=True))


@pytest.mark.multi_rank
@pytest.mark.parametrize(
    ("cp", "hp", "heads"), [(2, 1, (4, 2)), (2, 2, (4, 1)), (4, 2, (6, 3))], ids=["ring", "heads", "both-uneven"]
)
def test_compiled_attention_matches_dense_attention(cp, hp, heads, pool) -> None:
    pool.run(compiled_layer, cp, hp, heads)


@pytest.mark.multi_rank
def test_heads_that_go_in_parts_compile_too(pool) -> None:
    assert pool.run(compiled_in_parts, 4, 2, (8, 4))[:4] == [4] * 4, "two parts, each there and back"
