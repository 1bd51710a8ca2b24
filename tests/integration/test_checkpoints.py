"""A checkpoint saved under one layout resumes under any other: the loss continues as if nothing had happened.

Megatron's distributed checkpoints (torch_dist) on the CPU, with Adam and its moments. Only the distributed optimizer
cannot be resumed here: Megatron needs Apex or TransformerEngine for that. Native context parallelism needs a GPU, so
that the native layout here is one rank. Most pairs of layouts run by night.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest

from tests.integration import megatron_runs
from tests.nightly import mostly_nightly

STEPS, SAVED_AFTER = 4, 2
SHARED = (
    "--optimizer adam --lr 1e-3 --ckpt-format torch_dist --vocab-size 255 --make-vocab-size-divisible-by 4 "
    f"--num-layers 4 --train-iters {STEPS}"
).split()
LOONG = "--context-parallel-impl loong"
#: Layout -> number of ranks and flags. TP and pipeline stages are resharded too.
LAYOUTS = {
    "one-rank": (1, ""),
    "cp2-head2": (2, f"{LOONG} --context-parallel-size 2 --loong-head-parallel-size 2"),
    "cp4-double-ring": (4, f"{LOONG} --context-parallel-size 4 --loong-head-parallel-size 1 --loong-inner-ring-size 2"),
    "cp4-context-first": (
        4,
        f"{LOONG} --context-parallel-size 4 --loong-head-parallel-size 2 --loong-placement context_first",
    ),
    "tp2-cp2": (4, f"{LOONG} --context-parallel-size 2 --tensor-model-parallel-size 2"),
    "pp2-cp2": (4, f"{LOONG} --context-parallel-size 2 --pipeline-model-parallel-size 2"),
}
#: A pipeline stage draws other initial weights than one rank: nothing could be compared with what it saves.
PAIRS = [pair for pair in itertools.permutations(LAYOUTS, 2) if pair[0] != "pp2-cp2"]
ALWAYS = {("cp4-context-first", "one-rank"), ("cp4-context-first", "tp2-cp2")}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this session's checkpoints lie."""
    return tmp_path_factory.mktemp("checkpoints")


def script() -> Path:
    found = megatron_runs.own_script() or megatron_runs.checkout_script()
    if found is None:
        pytest.skip("needs MEGATRON_LM_PATH, or megatron-core 0.17 or newer, whose wheel brings megatron.training")
    return found


@functools.cache
def train(layout: str, *flags: str) -> list[megatron_runs.Step]:
    """Steps of a run under `layout`."""
    world_size, words = LAYOUTS[layout]
    return megatron_runs.train(script(), world_size, *SHARED, *words.split(), *flags)


@functools.cache
def saved_under(layout: str, folder: Path, *flags: str) -> tuple[Path, list[megatron_runs.Step]]:
    """A checkpoint of a run that stopped half-way, and that run's steps."""
    place = folder / "-".join([layout, *(flag.strip("-") for flag in flags)])
    save = ("--save", str(place), "--save-interval", str(SAVED_AFTER), "--exit-interval", str(SAVED_AFTER))
    return place, train(layout, *flags, *save)


@pytest.mark.parametrize(("saved", "resumed"), mostly_nightly(PAIRS, ALWAYS))
def test_a_run_continues_under_another_layout(saved: str, resumed: str, folder: Path) -> None:
    expected = train("one-rank")
    place, before = saved_under(saved, folder)
    megatron_runs.assert_same_steps(before, expected[:SAVED_AFTER])
    megatron_runs.assert_same_steps(train(resumed, "--load", str(place)), expected[SAVED_AFTER:])


@pytest.mark.nightly
def test_random_numbers_are_in_a_checkpoint_and_know_no_layout(folder: Path) -> None:
    """With dropout, one checkpoint resumed under two layouts of the same ranks: masks depend on a rank's tokens alone.

    Not compared with the run that was never stopped: in CPU mode one generator serves the GPU's random numbers and the
    data loader, which draws a seed when it starts again.
    """
    dropout = ("--hidden-dropout", "0.2")
    place, before = saved_under("cp4-double-ring", folder, *dropout)
    assert abs(before[0].grad_norm - train("one-rank")[0].grad_norm) > 1e-2  # there is dropout
    resumed = train("cp4-double-ring", *dropout, "--load", str(place))
    megatron_runs.assert_same_steps(train("cp4-context-first", *dropout, "--load", str(place)), resumed)
    without = train("cp4-context-first", *dropout, "--load", str(place), "--no-load-rng")
    assert abs(without[0].grad_norm - resumed[0].grad_norm) > 1e-3  # and it is the saved state that both began from
