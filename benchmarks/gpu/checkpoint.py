"""Selective Checkpoint++ on this device: gradients bit for bit those of full recomputation, half the ring forwards."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils.checkpoint import checkpoint as full_checkpoint

from benchmarks.gpu.outcome import Run, main
from benchmarks.local_copies import LocalCopies
from benchmarks.simulate import groups_without_processes
from megatron_loong.attention import call
from megatron_loong.attention.attention_2d import attention_2d
from megatron_loong.comm.groups import LoongGroups
from megatron_loong.config import LoongConfig
from megatron_loong.recompute.selective import checkpoint as selective_checkpoint

CONFIG = LoongConfig(4, 2)
LAYERS, HEADS, KV_HEADS, WIDTH = 2, 8, 4, 64

Checkpoint = Callable[..., Any]


def check(run: Run) -> None:
    """Selective Checkpoint++ on this device: gradients bit for bit those of full recomputation, half the forwards."""
    local_len = 512 if run.device.type == "cuda" else 32
    x = torch.randn(1, local_len, HEADS * WIDTH, device=run.device).to(torch.bfloat16)
    shape = (LAYERS, HEADS * WIDTH, (HEADS + 2 * KV_HEADS) * WIDTH)
    weights = torch.randn(shape, device=run.device).to(torch.bfloat16) / 32
    full, full_forwards = gradients(_full, x, weights)
    selective, forwards = gradients(selective_checkpoint, x, weights)
    run.figures["layout"] = CONFIG.describe()
    run.figures |= {"ring_forwards_full": full_forwards, "ring_forwards_selective": forwards}
    for name, one, other in zip(("dx", "dweights"), full, selective, strict=True):
        assert one.isfinite().all() and torch.equal(one, other), f"{name} differs from that of full recomputation"
    assert (full_forwards, forwards) == (2 * LAYERS, LAYERS), f"ring forwards: {full_forwards}, {forwards}"


def _full(function: Callable[..., Any], *args: Any) -> Any:
    return full_checkpoint(function, *args, use_reentrant=False)


def gradients(checkpoint: Checkpoint, x: torch.Tensor, weights: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """The gradients of x and weights through checkpointed layers on one rank, its peers replaced, and the number of
    ring forwards."""
    calls: list[int] = []
    forward = call.ring_forward
    groups = groups_without_processes(CONFIG, 1, LocalCopies)

    def counted(*args: Any) -> Any:
        calls.append(1)
        return forward(*args)

    leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    with mock.patch.object(call, "ring_forward", counted):
        y = leaves[0]
        for weight in leaves[1]:
            y = checkpoint(_layer, y, weight, groups)
        return list(torch.autograd.grad(y.float().square().mean(), leaves)), len(calls)


def _layer(x: torch.Tensor, weight: torch.Tensor, groups: LoongGroups) -> torch.Tensor:
    q, k, v = (x @ weight).unflatten(-1, (-1, WIDTH)).split([HEADS, KV_HEADS, KV_HEADS], dim=2)
    seq_len = x.shape[1] * CONFIG.context_parallel_size
    return x + attention_2d(q, k, v, groups, seq_len=seq_len, deterministic=True).flatten(2)


if __name__ == "__main__":
    sys.exit(main(check))
