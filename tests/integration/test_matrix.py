"""Whatever parallelism is beside it, a loong run has the losses and gradient norms of one rank.

Four steps in fp32 on the CPU through Megatron's own loop, for combinations of TP, PP, interleaved PP, DP, sharded
optimizers, dense and expert models and loong layouts. Where Megatron draws other initial weights because a model is
divided (each pipeline stage and each expert rank has a seed of its own), both runs begin from a distributed checkpoint
that one rank has written: which is also a test of resharding it.

By day each value of each axis is met at least once, by night each pair of values.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.integration import matrix, megatron_runs
from tests.integration.matrix import Recipe
from tests.nightly import mostly_nightly

#: 255 tokens, or with an end token besides (0.16) 256: padded to 256 for TP 1 and 2 alike. Padding is in the softmax.
SHARED = tuple(
    "--num-layers 4 --train-iters 4 --ckpt-format torch_dist --vocab-size 255 --make-vocab-size-divisible-by 4".split()
)
LOONG = ("--context-parallel-impl", "loong")


def chosen_recipes() -> list[Any]:
    """Each value of each axis, and marked `nightly` each pair of values."""
    by_day = matrix.covering(runnable(largest_world=4), matrix.values_of)
    by_night = matrix.covering(runnable(largest_world=8), matrix.pairs_of)
    return mostly_nightly(dict.fromkeys([*by_day, *by_night]), by_day)


def runnable(largest_world: int) -> list[Recipe]:
    """Recipes that the script at hand can run: no pair of values should be met only where it is skipped."""
    mtp = megatron_runs.checkout_script() is not None
    return [recipe for recipe in matrix.recipes(largest_world) if mtp or recipe.model != "mtp"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this session keeps the weights that runs begin from, and the data of unequal parts."""
    return tmp_path_factory.mktemp("matrix")


@functools.cache
def unequal_data(folder: Path, real: int = 8, ends: tuple[int, int] = (254, 256)) -> list[str]:
    """Flags of a dataset whose sequences have their `real` tokens in one eighth, the rest being end tokens.

    With `--eod-mask-loss` an end token does not count, so ranks that hold other parts have fewer tokens. The end token
    is 254 or 255, depending on the version, so the filling is of both (`ends`).
    """
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    draw = numpy.random.default_rng(1)
    tokens = draw.integers(*ends, (64, 64))
    tokens[:, 8 : 8 + real] = draw.integers(0, 254, (64, real))
    folder = folder / f"{real}-real"
    folder.mkdir()
    builder = IndexedDatasetBuilder(str(folder / "unequal.bin"), dtype=numpy.uint16)
    builder.add_document(torch.from_numpy(tokens.ravel()), [tokens.size])
    builder.finalize(str(folder / "unequal.idx"))
    flags = f"--data-path {folder / 'unequal'} --data-cache-path {folder / 'cache'} --split 100,0,0"
    return flags.split()


def script() -> Path:
    """A checkout's pretrain_gpt.py if there is one, for it knows more models; else ours."""
    found = megatron_runs.checkout_script() or megatron_runs.own_script()
    if found is None:
        pytest.skip("needs MEGATRON_LM_PATH, or megatron-core 0.17 or newer, whose wheel brings megatron.training")
    return found


def train(world_size: int, flags: list[str]) -> list[megatron_runs.Step]:
    """Four steps of the toy model."""
    return megatron_runs.train(script(), world_size, *SHARED, *flags)


def reference_of(recipe: Recipe) -> tuple[int, list[str]]:
    """World size and flags of the run that `recipe` must repeat: one rank with Megatron's attention.

    Megatron has no MLA without TransformerEngine but through our core attention, which needs two ranks: a ring of 2.
    """
    if recipe.model == "mla":
        return 2, [*recipe.reference_flags, *LOONG, *matrix.AXES["layout"]["ring2"].split()]
    return 1, recipe.reference_flags


@functools.cache
def start_of(model_recipe: Recipe, folder: Path) -> list[str]:
    """Flags that begin a run from the weights of this model, written by its reference run after one step."""
    place = folder / model_recipe.model
    world_size, flags = reference_of(model_recipe)
    save = ["--train-iters", "1", "--save", str(place), "--save-interval", "1", "--no-save-optim"]
    train(world_size, [*flags, *data_of(model_recipe, folder), *save])
    return ["--load", str(place), "--finetune"]


def data_of(recipe: Recipe, folder: Path) -> list[str]:
    """Flags of the data, where they are not mock data."""
    return unequal_data(folder) if recipe.model == "weighted" else []


@pytest.mark.parametrize("recipe", chosen_recipes(), ids=str)
def test_every_recipe_trains_as_one_rank_does(recipe: Recipe, folder: Path) -> None:
    if recipe.model == "mtp" and megatron_runs.checkout_script() is None:
        pytest.skip("MTP needs the pretrain_gpt.py of a Megatron-LM checkout: set MEGATRON_LM_PATH")
    plain = Recipe("tp1", "pp1", "dp1", "sgd", recipe.model, "ring2")
    common = data_of(recipe, folder) + (start_of(plain, folder) if recipe.divides_initialization else [])
    world_size, flags = reference_of(replace(plain, optimizer=recipe.optimizer))
    expected = train(world_size, [*flags, *common])
    steps = train(recipe.world_size, [*recipe.flags, *LOONG, *common])
    assert len(steps) == 4
    megatron_runs.assert_same_steps(steps, expected)


def test_a_run_that_fails_names_the_rank_and_ends_the_others() -> None:
    with pytest.raises(RuntimeError, match=r"rank [01] ended with 2: (.|\n)*unrecognized arguments: --no-such-flag"):
        train(2, ["--no-such-flag"])
