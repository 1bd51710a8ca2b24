"""The planner's bytes are those that the rings and the all-to-all counted, communicator by communicator."""

from __future__ import annotations

import pytest
import torch

from megatron_loong.config import LoongConfig
from megatron_loong.planner.traffic import AttentionShape, attention_bytes
from tests.multi_rank import cases
from tests.multi_rank.pool import WorkerPool

SHAPE = (64, 8, 2, 16)
LAYOUTS = [
    LoongConfig(8, 1, 8),
    LoongConfig(8, 1, 2),
    LoongConfig(8, 2, 2, "context_first"),
    LoongConfig(8, 4, 2, "inner-head-outer"),
    LoongConfig(8, 8, 1),
]


@pytest.mark.parametrize("config", LAYOUTS, ids=LoongConfig.describe)
def test_the_cost_model_counts_what_was_sent(pool: WorkerPool, config: LoongConfig) -> None:
    seq_len, heads, kv_heads, head_dim = SHAPE
    shape = AttentionShape(seq_len, heads, kv_heads, head_dim, dtype_bytes=2)
    expected = attention_bytes(config, shape)
    for rank, counted in enumerate(pool.run(cases.bytes_sent, config, SHAPE, torch.bfloat16)[:8]):
        assert counted == expected, f"rank {rank}"
