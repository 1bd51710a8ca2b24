"""docs/reproduction.md is what the code computes, and what it says about errors and orderings holds."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from benchmarks import published
from benchmarks.reproduction import Compared, compare, orderings, render

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reproduction.md"


@pytest.fixture(scope="module")
def compared() -> list[Compared]:
    return compare()


def test_the_document_is_what_the_code_computes() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render(), "run `python scripts/reproduce.py`"


def test_the_median_error_is_below_a_tenth(compared: list[Compared]) -> None:
    assert statistics.median(abs(one.error) for one in compared) < 0.10


def test_nearly_all_methods_are_ordered_as_published(compared: list[Compared]) -> None:
    right, pairs, wrong = orderings(compared)
    assert pairs == 45 and right >= 43
    assert all("MagiAttention" in line and "backward" in line for line in wrong)


def test_a_wrong_ordering_is_found(compared: list[Compared]) -> None:
    """The check can fail: the reverse of every modelled figure orders next to nothing right."""
    right, pairs, _ = orderings([one._replace(modelled=1 / one.modelled) for one in compared])
    assert right <= 2 < pairs


def test_ties_are_not_counted(compared: list[Compared]) -> None:
    case = [one for one in compared if one.row.case == "forward, 8 GPUs" and one.row.method != "ring"]
    assert len(case) == 3 and orderings(case) == (0, 0, [])


def test_every_published_row_of_the_document_is_there(compared: list[Compared]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(f"| {one.row.method} |" in text and f"{one.row.published:g}" in text for one in compared)
    assert len(published.rows()) == 5 + 4 + 10 + 32
