"""`--context-parallel-impl loong` trains as one rank would: same losses, same gradient norms, whatever is beside it.

Megatron's own loop, in fp32 on the CPU. Two scripts, each where it can run: the `pretrain_gpt.py` of a Megatron-LM
checkout named by MEGATRON_LM_PATH, and our own on a megatron-core that ships the loop. By day
the second script runs the first case only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration import megatron_runs
from tests.integration.megatron_runs import assert_same_steps

#: Megatron's distributed optimizer and its checkpoints know Adam, but no SGD.
ADAM = "--optimizer adam --lr 1e-3"
SCRIPTS = ["checkout", "own"]
#: The one that runs every case.
FIRST = "own" if megatron_runs.checkout_script() is None else "checkout"


@dataclass(frozen=True)
class Case:
    """A run with loong and the native run without context parallelism that it must repeat."""

    name: str
    loong: str
    """Flags of the loong run alone, `--context-parallel-impl loong` left out."""
    world_size: int = 4
    shared: str = ""
    """Flags of both runs. TP and PP are shared: the initial weights may differ with them."""
    native_world_size: int = 1
    always: bool = True
    """By day too. Pipelines, sharded optimizers and MoE are among the recipes of test_matrix.py."""


CASES = [
    Case("cp4", "--context-parallel-size 4 --loong-head-parallel-size 2"),
    Case(
        "tp2-cp2",  # one KV head per TP rank, two head-parallel ranks: the KV head is replicated
        "--context-parallel-size 2 --loong-head-parallel-size 2",
        shared="--tensor-model-parallel-size 2",
        native_world_size=2,
    ),
    Case(
        "pp2-cp2",
        "--context-parallel-size 2 --loong-head-parallel-size 1",
        shared="--pipeline-model-parallel-size 2",
        native_world_size=2,
        always=False,
    ),
    Case(
        "dp2-cp2-distributed-optimizer",
        "--context-parallel-size 2 --use-distributed-optimizer",
        shared=ADAM,
        always=False,
    ),
    Case(
        "moe-cp2",
        "--context-parallel-size 2 --loong-head-parallel-size 2",
        world_size=2,
        shared="--num-experts 4 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01",
        always=False,
    ),
    Case(
        "cp4-double-ring",
        "--context-parallel-size 4 --loong-head-parallel-size 1 --loong-inner-ring-size 2",
        always=False,
    ),
    Case("cp4-all-heads", "--context-parallel-size 4 --loong-head-parallel-size 4", always=False),
    Case(
        "cp4-context-first",
        "--context-parallel-size 4 --loong-head-parallel-size 2 --loong-placement context_first",
        always=False,
    ),
    Case(
        "cp4-full-recompute",
        "--context-parallel-size 4 --loong-head-parallel-size 2 "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        always=False,
    ),
    Case(
        "ep2-cp2",
        "--context-parallel-size 2 --loong-head-parallel-size 2",
        world_size=2,
        shared="--num-experts 4 --expert-model-parallel-size 2",
        native_world_size=2,
        always=False,
    ),
]


def script_or_skip(name: str) -> Path:
    """The script called `name`, or a skip that says how to provide it."""
    if name == "checkout":
        script = megatron_runs.checkout_script()
        if script is None:
            pytest.skip("set MEGATRON_LM_PATH to a Megatron-LM checkout to run its pretrain_gpt.py")
        assert script.is_file(), f"MEGATRON_LM_PATH={os.environ['MEGATRON_LM_PATH']} has no pretrain_gpt.py"
    else:
        script = megatron_runs.own_script()
        if script is None:
            pytest.skip("install megatron-core 0.17 or newer, whose wheel brings megatron.training")
    return script


def runs() -> list[Any]:
    """Scripts and cases, most of them marked `nightly`."""
    return [
        pytest.param(
            script,
            case,
            id=f"{script}-{case.name}",
            marks=[] if case is CASES[0] or (case.always and script == FIRST) else pytest.mark.nightly,
        )
        for script in SCRIPTS
        for case in CASES
    ]


@pytest.mark.parametrize(("script_name", "case"), runs())
def test_loong_trains_as_without_context_parallelism(script_name: str, case: Case) -> None:
    script = script_or_skip(script_name)
    shared = case.shared.split()
    native = megatron_runs.train(script, case.native_world_size, *shared)
    loong_flags = ["--context-parallel-impl", "loong", *case.loong.split()]
    assert_same_steps(megatron_runs.train(script, case.world_size, *shared, *loong_flags), native)


@pytest.mark.nightly
@pytest.mark.parametrize("script_name", SCRIPTS)
def test_data_parallel_ranks_change_nothing_natively(script_name: str) -> None:
    """The yardstick itself: without loong, two ranks and a distributed optimizer give one rank's numbers."""
    script = script_or_skip(script_name)
    native = megatron_runs.train(script, 1, *ADAM.split())
    assert_same_steps(megatron_runs.train(script, 2, *ADAM.split(), "--use-distributed-optimizer"), native)


@pytest.mark.nightly
@pytest.mark.parametrize("script_name", SCRIPTS)
def test_a_checkpoint_continues_where_it_stopped(script_name: str, tmp_path: Path) -> None:
    """Saved under loong with CP 2, continued natively on one rank: the layout of CP is not in a checkpoint."""
    script = script_or_skip(script_name)
    native = (*ADAM.split(), "--ckpt-format", "torch_dist")
    loong = ("--context-parallel-impl", "loong", "--context-parallel-size", "2")
    save = ("--save", str(tmp_path), "--save-interval", "2", "--exit-interval", "2")
    expected = megatron_runs.train(script, 1, *native)
    assert_same_steps(megatron_runs.train(script, 2, *native, *loong, *save), expected[:2])
    assert_same_steps(megatron_runs.train(script, 1, *native, "--load", str(tmp_path)), expected[2:])
