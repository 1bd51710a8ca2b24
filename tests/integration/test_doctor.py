"""`megatron-loong doctor` says what is here, in words and as JSON, and judges flags as a run would."""

from __future__ import annotations

import json
import warnings

import pytest

pytest.importorskip("megatron.core")

from megatron_loong.integration import doctor
from megatron_loong.kernels.registry import KERNELS

CLUSTER = "--nodes 2 --gpus-per-node 8"
LOONG = "--context-parallel-impl loong --context-parallel-size 16 --num-attention-heads 32"


@pytest.fixture(autouse=True)
def _warnings_as_before():
    with warnings.catch_warnings():
        yield


def test_one_screen_names_versions_and_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 25
    assert "(tested); " in text and "torch " in text
    assert all(name in text for name in KERNELS)


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json", *LOONG.split(), *CLUSTER.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["kernels"]) == set(KERNELS) and found["kernels"]["reference"] == "usable"
    assert found["flags"]["layout"].startswith("cp 16 = head 8 x ring 2 (outer 2 x inner 1)")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (f"{LOONG} --nodes 1 --gpus-per-node 8", "= 8 ranks are not a multiple of TP 1 x CP 16 x PP 1 = 16"),
        (f"{LOONG} {CLUSTER} --loong-head-parallel-size 3", "head_parallel_size=3 does not divide"),
        (f"{LOONG} {CLUSTER} --loong-kernel fastest", "--loong-kernel fastest is unknown"),
        (f"{LOONG} {CLUSTER} --context-parallel-impl ring", "invalid choice: 'ring'"),
    ],
)
def test_flags_that_do_not_fit_end_with_1(flags: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(flags.split()) == 1
    assert problem in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (f"{CLUSTER} --loong-head-parallel-size 16", "the all-to-all over 16 ranks leaves the node"),
        (f"{CLUSTER} --loong-head-parallel-size 1 --loong-inner-ring-size 16", "one ring over several nodes"),
        (f"{CLUSTER} --seq-length 1000", "--seq-length 1000 is no multiple of 32 (2 x CP): every batch is padded"),
        ("--nodes 4 --gpus-per-node 8 --loong-head-parallel-size 8", None),
    ],
)
def test_what_is_allowed_but_slow_gets_a_note(flags: str, note: str | None) -> None:
    notes = doctor.flags([*LOONG.split(), *flags.split()], gpus=0)["notes"]
    assert (note in notes[0]) if note else notes == []
