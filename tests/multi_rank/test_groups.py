"""Groups lie inside the context-parallel group, whatever order Megatron numbers its ranks in."""

from __future__ import annotations

import os
from unittest import mock

import pytest

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
