"""Images dealt to ranks, tokens joined over them: losses and gradients of a small vision-language model, in float64."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_loong import LoongConfig
from tests.multi_rank import vision_cases as cases
from tests.multi_rank.pool import WorkerFailure, WorkerPool
from tests.multi_rank.vision_cases import Batch

#: Many images in one sample, none in another, at both ends, side by side, and across what a rank holds; few and none.
ROWS = [
    Batch(((5, -4, 3, -1, -9, 2), (24,), (-6, 12, -6))),
    Batch(((7, -3, 6), (10, -2, 4))),
    Batch(((16,), (11,))),
    Batch(((-8, -8, -8, -8),)),
]
PACKS = [
    Batch(((5, -4, 3), (9,), (-7, 1, -2, 30), (1,)), packed=True),
    Batch(((40, -2), (3,)), packed=True),
    Batch(((8,), (9,)), packed=True),
]
LAYOUTS = [
    LoongConfig(1),
    LoongConfig(2, 1),
    LoongConfig(3, 1),
    LoongConfig(4, 2),
    LoongConfig(4, 1, 2, "context_first"),
    LoongConfig(4, 2, sequence_layout="contiguous"),
]


@pytest.mark.multi_rank
@pytest.mark.parametrize("config", LAYOUTS, ids=lambda config: config.describe().replace(" ", "-"))
def test_gradients_equal_one_rank(pool: WorkerPool, config: LoongConfig) -> None:
    packs = [] if config.sequence_layout == "contiguous" else PACKS
    pool.run(cases.trains_as_on_one, config, [*ROWS, *packs])


@pytest.mark.multi_rank
@pytest.mark.parametrize("frozen", [("patches", "mix"), ("patches", "mix", "projector"), ("embedding", "layers")])
@pytest.mark.parametrize("blank", [False, True], ids=["no rows", "rows of a blank image"])
def test_frozen_parts_and_ranks_without_an_image(pool: WorkerPool, frozen: tuple[str, ...], blank: bool) -> None:
    options = {"frozen": frozen, "blank": blank}
    pool.run(_with_options, options)


def _with_options(rank: int, options: dict) -> float:
    return cases.trains_as_on_one(rank, LoongConfig(4, 2), ROWS[:3], **options)


@pytest.mark.multi_rank
def test_gradients_lost_on_the_way_are_found(pool: WorkerPool) -> None:
    with pytest.raises(WorkerFailure, match=r"(patches|mix|projector)\S* on rank \d .*relative error"):
        pool.run(cases.trains_as_on_one, LoongConfig(4, 2), ROWS[:1], "lost_image_gradients")


@pytest.mark.multi_rank
@pytest.mark.parametrize("batch", [ROWS[0], PACKS[0]], ids=["rows", "packs"])
def test_bytes_are_those_of_the_rows_needed(pool: WorkerPool, batch: Batch) -> None:
    results = pool.run(cases.bytes_by_formula, LoongConfig(4, 2), batch)
    for forward, right_forward, backward, right_backward in results:
        assert (forward, backward) == (right_forward, right_backward)
    gathered = 3 * sum(batch.rows) * cases.HIDDEN * 4  # all embeddings to the 3 others; here a row goes to one at most
    sent = sum(result[0] for result in results)
    assert 0 < sent <= gathered / 3 and sum(result[2] for result in results) == sent


@pytest.mark.multi_rank
def test_mistakes_are_refused_before_anything_is_sent(pool: WorkerPool) -> None:
    for said in pool.run(cases.mistakes):
        assert said == ["vision", "vision", "vision", "text", "rows", "the"]


@pytest.mark.multi_rank
def test_the_example_of_the_page_runs(pool: WorkerPool) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "multimodal.md"
    (example,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    pool.run(_execute, example)


def _execute(rank: int, source: str) -> None:
    exec(source, {})
