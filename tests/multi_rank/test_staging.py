"""Attention whose blocks cannot be read by the backend: staged through buffers of the host, for a stand-in device."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch

from megatron_loong.comm import routes
from megatron_loong.config import LoongConfig
from tests.multi_rank import cases
from tests.multi_rank.pool import WorkerPool


class LateCopies:
    """`HostMemory` on the CPU whose copies out happen when they are waited for, as late as a GPU's may."""

    def __init__(self, forgets_to_wait: bool) -> None:
        self.forgets_to_wait = forgets_to_wait
        self.copies_in = 0

    def buffer(self, block: torch.Tensor) -> torch.Tensor:
        """A buffer to receive into. The block itself is poisoned: nobody may read it before the copy in."""
        block.view(torch.uint8).fill_(255)  # NaN in every floating point type
        return torch.empty_like(block)

    def copy_out(self, block: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        """Zeros until waited for."""
        host = torch.zeros_like(block)
        return host, (lambda: host) if self.forgets_to_wait else (lambda: host.copy_(block))

    def copy_in(self, host: torch.Tensor, block: torch.Tensor) -> None:
        """At once."""
        self.copies_in += 1
        block.copy_(host)


def staged_attention(rank: int, config: LoongConfig, forgets_to_wait: bool) -> int:
    """Attention on blocks that must be staged, against dense attention; returns the number of copies in."""
    memory = LateCopies(forgets_to_wait)
    with (
        mock.patch.object(routes, "_must_be_staged", lambda backend, device: True),
        mock.patch.object(routes, "_host_memory", lambda device: memory),
    ):
        cp = config.context_parallel_size
        cases.float64_layout(rank, cp, config.head_parallel_size, config.inner_ring_size, ["head_first"], 8, ["sbhd"])
    return memory.copies_in


@pytest.mark.parametrize("config", [LoongConfig(8, 2, 2), LoongConfig(4, 1, 4), LoongConfig(8, 8)], ids=str)
def test_staged_attention_is_exact(pool: WorkerPool, config: LoongConfig) -> None:
    copies = pool.run(staged_attention, config, False)
    assert all(n > 0 for n in copies[: config.context_parallel_size])


@pytest.mark.parametrize("config", [LoongConfig(8, 8), LoongConfig(8)], ids=["all-to-all", "ring"])
def test_sending_before_the_copy_is_complete_is_seen(pool: WorkerPool, config: LoongConfig) -> None:
    with pytest.raises(AssertionError, match="max abs error"):
        pool.run(staged_attention, config, True)
