"""The arithmetic of regret, and the recorded results in the documentation; scripts/measure_regret.py measures."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.regret import CASES, Case, Heads, Layout, Network, layouts_of, regret, table
from megatron_loong.planner.choose import best_layout
from megatron_loong.planner.hardware import hardware_to_text
from megatron_loong.planner.links import Site
from megatron_loong.planner.profiles import PROFILES
from megatron_loong.planner.simulate import simulate_pass
from megatron_loong.planner.traffic import AttentionShape

ROOT = Path(__file__).resolve().parents[2]
SLOW = PROFILES["a100"].with_network(nics_per_node=1, nic_gbit_per_s=0.4)
CASE = Case(Network(2, 4, 1, "400mbit"), Heads(1 << 16, 8, 8))
SHAPE, SITE = AttentionShape(*CASE.shape, 64), Site(SLOW, 4)
CHOSEN = Layout.of(best_layout(8, SHAPE, SITE))


def record(**changes: Any) -> dict[str, Any]:
    """Measured times as the cost model has them, in each of three rounds."""
    rounds = []
    for config in layouts_of(CASE):
        seconds = sum(simulate_pass(config, SHAPE, SITE, backward=b).seconds for b in (False, True))
        rounds.append([*Layout.of(config), [seconds, 2 * seconds, seconds / 2]])
    profile = json.loads(hardware_to_text(SLOW))
    values = {"network": CASE.network.name, "shape": list(CASE.shape), "load_average": 0.0, "profile": profile}
    return {**values, "rounds_s": rounds, **changes}


def test_the_cases_differ() -> None:
    assert len(CASES) >= 12 and len(set(CASES)) == len(CASES)
    assert {case.network.nodes for case in CASES} == {1, 2, 4}
    assert {case.network.nics_per_node for case in CASES} == {1, 2, 4}
    assert {case.shape.kv_heads < case.shape.heads for case in CASES} == {True, False}


def test_every_layout_is_in_the_sweep() -> None:
    """For 8 ranks: single and double rings of each head-parallel size, in every order of the axes that differs."""
    assert len({Layout.of(config) for config in layouts_of(CASE)}) == 16
    inside = layouts_of(CASE._replace(network=Network(1, 8, 1, "1gbit")))
    assert len(inside) == len({Layout.of(x)[:2] for x in inside}) == 7


def test_a_right_choice_has_no_regret() -> None:
    one = regret(record())
    assert one.share <= 0.002 and one.chosen == CHOSEN  # what is not worth simulating counts as equally fast
    assert one.modelled_s == pytest.approx(one.chosen_s)


def test_a_wrong_choice_is_charged() -> None:
    rounds = [[*Layout.of(c), [2.0 if Layout.of(c) == CHOSEN else 1.0] * 3] for c in layouts_of(CASE)]
    assert regret(record(rounds_s=rounds)).share == pytest.approx(1.0)
    assert "0 of 1 cases within 5%" in table([record(rounds_s=rounds)], "here")


def test_a_choice_that_was_not_measured_is_refused() -> None:
    rounds = [layout for layout in record()["rounds_s"] if Layout(*layout[:3]) != CHOSEN]
    with pytest.raises(ValueError, match="was not measured"):
        regret(record(rounds_s=rounds))
    with pytest.raises(ValueError, match="no case was measured"):
        table([], "here")


def test_a_network_is_read_as_it_is_written() -> None:
    assert all(Network.parse(case.network.name) == case.network for case in CASES)
    with pytest.raises(ValueError, match="2x4-1x400mbit"):
        Network.parse("2x4")


def test_the_page_shows_the_recorded_results() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "measure_regret.py"))
    records = json.loads(script["RECORDS"].read_text(encoding="utf-8"))
    page = script["PAGE"].read_text(encoding="utf-8")
    shown = page.split(script["BEGIN"])[1].split(script["END"])[0]
    assert shown == script["section"](records), "run `scripts/measure_regret.py --record --minutes 0`"
    assert all(math.isfinite(regret(one).share) for one in records)
