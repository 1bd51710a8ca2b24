"""Arithmetic of the comparison: rounds, the busiest NIC, the table, and an emulated cluster's layout."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.cluster import WINDOW_SEGMENTS, Cluster, build_commands, transport_commands
from benchmarks.compare import Counts, Entry
from benchmarks.report import busiest_nic_bytes, make_record, markdown
from benchmarks.rivals.interface import Shape, zigzag_positions
from benchmarks.rivals.registry import all_contestants, choose
from benchmarks.timing import Phases, interleaved, ratio_to, summarise

SHAPE = Shape(64, 8, 2, 16, torch.bfloat16)
CLUSTER = {"nodes": 2, "ranks_per_node": 2, "nics_per_node": 1, "inter_bytes_per_s": 1e3}


def entry(name: str, package: str, times_s: list[float], sent: int) -> Entry:
    """Four ranks on a ring, the last of them slowest, each sending `sent` bytes to the next."""
    counts = []
    for rank in range(4):
        to_peers = [sent if peer == (rank + 1) % 4 else 0 for peer in range(4)]
        counts.append(Counts(100, 4, 0.1, 2**20, [0] * 4, to_peers))
    others = [[Phases(t / 8, t / 8, 0.2, 0.1, 0.0)] * 3 for t in times_s]
    rounds = [[*three, Phases(t / 2, t / 2, 0.1, 0.1, 0.1 * t)] for three, t in zip(others, times_s, strict=True)]
    return Entry(name, package, None, 1.0, counts, rounds)


def test_a_round_lasts_as_long_as_its_slowest_rank() -> None:
    timing = summarise(entry("a", "x", [1.0, 9.0, 2.0], 0).rounds)
    assert (timing.forward_s, timing.forward_backward_s, timing.rounds) == (1.0, 2.0, 3)


def test_idle_time_is_that_of_the_slowest_rank_in_all_rounds() -> None:
    """0.1, 0.9 and 0.2 of 1, 9 and 2 s."""
    assert summarise(entry("a", "x", [1.0, 9.0, 2.0], 0).rounds).idle_share == pytest.approx((0.1 + 8.1 + 0.4) / 12)


def test_no_rounds_are_no_result() -> None:
    with pytest.raises(ValueError, match="no rounds"):
        summarise([])


def test_a_ratio_is_taken_within_rounds() -> None:
    """A machine that is three times slower in one round changes both times of that round, and not the ratio."""
    slow = [1.0, 3.0, 1.0]
    ours, rival = entry("a", "x", slow, 0), entry("b", "y", [2 * t for t in slow], 0)
    assert ratio_to(ours.rounds, rival.rounds) == 0.5
    # A bound of 4 s counts where the rival (2, 6, 2) is faster than that.
    assert ratio_to(ours.rounds, rival.rounds, at_least_s=4.0) == 0.25


def test_every_round_runs_everyone_and_begins_with_another() -> None:
    order: list[str] = []

    def run(name: str) -> tuple[float, float]:
        order.append(name)
        return 0.0, 0.0

    taken = interleaved({name: lambda name=name: run(name) for name in "abc"}, 2, 1, lambda: None)
    assert order == list("abcbcacab")
    assert {name: len(rounds) for name, rounds in taken.items()} == {"a": 2, "b": 2, "c": 2}


def test_rounds_end_when_there_is_no_time_for_more() -> None:
    asked: list[int] = []
    taken = interleaved(
        {"a": lambda: (0.0, 0.0)}, 9, 1, lambda: None, lambda counted: asked.append(counted) or counted < 3
    )
    assert asked == [0, 1, 2, 3] and len(taken["a"]) == 3


def test_the_busiest_nic_of_a_single_and_of_a_double_ring() -> None:
    """2 nodes x 2 ranks: one ring crosses each boundary at one rank; two rings cross it at both, on their own NICs."""
    single = [[0, 8, 0, 0], [0, 0, 8, 0], [0, 0, 0, 8], [8, 0, 0, 0]]
    double = [[0, 0, 4, 0], [0, 0, 0, 4], [4, 0, 0, 0], [0, 4, 0, 0]]
    assert [busiest_nic_bytes(single, 2, nics) for nics in (1, 2)] == [8, 8]
    assert [busiest_nic_bytes(double, 2, nics) for nics in (1, 2)] == [8, 4]
    assert busiest_nic_bytes(single, 4, 1) == 0


def test_the_record_names_the_winner_whoever_it_is() -> None:
    entries = [
        entry("loong hp1", "megatron-loong", [1.2] * 3, 100),
        entry("rival", "yunchang", [1.0] * 3, 50),
        entry("compute alone", "torch", [0.5] * 3, 0),
        dataclasses.replace(entry("broken", "yunchang", [], 0), refused="wrong result"),
    ]
    record = make_record(entries, [("absent", "needs a GPU")], SHAPE, CLUSTER, {})
    assert [row["name"] for row in record["results"]] == ["compute alone", "rival", "loong hp1"]
    verdict = record["verdict"]
    assert verdict["ours_over_rival"] == pytest.approx(1.2)
    assert verdict["sent_bytes_over_least_rival"] == 2
    # 100 bytes at 1000 bytes/s take 0.1 s: the machine, not the network, is the bound.
    assert verdict["ours_over_bound"] == pytest.approx(1.2 / 0.5)
    table = markdown(record)
    assert "loong hp1 takes 1.20x the time of rival" in table
    assert "- broken: wrong result" in table and "- absent: needs a GPU" in table


def test_positions_of_all_ranks_cover_the_sequence_once() -> None:
    for contestant in all_contestants(8):
        held = torch.cat([contestant.positions(rank, 64) for rank in range(8)])
        assert held.sort().values.tolist() == list(range(64)), contestant.name
    assert zigzag_positions(1, 2, 8).tolist() == [2, 3, 4, 5]


def test_who_cannot_run_a_shape_is_listed_with_the_reason() -> None:
    chosen, left_out = choose(8, SHAPE, ["yunchang*"])
    assert not [one for one in chosen if "u8" in one.name]
    assert "2 KV heads" in dict(left_out)["yunchang Ulysses u8"]
    assert dict(left_out)["MagiAttention"] == "its engine needs a GPU"


def test_a_pattern_that_matches_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="matches nobody.*DeepSpeed"):
        choose(8, SHAPE, ["DeepSpede*"])


def test_a_cluster_gives_every_rank_its_nic_in_both_directions() -> None:
    cluster = Cluster(2, 4, 2, "400mbit", run_id=7)
    commands = build_commands(cluster)
    home, switch = cluster.node(1), cluster.switch
    for local_rank, nic in enumerate((0, 1, 0, 1)):
        address = cluster.address(4 + local_rank)
        assert f"ip -n {home} rule add from {address} lookup {100 + nic} pref 100" in commands
        assert f"ip -n {switch} route add {address} via 10.78.0.1 dev p1.{nic} onlink" in commands
    # Two NICs on each of two nodes, shaped at both ends.
    assert sum("tbf rate 400mbit" in command for command in commands) == 8


def test_only_connections_between_nodes_have_a_small_window() -> None:
    """So that acknowledgements and rendezvous do not stand behind data on a slow NIC, and nodes stay fast inside."""
    cluster = Cluster(nodes=2, ranks_per_node=2, nics_per_node=1, nic_rate="100mbit", run_id=7)
    routes = [line for line in build_commands(cluster) if line.startswith("ip -n loong7-n1r0 route add")]
    inside, between = sorted(routes)
    assert "10.77.1.0/24" in inside and "cwnd" not in inside
    assert "default" in between and between.endswith(f"cwnd lock {WINDOW_SEGMENTS} quickack 1")
    assert len(transport_commands(cluster)) == cluster.world_size
