"""`with_loong(Trainer)` on four ranks against the stock Trainer on one: loss, gradient norm, weights, step by step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="install accelerate to test with_loong(Trainer)")

from tests.multi_rank import hf_runs
from tests.multi_rank.pool import PRELOAD, WorkerPool

PRELOAD += ["transformers.models.llama.modeling_llama", "transformers.trainer", "trl.trainer.sft_trainer", "peft"]


@pytest.fixture(scope="module")
def four() -> Iterator[WorkerPool]:
    pool = WorkerPool(hf_runs.WORLD)
    yield pool
    pool.stop()


def compare(ranks: list[dict[str, Any]], one: dict[str, Any], limit: float = 1e-5) -> float:
    """The largest relative difference of what was logged and of the weights, which must stay below the limit."""
    worst = 0.0
    assert len(ranks[0]["history"]) == len(one["history"]) > 0
    for mine, theirs in zip(ranks[0]["history"], one["history"], strict=True):
        assert mine.keys() == theirs.keys()
        worst = max([worst, *(abs(mine[k] - theirs[k]) / abs(theirs[k]) for k in mine)])
    for result in ranks:
        assert result["weights"].keys() == one["weights"].keys()
        for name, weight in result["weights"].items():
            theirs = one["weights"][name]
            worst = max(worst, ((weight - theirs).norm() / theirs.norm()).item())
    assert worst <= limit, (worst, ranks[0]["history"], one["history"])
    return worst


@pytest.mark.parametrize(("cp", "batch_size", "collate"), [(4, 2, "pad"), (2, 1, "pad"), (4, 2, "flatten")])
def test_four_ranks_train_and_evaluate_as_one(four: WorkerPool, cp: int, batch_size: int, collate: str) -> None:
    """Accumulation, clipping, unequal label counts, another batch size in evaluation, a last batch that is not full."""
    ranks = four.run(hf_runs.run, cp, batch_size, collate)
    one = hf_runs.run(None, 1, batch_size * hf_runs.WORLD // cp, collate)
    print(compare(ranks, one))
    assert [r["generated"] for r in ranks] == [one["generated"]] * hf_runs.WORLD


SFT: dict[str, tuple[int, int, dict[str, Any]]] = {
    "packed": (4, 1, {"packing": True, "eval_packing": True}),
    "padded": (2, 1, {}),
    "packed-lora-checkpointed": (4, 2, {"packing": True, "lora": True, "gradient_checkpointing": True}),
}


@pytest.mark.parametrize("name", SFT)
def test_trl_s_sft_trainer_on_four_ranks_is_that_on_one(four: WorkerPool, name: str) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    cp, batch_size, options = SFT[name]
    ranks = four.run(functools.partial(hf_runs.sft, cp=cp, batch_size=batch_size, **options))
    one = hf_runs.sft(None, 1, batch_size * hf_runs.WORLD // cp, **options)
    print(compare(ranks, one))
    compare(ranks[1:], ranks[0], 0.0)
