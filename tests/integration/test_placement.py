"""A placement is a renaming of ranks inside each context-parallel group; the GPU a process sits on does not move."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator

import pytest

pytest.importorskip("megatron.core")

from megatron_loong.config import AXES, LoongConfig
from megatron_loong.integration import compat, hooks, install, place_this_process, runtime, uninstall
from megatron_loong.integration.placement import MARK, give_back_rank, launcher_rank, placement_in_effect, take_rank
from megatron_loong.layout.placement import permuted_ranks
from megatron_loong.layout.ranks import coordinates_of, group_members

PLACEMENTS = ["-".join(order) for order in itertools.permutations(AXES)]
CONTEXT_FIRST = {
    "context_parallel_impl": "loong",
    "loong_head_parallel_size": 2,
    "loong_placement": "context_first",
}


@pytest.fixture(autouse=True)
def _uninstalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", MARK):
        monkeypatch.delenv(name, raising=False)
    uninstall()
    yield
    uninstall()
    monkeypatch.delenv(MARK, raising=False)


def ranks_of_every_process(groups: list[list[int]], config: LoongConfig) -> list[int]:
    taken = permuted_ranks(groups, config)
    return [taken[launched_as] for launched_as in sorted(taken)]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_ranks_are_renamed_inside_their_group_and_tensor_parallel_pairs_stay_together(
    placement: str, tp: int, pp: int
) -> None:
    config = LoongConfig(8, 2, 2, placement)
    world_size = 2 * tp * pp * 8
    groups = compat.context_parallel_groups(
        compat.find_megatron(), world_size=world_size, tp=tp, cp=8, pp=pp, order="tp-cp-ep-dp-pp"
    )
    ranks = ranks_of_every_process(groups, config)
    assert sorted(ranks) == list(range(world_size))
    assert ranks[0] == 0  # where MASTER_ADDR points
    for group in groups:
        assert {ranks[launched_as] for launched_as in group} == set(group)
    for launched_as in range(0, world_size, tp):
        assert [ranks[launched_as + i] - ranks[launched_as] for i in range(tp)] == list(range(tp))


def test_head_first_is_the_identity() -> None:
    groups = [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert ranks_of_every_process(groups, LoongConfig(4, 2)) == list(range(8))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_head_first_groups_of_the_new_ranks_stand_where_the_placement_puts_them(placement: str) -> None:
    """The promise of it all: Megatron's order of ranks on the new names is the placement on the old ones."""
    placed, in_megatron = LoongConfig(8, 2, 2, placement), LoongConfig(8, 2, 2)
    ranks = ranks_of_every_process([list(range(8))], placed)
    for launched_as in range(8):
        assert coordinates_of(in_megatron, ranks[launched_as]) == coordinates_of(placed, launched_as)
    for axis in AXES:
        renamed = sorted([ranks[i] for i in members] for members in group_members(placed, axis))
        assert renamed == group_members(in_megatron, axis)


def test_taking_a_rank_twice_or_in_a_child_changes_nothing_more() -> None:
    environment, config = {"RANK": "1"}, LoongConfig(4, 2, placement="context_first")
    for _ in range(2):
        take_rank(environment, permuted_ranks([range(4)], config)[launcher_rank(environment)], config)
        assert environment["RANK"] == "2"
    assert placement_in_effect(environment) == config.describe()
    environment["RANK"] = "3"  # a process that inherited the mark and was given a rank of its own
    assert launcher_rank(environment) == 3 and placement_in_effect(environment) is None


def test_giving_back_restores_the_launchers_rank() -> None:
    environment = {"RANK": "1"}
    take_rank(environment, 2, LoongConfig(4, 2, placement="context_first"))
    give_back_rank(environment)
    give_back_rank(environment)
    assert environment == {"RANK": "1"}


def test_programs_without_a_parser_place_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    install(CONTEXT_FIRST)
    place_this_process(world_size=4, context_parallel_size=4)
    place_this_process(world_size=4, context_parallel_size=4)
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == ("2", "1")
    uninstall()
    assert os.environ["RANK"] == "1" and MARK not in os.environ


def test_an_unplaced_process_is_told_and_head_first_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    install(CONTEXT_FIRST)
    plugin = runtime.active()
    with pytest.raises(ValueError, match=r"--loong-placement context_first is not in effect: for 'cp 4 = head 2"):
        plugin.layout(plugin.options(), [0, 1, 2, 3], 4)
    install({**CONTEXT_FIRST, "loong_placement": "head_first"})
    assert plugin.layout(plugin.options(), [0, 1, 2, 3], 4) is not None


def test_the_rank_is_taken_while_megatron_parses_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    megatron = compat.find_megatron()
    if megatron.arguments is None:
        pytest.skip(f"no megatron.training: {megatron.why_no_arguments}")
    arguments = megatron.arguments
    install()
    flags = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 8 --seq-length 64 --micro-batch-size 1 "
        "--attention-dropout 0 --context-parallel-size 4 --context-parallel-impl loong "
        "--loong-head-parallel-size 2 --loong-placement context_first"
    )
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *flags.split()])
    monkeypatch.setenv("WORLD_SIZE", "4")
    taken = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.delenv(MARK, raising=False)
        taken += [(arguments.parse_args().rank, arguments.parse_args().rank)]
    assert taken == [(0, 0), (2, 2), (1, 1), (3, 3)]
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *flags.split(), "--async-save"])
    with pytest.raises(NotImplementedError, match="--async-save takes the rank for a GPU number"):
        arguments.parse_args()


def test_what_orders_ranks_in_a_way_not_planned_for_is_refused() -> None:
    args = types.SimpleNamespace(gtp_weight_remat_size=2)
    with pytest.raises(NotImplementedError, match="--gtp-weight-remat-size above 1"):
        hooks.refuse_with_placement(hooks.LoongOptions(loong_placement="context_first"), args)
