"""Tiled loss over a vocabulary that is split over ranks: one rank's numbers, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_loong import LoongConfig, build_groups
from megatron_loong.recompute.tiled_loss import tiled_cross_entropy
from tests.multi_rank.pool import WorkerPool

TOKENS, WIDTH, VOCAB = 24, 8, 48


def compare(rank: int, tp: int, tile: int, smoothing: float, z_loss: float) -> list[float]:
    """Largest differences of loss, d_hidden (summed over the group, as Megatron's regions do) and d_weight."""
    groups = build_groups(LoongConfig(tp, tp), range(tp))  # its all-to-all group is any group of these ranks
    try:
        if rank >= tp:
            return []
        group = groups.handle("head").process_group
        torch.manual_seed(0)
        hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64).requires_grad_()
        weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64).requires_grad_()
        labels, scale = torch.randint(0, VOCAB, (TOKENS,)), torch.rand(TOKENS, dtype=torch.float64)
        numbers = {"tile": tile, "label_smoothing": smoothing, "z_loss": z_loss}
        expected = tiled_cross_entropy(hidden, weight, labels, **numbers)  # type: ignore[arg-type]
        wanted = torch.autograd.grad((expected * scale).sum(), (hidden, weight))
        mine = slice(rank * VOCAB // tp, (rank + 1) * VOCAB // tp)
        part = weight.detach()[mine].clone().requires_grad_()
        losses = tiled_cross_entropy(hidden, part, labels, tp_group=group, **numbers)  # type: ignore[arg-type]
        d_hidden, d_part = torch.autograd.grad((losses * scale).sum(), (hidden, part))
        dist.all_reduce(d_hidden, group=group)
        pairs = ((losses, expected), (d_hidden, wanted[0]), (d_part, wanted[1][mine]))
        return [(found - right).abs().max().item() for found, right in pairs]
    finally:
        groups.destroy()


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(("tile", "smoothing", "z_loss"), [(5, 0.0, 0.0), (24, 0.1, 1e-2)])
def test_vocabulary_split_over_ranks(pool: WorkerPool, tp: int, tile: int, smoothing: float, z_loss: float) -> None:
    for rank, errors in enumerate(pool.run(compare, tp, tile, smoothing, z_loss)[:tp]):
        named = dict(zip(("loss", "d_hidden", "d_weight"), errors, strict=True))
        assert all(error <= 1e-12 for error in errors), f"rank {rank}: {named}"
