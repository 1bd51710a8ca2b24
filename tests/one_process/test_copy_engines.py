"""The all-to-all by copy engines: its copies and barriers, with memory that threads share in the place of GPUs."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_loong import LoongConfig, attention_2d, build_groups
from megatron_loong.attention import attention_2d as module
from megatron_loong.bench.simulate import simulate
from megatron_loong.comm.copy_engines import why_not
from megatron_loong.topology.groups import LoongGroups


class Shared:
    """The memory of one head group: a buffer for each member."""

    def __init__(self, members: int, size: int) -> None:
        self.buffers = [torch.full((size,), 255, dtype=torch.uint8) for _ in range(members)]
        self.meeting = threading.Barrier(members, timeout=30)


class ThreadMemory:
    """`PeerMemory` of one member."""

    def __init__(self, shared: Shared, used: Counter[str]) -> None:
        self.size = shared.buffers[0].numel()
        self._shared, self._used = shared, used

    def buffer(self, peer: int, start: int, length: int) -> torch.Tensor:
        return self._shared.buffers[peer][start : start + length]

    def barrier(self) -> None:
        self._used["barriers"] += 1
        self._shared.meeting.wait()


def run(config: LoongConfig, heads: tuple[int, int], all_to_all: str, **options: Any) -> tuple[list[Any], Counter[str]]:
    """out, dq, dk, dv of every rank, and what was asked of shared memory."""
    seq_len, used = 64, Counter[str]()
    ring = config.ring_size
    shared = [Shared(config.head_parallel_size, 1 << 16) for _ in range(ring)]

    def attend(groups: LoongGroups) -> list[torch.Tensor]:
        groups.handle("head").kept["all-to-all"] = ThreadMemory(shared[groups.ring_rank], used)
        make = torch.Generator().manual_seed(groups.logical_rank)
        counts = (heads[0], heads[1], heads[1], heads[0])
        local = seq_len // config.context_parallel_size
        q, k, v, dout = (torch.randn(1, local, n, 8, generator=make, dtype=torch.float64) for n in counts)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attention_2d(*leaves, groups, seq_len=seq_len, all_to_all=all_to_all, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    with mock.patch.object(module, "why_not", lambda device, nodes: None):
        return simulate(config, attend), used


@pytest.mark.parametrize(
    ("config", "options", "exchanges"),
    [
        (LoongConfig(4, 4), {}, 2 + 2),
        (LoongConfig(4, 4), {"sequence_parts": 2}, (1 + 2 + 2) + (2 + 1 + 1)),
        (LoongConfig(4, 4), {"sequence_parts": 4}, (2 + 2 + 3) + (3 + 2 + 2)),
        (LoongConfig(8, 4, 2), {"head_parts": 2}, 4 + 4),
    ],
    ids=["at once", "halves", "slices of halves", "heads in parts, a ring"],
)
def test_the_same_bits_as_by_the_backend(config: LoongConfig, options: dict[str, int], exchanges: int) -> None:
    """As many exchanges, forward and backward, as there are messages, all of them over the shared memory."""
    expected, unused = run(config, (8, 8), "backend", **options)
    found, used = run(config, (8, 8), "copy-engines", **options)
    for theirs, ours in zip(expected, found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(theirs, ours, strict=True))
    assert not unused and used["barriers"] == 2 * exchanges * config.context_parallel_size


def test_uneven_pieces_go_by_the_backend() -> None:
    """6 query heads over 4 ranks: no rank finds its pieces equal."""
    expected, _ = run(LoongConfig(4, 4), (6, 3), "backend")
    found, used = run(LoongConfig(4, 4), (6, 3), "copy-engines")
    assert all(torch.equal(x, y) for a, b in zip(expected, found, strict=True) for x, y in zip(a, b, strict=True))
    assert not used


def test_refused_where_it_cannot_be() -> None:
    """Before anything is sent, by name."""
    groups = build_groups(LoongConfig(), range(1))
    x = torch.zeros(1, 8, 1, 8)
    with pytest.raises(ValueError, match="backend or copy-engines"):
        attention_2d(x, x, x, groups, all_to_all="nccl")
    attention_2d(x, x, x, groups, all_to_all="copy-engines")  # without a head group there is nothing to exchange
    assert "needs GPUs" in str(why_not(torch.device("cpu"), 1))
    assert "on 2" in str(why_not(torch.device("cuda"), 2))
    assert why_not(torch.device("cuda"), 1) is None
