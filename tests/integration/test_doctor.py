"""`megatron-loong doctor` says what is here, in words and as JSON, and judges flags as a run would."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from megatron_loong.integration import doctor
from megatron_loong.integration.compat import find_megatron
from megatron_loong.kernels.registry import KERNELS
from megatron_loong.planner.flags import model_flags
from megatron_loong.planner.model import MODELS

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


@pytest.mark.parametrize("flag", ["--loong-hed-parallel-size", "--long-head-parallel-size", "--loong-head-parallel"])
def test_a_misspelt_flag_is_an_error_that_names_the_nearest(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([*LOONG.split(), *CLUSTER.split(), flag, "4"]) == 1
    assert f"there is no flag {flag}; did you mean --loong-head-parallel-size?" in capsys.readouterr().out


WHOLE = [*model_flags(MODELS["llama3-8b"]), *f"{LOONG} {CLUSTER} --bf16 --micro-batch-size 1".split()]
WHOLE += "--seq-length 65536 --max-position-embeddings 65536".split()


@pytest.mark.parametrize(
    ("flags", "connections", "problem"),
    [
        ("", None, None),
        ("", "8", "CUDA_DEVICE_MAX_CONNECTIONS to 1"),
        ("--use-megatron-fsdp", None, "fsdp_dtensor"),
        ("--use-megatron-fsdp --ckpt-format fsdp_dtensor", "1", "FSDP requires CUDA_DEVICE_MAX_CONNECTIONS"),
        ("--use-megatron-fsdp --ckpt-format fsdp_dtensor", None, None),
        ("--loong-zero-grad-size all --loong-zero-optimizer-size all", "1", "FSDP requires CUDA_DEVICE_MAX"),
        ("--overlap-param-gather", None, "--overlap-param-gather only supported with distributed optimizer"),
        ("--loong-selective-checkpoint", None, "needs --recompute-granularity full"),
        ("--lr fast", None, "argument --lr: invalid float value: 'fast'"),
    ],
)
def test_what_megatron_would_refuse_is_reported(
    flags: str, connections: str | None, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_megatron().arguments is None:
        pytest.skip("this megatron-core has no training loop")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if connections:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    found = doctor.flags([*WHOLE, *flags.split()], gpus=0)
    assert found["fit"] is (problem is None), found
    assert problem is None or problem in found["problem"]


def test_a_scripts_own_flags_are_not_judged() -> None:
    if find_megatron().arguments is None:
        pytest.skip("this megatron-core has no training loop")
    assert doctor.flags([*WHOLE, "--my-flag", "3", "--lr", "1e-3"], gpus=0)["not_judged"] == ["--my-flag"]


def test_native_says_what_is_in_effect_all_the_same() -> None:
    notes = doctor.flags(["--loong-tiled-loss", "--loong-head-parallel-size", "4"], gpus=0)["notes"]
    assert "in effect all the same: --loong-tiled-loss 1024" in notes[0]
    assert notes[1] == "without effect beside it: --loong-head-parallel-size 4"
    assert "changes nothing" in doctor.flags(["--context-parallel-impl", "native"], gpus=0)["notes"][0]


def test_a_commit_is_told_only_if_it_is_megatrons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wheel in an environment inside another repository, and a checkout of Megatron-LM."""
    import megatron.core

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for place, said in ((".venv/site-packages/megatron/core", "0.19.2"), ("megatron/core", "0.19.2+abc1234")):
        (tmp_path / place).mkdir(parents=True)
        monkeypatch.setattr(megatron.core, "__path__", [str(tmp_path / place)])
        assert doctor.own_version("0.19.2+abc1234") == said


@pytest.mark.parametrize("missing", ["torch", "megatron"])
def test_what_is_not_installed_is_said_without_a_traceback(missing: str) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None; from megatron_loong.__main__ import main;"
        f"sys.exit(main({['doctor', *LOONG.split(), *CLUSTER.split()]!r}))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    said = ended.stderr if missing == "torch" else ended.stdout
    assert ended.returncode == (2 if missing == "torch" else 1) and "Traceback" not in ended.stderr, ended.stderr
    assert ("torch is not installed in" if missing == "torch" else "has no megatron.core") in said


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
    notes = [note for note in notes if not note.startswith("Megatron's own checks were not run")]
    assert (note in notes[0]) if note else notes == []
