"""Attention of all ranks in one process: exact, on the schedules that the ranks run, and strict about blocks."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from benchmarks.simulate import simulate
from megatron_loong import LoongConfig, attention_2d, shard_sequence, token_positions
from megatron_loong.comm.groups import LoongGroups
from megatron_loong.comm.ledger import count_bytes
from megatron_loong.comm.ring import Ring
from megatron_loong.comm.transport import Message
from tests.dense import dense_with_gradients

SEQ_LEN = 64
LAYOUTS = [
    LoongConfig(8),
    LoongConfig(8, 1, 2),
    LoongConfig(8, 2, 2, "context_first"),
    LoongConfig(4, 4),
    LoongConfig(6, 3, 2, "inner-head-outer"),
    LoongConfig(1),
]


def random_inputs(heads: int, kv_heads: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    counts = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(1, SEQ_LEN, n, width, generator=generator, dtype=torch.float64) for n in counts]


@pytest.mark.parametrize("config", LAYOUTS, ids=LoongConfig.describe)
@pytest.mark.parametrize("window", [None, (9, 0)], ids=["causal", "window"])
def test_all_ranks_on_one_device_are_exact(config: LoongConfig, window: tuple[int, int] | None) -> None:
    inputs = random_inputs(6, 2, 8)
    allowed = None
    if window is not None:
        distance = torch.arange(SEQ_LEN).unsqueeze(1) - torch.arange(SEQ_LEN)
        allowed = (distance >= 0) & (distance <= window[0])
    expected = dense_with_gradients(*inputs, window is None, allowed=allowed)

    def one_rank(groups: LoongGroups) -> list[torch.Tensor]:
        q, k, v, dout = (shard_sequence(x, groups) for x in inputs)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention_2d(leaves[0], leaves[1], leaves[2], groups, seq_len=SEQ_LEN, window_size=window)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    for rank, found in enumerate(simulate(config, one_rank)):
        mine = token_positions(config, rank, SEQ_LEN)
        for name, x in zip(("out", "dq", "dk", "dv"), found, strict=True):
            error = (x - expected[name][:, mine]).abs().max().item()
            assert error <= 1e-12, f"{name} on rank {rank}: max abs error {error:.1e} > 1e-12"


def test_the_ledger_counts_what_the_ranks_send() -> None:
    """A ring of two, forward only: each rank sends its block of k and v once."""
    inputs = random_inputs(2, 2, 8)

    def one_rank(groups: LoongGroups) -> None:
        attention_2d(*(shard_sequence(x, groups) for x in inputs[:3]), groups, seq_len=SEQ_LEN)

    with count_bytes() as ledger:
        simulate(LoongConfig(2), one_rank)
    assert ledger.total_bytes == 2 * inputs[1].nbytes


def test_a_block_written_before_its_wait_is_an_error() -> None:
    def one_rank(groups: LoongGroups) -> None:
        block, incoming = torch.ones(4), torch.zeros(4)
        ring, peer = Ring(groups.handle("inner")), 1 - groups.ring_rank
        sent, arrived = ring.post([Message(True, peer, block, "out"), Message(False, peer, incoming, "in")])
        assert incoming.isnan().all(), "poisoned until it is waited for"
        arrived()
        assert (incoming == 1).all()
        block.zero_()
        sent()

    with pytest.raises(RuntimeError, match="written between its sending and the wait"):
        simulate(LoongConfig(2), one_rank)


def test_a_rank_that_fails_ends_the_others_and_is_the_one_that_is_told() -> None:
    def one_rank(groups: LoongGroups) -> None:
        if groups.ring_rank == 1:
            raise ValueError("planted")
        Ring(groups.handle("inner")).post([Message(False, 1, torch.zeros(1), "never sent")])[0]()

    with pytest.raises(ValueError, match="planted"):
        simulate(LoongConfig(2), one_rank, timeout=timedelta(seconds=0.5))
