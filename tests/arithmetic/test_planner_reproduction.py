"""docs/reproduction.md is what the code computes, and what it says about errors and orderings holds."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import pytest

from benchmarks import published
from benchmarks.reproduction import (
    Compared,
    compare,
    error_band,
    modelled,
    orderings,
    render,
    short_run_efficiency,
)
from megatron_loong.config import LoongConfig
from megatron_loong.planner.error_band import ERROR_BAND
from megatron_loong.planner.profiles import PROFILES

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reproduction.md"


@pytest.fixture(scope="module")
def compared() -> list[Compared]:
    return compare()


def test_the_document_is_what_the_code_computes(compared: list[Compared]) -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render(compared), "run `python scripts/reproduce.py`"


def test_the_wheel_carries_the_error_band_of_the_table(compared: list[Compared]) -> None:
    assert error_band(compared) == ERROR_BAND, "run `python scripts/reproduce.py`"
    assert error_band([one._replace(modelled=1.5 * one.modelled) for one in compared]) != ERROR_BAND


@pytest.mark.parametrize(
    "study, most",
    [
        ("BurstEngine, training", 5),
        ("TRL", 7),
        ("NeMo", 6),
        ("prime-rl", 7),
        ("USP", 7),
        ("LoongTrain, 7B", 19),
        ("MoE Parallel Folding", 21),
        ("BurstEngine, attention", 11),
        ("MagiAttention, attention on H100", 7),
        ("MagiAttention, attention on B200", 6),
        ("MagiAttention, documents", 18),
    ],
)
def test_median_errors_by_study(study: str, most: float, compared: list[Compared]) -> None:
    errors = [100 * abs(one.error) for one in compared if one.row.study.startswith(study)]
    assert statistics.median(errors) < most


def test_nearly_all_methods_are_ordered_as_published(compared: list[Compared]) -> None:
    right, pairs, wrong = orderings(compared)
    assert pairs == 79 and right >= 67
    assert sum("B200" in line for line in wrong) == len(wrong) - 2


def test_a_wrong_ordering_is_found(compared: list[Compared]) -> None:
    """The check can fail: the reverse of every modelled figure orders next to nothing right."""
    right, pairs, _ = orderings([one._replace(modelled=1 / one.modelled) for one in compared])
    assert right <= 13 < pairs


def test_ties_are_not_counted(compared: list[Compared]) -> None:
    case = [one for one in compared if one.row.case == "forward, 8 GPUs" and one.row.method != "ring"]
    h100 = [one for one in case if one.row.study.endswith("on H100")]
    assert len(h100) == 3 and orderings(h100) == (0, 0, [])


def test_every_published_row_of_the_document_is_there(compared: list[Compared]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(f"| {one.row.method} |" in text and f"{one.row.published:g}" in text for one in compared)
    assert len(published.rows()) == 5 + 4 + 7 + 4 + 4 + 3 + 10 + 2 * 32 + 4


# ---- constants that are measured apart -------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", ["a100", "h100"])
def test_training_efficiency_is_that_of_published_short_runs(gpu: str) -> None:
    shares = [short_run_efficiency(run) for run in published.SHORT_RUNS if run.hardware == gpu]
    assert statistics.median(shares) == pytest.approx(PROFILES[gpu].training_efficiency, abs=0.006)


def test_the_rate_of_fp8_is_that_of_nemo_at_4k_tokens() -> None:
    row = next(row for row in published.rows() if row.study.startswith("NeMo"))
    short = dataclasses.replace(
        row, config=LoongConfig(1), seq_len=4096, tensor=1, data=4, global_batch_size=1024, published=768
    )
    assert modelled(short) == pytest.approx(768, rel=2e-3)
