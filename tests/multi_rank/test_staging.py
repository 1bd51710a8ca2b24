"""Attention whose blocks cannot be read by the backend: staged through buffers of the host, for a stand-in device."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_loong import build_groups, shard_sequence
from megatron_loong.comm.transport import Direct, Message, Pending, Staged
from megatron_loong.config import LoongConfig
from tests.dense import dense_with_gradients
from tests.multi_rank import cases
from tests.multi_rank.pool import WorkerPool


class StagedOnCpu(Staged):
    """Staging of tensors that gloo could read where they are. Blocks to receive into are poisoned until the wait."""

    def __init__(self, wire: Direct) -> None:
        super().__init__(wire)
        self.buffers = 0

    def host_buffer(self, block: torch.Tensor) -> torch.Tensor:
        """Not pinned, which takes a GPU."""
        self.buffers += 1
        return torch.empty_like(block)

    def post(self, messages: Sequence[Message]) -> Pending[None]:
        (message,) = messages
        if not message.send:
            message.block.view(torch.uint8).fill_(255)  # NaN in every floating point type
        return super().post(messages)

    def all_to_all(self, received: torch.Tensor, *rest: Any) -> Pending[None]:
        return super().all_to_all(received.fill_(255), *rest)


def staged_attention(rank: int, config: LoongConfig, forgets_to_copy_back: bool) -> int:
    """Attention on blocks that must be staged, against dense attention; returns the number of buffers used."""
    groups = build_groups(config, range(config.context_parallel_size))
    staged = []
    for handle in groups.handles.values():
        if handle.process_group is not None:
            staged.append(StagedOnCpu(Direct(handle, "gloo")))
            handle.transports[torch.device("cpu")] = staged[-1]
    forgetting = mock.patch.object(Staged, "_copied_back", lambda self, pending, host, block: pending)
    with forgetting if forgets_to_copy_back else contextlib.nullcontext():
        if groups.cp_rank is not None:
            inputs = cases.random_inputs(2, 32, 8, 2, 8, torch.float64)
            expected = {n: shard_sequence(x, groups) for n, x in dense_with_gradients(*inputs, True).items()}
            cases.assert_close(cases.run_attention(inputs, groups), expected, 1e-12, f"on rank {rank}")
    groups.destroy()
    return sum(x.buffers for x in staged)


@pytest.mark.parametrize("config", [LoongConfig(8, 2, 2), LoongConfig(4, 1, 4), LoongConfig(8, 8)], ids=str)
def test_staged_attention_is_exact(pool: WorkerPool, config: LoongConfig) -> None:
    buffers = pool.run(staged_attention, config, False)
    assert all(n > 0 for n in buffers[: config.context_parallel_size])


@pytest.mark.parametrize("config", [LoongConfig(8, 8), LoongConfig(8)], ids=["all-to-all", "ring"])
def test_a_block_that_is_not_copied_back_is_seen(pool: WorkerPool, config: LoongConfig) -> None:
    with pytest.raises(AssertionError, match="max abs error nan"):
        pool.run(staged_attention, config, True)
