"""The planner's bytes are those that the rings and the all-to-all counted, communicator by communicator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_loong.config import CAUSAL, LoongConfig
from megatron_loong.planner import simulate
from megatron_loong.planner.links import Site
from megatron_loong.planner.methods import OURS
from megatron_loong.planner.parts import Parts
from megatron_loong.planner.traffic import AttentionShape, attention_bytes
from tests.arithmetic.test_planner_simulation import ideal
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


@pytest.mark.parametrize("sequence_parts", [2, 4, 8])
def test_the_planner_costs_parts_of_the_sequence_in_the_order_of_attention(
    pool: WorkerPool, sequence_parts: int
) -> None:
    """Exchanges begun, by bytes, and between them what is computed, by pairs of queries and keys."""
    (done, *_) = [events for events in pool.run(cases.order_of_halves, sequence_parts) if events]
    found: list[Any] = []
    for event in done:
        if isinstance(event, int):
            found.append(event * 8 * 3 // 4)  # float64; a quarter of what a rank gives stays with it
            continue
        kind, rows, keys, window = event
        found.append((kind, rows * keys / (2 if window == CAUSAL else 1)))
    shape = AttentionShape(64, heads=4, kv_heads=4, head_dim=8, dtype_bytes=8)
    assert _in_runs(found) == _in_runs(
        [event for backward in (False, True) for event in _costed(shape, sequence_parts, backward)]
    )


def _costed(shape: AttentionShape, sequence_parts: int, backward: bool) -> list[Any]:
    events: list[Any] = []

    class Watched(simulate._Run):
        def _begin_exchange(self, rank_bytes: int) -> list[float]:
            events.append(rank_bytes)
            return super()._begin_exchange(rank_bytes)

        def _compute_alike(self, seconds: float) -> None:
            flops_of_a_pair = 4 * shape.head_dim * (2.5 if backward else 1)
            events.append(("backward" if backward else "forward", seconds * 1e9 / flops_of_a_pair))

    run = Watched(LoongConfig(4, 4), shape, Site(ideal(), 2), backward, OURS, trace=False)
    run.parts = Parts(1, sequence_parts)
    run.run()
    return events


def _in_runs(events: list[Any]) -> list[Any]:
    """Tiles that follow one another as one."""
    runs: list[Any] = []
    for event in events:
        if isinstance(event, tuple) and runs and isinstance(runs[-1], tuple):
            runs[-1] = event[0], runs[-1][1] + event[1]
        else:
            runs.append(event)
    return [(x[0], round(x[1], 6)) if isinstance(x, tuple) else x for x in runs]
