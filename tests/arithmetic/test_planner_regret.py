"""The arithmetic of regret; the measurements themselves are scripts/measure_regret.py's."""

from __future__ import annotations

import pytest

from megatron_loong.bench.regret import NETWORKS, SHAPES, Heads, Network, regret, simulated_s
from megatron_loong.bench.rivals.ours import Loong
from megatron_loong.config import LoongConfig
from megatron_loong.planner.profiles import PROFILES

LAYOUTS = [LoongConfig(8, 1, 4), LoongConfig(8, 2, 4), LoongConfig(8, 8)]
NETWORK, SHAPE = Network(2, 4, "400mbit", 1), Heads(1 << 16, 8, 8)
SLOW = PROFILES["a100"].with_network(nics_per_node=1, nic_gbit_per_s=0.4)


def results(times: list[float]) -> list[dict[str, object]]:
    rows = [{"name": Loong(c).name, "forward_backward_s": t} for c, t in zip(LAYOUTS, times, strict=True)]
    return [*rows, {"name": "somebody else", "forward_backward_s": 0.001}]


def test_twelve_cases() -> None:
    assert len(NETWORKS) * len(SHAPES) >= 12


def test_a_right_choice_has_no_regret() -> None:
    times = [simulated_s(config, NETWORK, SHAPE, SLOW) for config in LAYOUTS]
    case = regret(results(times), LAYOUTS, NETWORK, SHAPE, SLOW)
    assert case.share == 0 and case.chosen == case.best


def test_a_wrong_choice_is_charged() -> None:
    times = [simulated_s(config, NETWORK, SHAPE, SLOW) for config in LAYOUTS]
    chosen = times.index(min(times))
    upside_down = [2.0 if i == chosen else 1.0 for i in range(3)]
    assert regret(results(upside_down), LAYOUTS, NETWORK, SHAPE, SLOW).share == pytest.approx(1.0)


def test_results_without_ours_are_refused() -> None:
    with pytest.raises(ValueError, match="none of our layouts is among the results: x"):
        regret([{"name": "x", "forward_backward_s": 1.0}], LAYOUTS, NETWORK, SHAPE, SLOW)
