"""A policy-gradient step on a pack that its trainer cuts: over ranks as on one, through log-probs of the whole pack."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("megatron.training")

from tests.integration import megatron_runs

SCRIPT = Path(__file__).with_name("rl_gpt.py")


def numbers(ranks: int, folder: Path) -> list[tuple[float, ...]]:
    """Loss and gradient norm that each rank prints."""
    logs = megatron_runs._run_ranks([str(SCRIPT)], ranks, folder, 120, "")
    found = [re.findall(r"^loss (\S+), gradient norm (\S+)$", log, re.M) for log in logs]
    return [(float(loss), float(norm)) for ((loss, norm),) in found]


def test_a_policy_gradient_step_is_that_of_one_rank(tmp_path: Path) -> None:
    """Loss and gradient norm of 4 ranks, head 2 x ring 2, to 1e-5 of those of documents alone on one rank."""
    (one,) = numbers(1, tmp_path)
    assert one[1] > 1e-3
    for rank in numbers(4, tmp_path):
        assert rank == pytest.approx(one, rel=1e-5)
