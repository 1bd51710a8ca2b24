"""Groups lie inside the context-parallel group, whatever order Megatron numbers its ranks in."""

from __future__ import annotations

import os
from unittest import mock

import pytest

import megatron_loong
from megatron_loong import build_groups
from megatron_loong.config import LoongConfig
from tests.multi_rank import cases
from tests.multi_rank.pool import WorkerPool

#: (order, TP, DP, PP) for 8 ranks; CP is what is left. EP has no part in the attention's ranks.
ORDERS = [
    ("tp-cp-ep-dp-pp", 2, 1, 1),
    ("tp-cp-ep-dp-pp", 1, 2, 1),
    ("tp-cp-ep-dp-pp", 2, 1, 2),
    ("tp-cp-ep-pp-dp", 1, 2, 1),
    ("cp-tp-ep-dp-pp", 2, 1, 1),
    ("tp-ep-dp-pp-cp", 1, 2, 1),
    ("dp-pp-tp-cp-ep", 2, 1, 1),
]


@pytest.mark.parametrize(("order", "tp", "dp", "pp"), ORDERS, ids=str)
@pytest.mark.parametrize("placement", ["head_first", "context_first"])
def test_groups_stay_inside_the_context_parallel_group(
    pool: WorkerPool, order: str, tp: int, dp: int, pp: int, placement: str
) -> None:
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    cp = 8 // (tp * dp * pp)
    generator = parallel_state.RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
    cp_groups = [list(map(int, ranks)) for ranks in generator.get_ranks("cp")]
    config = LoongConfig(cp, min(2, cp), 1, placement)
    seen = pool.run(cases.groups_of_one_order, config, cp_groups)
    for rank, members in enumerate(seen):
        mine = next(group for group in cp_groups if rank in group)
        for name, ranks in members.items():
            assert rank in ranks and set(ranks) <= set(mine), f"{name} of rank {rank}: {ranks} leaves {mine}"


def test_released_groups_are_gone_and_can_be_made_again(pool: WorkerPool) -> None:
    """After `destroy` no communicator of ours is left in torch's table, and nothing is sent any more."""
    before, during, after = zip(*pool.run(cases.groups_made_and_released, LoongConfig(8, 2, 2)), strict=True)
    assert set(before) == set(after)
    assert all(d > b for b, d in zip(before, during, strict=True))


def test_members_alone_can_make_their_groups(pool: WorkerPool) -> None:
    """For users who bring their own process groups: only the ranks of one context-parallel group call."""
    pool.run(cases.groups_by_members_alone)


def nodes_counted(rank: int, config: LoongConfig, ranks_per_node: int) -> int:
    """`LoongGroups.nodes` where the launcher names a node for every so many ranks."""
    with mock.patch.dict(os.environ, {"GROUP_RANK": str(rank // ranks_per_node)}):
        groups = build_groups(config, range(8))
    groups.destroy()
    return groups.nodes


@pytest.mark.parametrize("config", [LoongConfig(8, 8), LoongConfig(8, 2, 2)], ids=str)
@pytest.mark.parametrize("ranks_per_node", [8, 4, 1])
def test_every_rank_knows_how_many_nodes_there_are(pool: WorkerPool, config: LoongConfig, ranks_per_node: int) -> None:
    """No communicator has all members: each rank hears of nodes that none of its own peers is on."""
    assert pool.run(nodes_counted, config, ranks_per_node) == [8 // ranks_per_node] * 8


def told_with_another_version_on_rank_3(rank: int, what: str, alone: bool) -> tuple[str, int]:
    """What `build_groups` says, and how many process groups it has made; then the same again with equal versions."""
    import torch
    import torch.distributed as dist

    module = {"megatron_loong": megatron_loong, "torch": torch}[what]
    version = "9.9.9" if rank == 3 else str(module.__version__)
    table = dist.distributed_c10d._world.pg_map
    before, told = len(table), "nothing"
    with mock.patch.object(module, "__version__", version):
        try:
            build_groups(LoongConfig(8, 2, 2), range(8), local_synchronization=alone)
        except ValueError as error:
            told = str(error)
    made = len(table) - before
    build_groups(LoongConfig(8, 2, 2), range(8), local_synchronization=alone).destroy()
    return told, made


@pytest.mark.parametrize("alone", [False, True], ids=["world", "members-alone"])
@pytest.mark.parametrize("what", ["megatron_loong", "torch"])
def test_different_versions_are_refused_before_any_group(pool: WorkerPool, what: str, alone: bool) -> None:
    told, made = zip(*pool.run(told_with_another_version_on_rank_3, what, alone), strict=True)
    assert len(set(told)) == 1 and made == (0,) * 8, (told, made)
    different, common = told[0].split("; ")[:2]
    assert f"{what} 9.9.9" in different and different.endswith(" on rank 3"), told[0]
    assert f"megatron_loong {megatron_loong.__version__}, torch " in common, told[0]
    assert "9.9.9" not in common and "on the other 7 (rank 0 among them)" in common, told[0]
