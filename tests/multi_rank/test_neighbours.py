"""Communicators inside a node go by shared memory, those between nodes by gloo."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_loong import build_groups
from megatron_loong.config import LoongConfig
from megatron_loong.topology import shared_memory
from megatron_loong.topology.groups import COMMUNICATORS
from megatron_loong.topology.layout import group_members
from tests.multi_rank import cases
from tests.multi_rank.pool import WorkerPool

pytestmark = pytest.mark.skipif(shared_memory.why_not() is not None, reason=str(shared_memory.why_not()))


def attention_on_nodes(rank: int, config: LoongConfig, environment: dict[str, str]) -> dict[str, Any]:
    """Attention against dense attention; who is whose neighbour, and the calls of gloo while attending."""
    with mock.patch.dict(os.environ, environment):
        groups = build_groups(config, range(8))
        neighbours = {
            name: sorted(handle.neighbours.boxes) if handle.neighbours else []
            for name, handle in groups.handles.items()
        }
        groups.destroy()
        with (
            mock.patch.object(dist, "isend", wraps=dist.isend) as sends,
            mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchanges,
        ):
            cases.float64_layout(
                rank, 8, config.head_parallel_size, config.inner_ring_size or 1, ["head_first"], 8, ["sbhd"]
            )
    return {"neighbours": neighbours, "sends": sends.call_count, "exchanges": exchanges.call_count}


def on_nodes_of(rank: int, ranks_per_node: int, config: LoongConfig) -> dict[str, Any]:
    return attention_on_nodes(rank, config, {"GROUP_RANK": str(rank // ranks_per_node)})


def with_some_unwilling(rank: int, unwilling: list[int], config: LoongConfig) -> dict[str, Any]:
    return attention_on_nodes(rank, config, {"LOONG_SHM_DISABLE": str(int(rank in unwilling))})


CONFIGS = [LoongConfig(8, 8), LoongConfig(8, 2, 2), LoongConfig(8, 1, 4), LoongConfig(8, 4, 2)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_ranks_of_one_node_ask_nothing_of_gloo(pool: WorkerPool, config: LoongConfig) -> None:
    for found in pool.run(on_nodes_of, 8, config):
        assert (found["sends"], found["exchanges"]) == (0, 0), found


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("ranks_per_node", [2, 4])
def test_communicators_inside_a_node_share_memory_and_others_do_not(
    pool: WorkerPool, config: LoongConfig, ranks_per_node: int
) -> None:
    for rank, found in enumerate(pool.run(on_nodes_of, ranks_per_node, config)):
        for name, axis in COMMUNICATORS.items():
            members = next(x for x in group_members(config, axis) if rank in x)
            inside = len({x // ranks_per_node for x in members}) == 1
            expected = sorted(set(members) - {rank}) if inside else []
            assert found["neighbours"][name] == expected, (rank, name)
        assert found["sends"] + found["exchanges"] > 0


@pytest.mark.parametrize("unwilling", [[3], list(range(8))], ids=str)
def test_one_member_that_does_not_share_is_enough_for_gloo(pool: WorkerPool, unwilling: list[int]) -> None:
    for found in pool.run(with_some_unwilling, unwilling, LoongConfig(8, 8)):
        assert found["neighbours"]["head"] == [] and found["exchanges"] > 0, found
