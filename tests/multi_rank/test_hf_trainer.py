"""`with_loong(Trainer)` on four ranks against the stock Trainer on one: loss, gradient norm, weights, step by step."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

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
    if collate == "flatten" and hf_runs.PACKS_SEE_ONE_ANOTHER:
        pytest.skip("this transformers itself lets packed documents see one another")
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


def test_a_resumed_run_is_the_unbroken_run_and_its_checkpoint_is_a_model_like_any(
    four: WorkerPool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    saved = {"folder": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    whole = four.run(functools.partial(hf_runs.run, cp=2, batch_size=1, **saved))
    again = four.run(functools.partial(hf_runs.run, cp=2, batch_size=1, resume=True, folder=str(tmp_path)))
    compare(again, whole[0], 1e-7)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert "loong" not in loaded.config._attn_implementation
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, whole[0]["weights"][name]), name


MEMORY = {"tiled_loss": 3, "tiled_mlp": 2, "selective_checkpoint": True, "offload": True}


def test_every_saving_of_memory_leaves_the_run_as_it_is(four: WorkerPool) -> None:
    ranks = four.run(functools.partial(hf_runs.run, cp=4, batch_size=2, memory=MEMORY))
    compare(ranks, hf_runs.run(None, 1, 2))


def refusal(rank: int, name: str) -> str:
    try:
        if name == "random batches":
            hf_runs.run(rank, 4, 2, "at random")
        else:
            hf_runs.run(rank, 4, 2, **REFUSED[name][0])
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "smoothing": ({"label_smoothing_factor": 0.1}, "NotImplementedError: .* label_smoothing_factor=0.1; set it to 0"),
    "split": ({"accelerator_config": {"split_batches": True}}, "NotImplementedError: .* split_batches and dispatch"),
    "neftune": ({"neftune_noise_alpha": 5.0}, "NotImplementedError: .* neftune_noise_alpha, whose noise depends"),
    "sizes": ({"memory": {"offload": True}}, "ValueError: offload=True moves what checkpoints keep; give selective"),
    "random batches": (
        {},
        "ValueError: the ranks were given different batches: rows .* are not the same on every rank",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_on_something_else_is_refused_on_every_rank(four: WorkerPool, name: str) -> None:
    answers = four.run(refusal, name)
    assert len(set(answers)) == 1, answers
    assert re.match(REFUSED[name][1], answers[0]), answers[0]


def test_trainers_that_handle_whole_sequences_are_refused() -> None:
    from transformers import Seq2SeqTrainer, Trainer

    from megatron_loong.hf import with_loong

    class OwnLoss(Trainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            return model(**inputs).logits.mean()

    with pytest.raises(NotImplementedError, match=r"with_loong does not work with OwnLoss.compute_loss"):
        with_loong(OwnLoss)

    with pytest.raises(NotImplementedError, match="with_loong does not work with Seq2SeqTrainer"):
        with_loong(Seq2SeqTrainer)
    trl = pytest.importorskip("trl")
    with pytest.raises(NotImplementedError, match="with_loong does not work with DPOTrainer"):
        with_loong(trl.DPOTrainer)


def test_the_recipe_learns_real_text_on_four_ranks_as_on_one(four: WorkerPool) -> None:
    flags = "--context_parallel_size 4 --head_parallel_size 2 --tiled_loss 16 --tiled_mlp 2 --selective_checkpoint"
    ranks = four.run(hf_runs.recipe, *flags.split())
    compare(ranks, hf_runs.recipe(None), 1e-4)  # Adam divides by gradients near 0
    losses = [h["loss"] for h in ranks[0]["history"] if "loss" in h]
    assert losses[-1] < losses[0] - 0.2, losses


@pytest.mark.parametrize("options", [{}, MEMORY], ids=["plain", "memory"])
def test_fully_shard_over_the_same_ranks_has_the_norm_of_one(four: WorkerPool, options: dict[str, Any]) -> None:
    """FSDP2 itself: accelerate takes it on GPUs alone."""
    for loss, norm, expected, expected_norm in four.run(hf_runs.fully_sharded_step, options):
        assert abs(loss - expected) <= 1e-6 * expected
        assert abs(norm - expected_norm) <= 1e-6 * expected_norm
