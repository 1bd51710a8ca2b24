"""The check for GPU machines: its steps find what is wrong, its runner hides nothing, its page is what records say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_loong.bench import simulate
from megatron_loong.bench.gpu import __main__ as runner
from megatron_loong.bench.gpu import (
    checkpoint,
    exact,
    kernels,
    outcome,
    page,
    ranks,
    records,
    simulated,
    syncs,
    training,
)
from megatron_loong.bench.gpu.steps import STEPS, Step
from megatron_loong.bench.record import StepRecord
from megatron_loong.config import LoongConfig
from megatron_loong.kernels.registry import KERNELS

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# -- the page ------------------------------------------------------------------------------------------------------


def record(device: str, date: str, **statuses: str) -> dict[str, Any]:
    """Every step passed but those that are named by their first word."""
    steps = [
        {"name": x.name, "status": statuses.get(x.name.split()[0], "passed"), "seconds": 1, "reason": "", "figures": {}}
        for x in STEPS
    ]
    return {"device": device, "date": date, "commit": "c" * 40, "versions": {"torch": "2.0"}, "steps": steps}


def test_the_page_is_what_the_records_give() -> None:
    made = page.render(records.read_all())
    assert (ROOT / "docs" / "gpu.md").read_text() == made, "run scripts/gpu_check.sh --docs"


def test_without_records_every_step_is_unproven() -> None:
    text = page.render([])
    assert "Nothing has been proven on a GPU yet" in text
    assert all(f"- {step.name}: {step.proves}" in text for step in STEPS)


def test_the_latest_record_of_a_device_counts() -> None:
    old, new = record("A100", "2026-01-01 10:00"), record("A100", "2026-02-01 10:00", kernels="failed")
    other = record("H100", "2026-01-15 10:00", all="cannot run here")
    lines = page._proven([new, other, old]).splitlines()
    row = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    assert row["kernels"].endswith("| H100 | A100 |")
    assert row["all ranks on one device"].endswith("| A100 |  |"), "what cannot run proves nothing"


def test_records_are_written_and_read(tmp_path: Path) -> None:
    path = records.write(record("NVIDIA H200", "2026-01-01 10:00"), tmp_path)
    records.write(record("NVIDIA H200", "2026-02-01 10:00"), tmp_path)
    assert path.name == "nvidia_h200_202601011000_cccccccc.json"
    assert [x["date"] for x in records.read_all(tmp_path)] == ["2026-02-01 10:00", "2026-01-01 10:00"]


def test_a_record_of_a_cpu_is_refused(tmp_path: Path) -> None:
    made = records.make_record(records.describe_machine(cpu=True), [])
    with pytest.raises(ValueError, match="proves nothing about a GPU"):
        records.write(made, tmp_path)


# -- the runner ----------------------------------------------------------------------------------------------------


def planted(code: str, limit_s: float = 20, on_cpu: bool = True) -> Step:
    """A step that is a line of Python; `{json}` is where figures go."""
    return Step("planted", "nothing", ("-c", code, "{json}"), limit_s, on_cpu)


WRITE = 'import sys; open(sys.argv[1], \'w\').write(\'{"x": 1, "reason": "because"}\'); '


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        (WRITE, "passed", ""),
        ("pass", "failed", "it left no figures"),
        (WRITE + "sys.exit(1)", "failed", "because"),
        ("raise KeyError", "failed", "ended with 1; see its output above"),
        ("import os; os.abort()", "failed", "ended with -6; see its output above"),
        (WRITE + "sys.exit(3)", "cannot run here", "because"),
        ("import time; time.sleep(60)", "timed out", "no end after 1 s"),
    ],
    ids=["passes", "no-figures", "fails", "raises", "crashes", "cannot", "hangs"],
)
def test_what_becomes_of_a_step(code: str, status: str, reason: str) -> None:
    result = runner.run_step(planted(code), False, 1.0 if "sleep" in code else 20.0)
    assert (result.status, result.reason) == (status, reason)
    assert result.is_failure == (status in ("failed", "timed out"))


def test_what_a_step_started_ends_with_it(tmp_path: Path) -> None:
    child = "import sys, time, subprocess\nsubprocess.Popen(['sleep', '61.7'])\ntime.sleep(60)"
    start = time.monotonic()
    assert runner.run_step(planted(child), False, 1.0).status == "timed out"
    assert time.monotonic() - start < 15
    assert "61.7" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_steps_without_time_or_device_or_module_are_told() -> None:
    steps = [planted("", on_cpu=False), Step("absent", "", ("-m", "megatron_loong.bench.no_such"), 1), planted(WRITE)]
    results = runner.run_all(steps, cpu=True, total_limit_s=0.0)
    assert [x.status for x in results] == ["cannot run here", "cannot run here", "not reached"]
    assert results[1].reason == "megatron_loong.bench.no_such is missing"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main([]) == 2
    assert "no CUDA device here, so nothing was checked" in capsys.readouterr().out


def test_on_a_cpu_it_runs_and_leaves_no_record(tmp_path: Path) -> None:
    """The script itself, with the step that is quickest."""
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "scripts" / "gpu_check.sh"), "--cpu", "--only", "Selective", "--json", str(tmp_path / "x")]
    before = list(records.RECORDS.glob("*"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| Selective Checkpoint++ | passed |" in done.stdout and "no record is kept" in done.stdout
    made = json.loads((tmp_path / "x").read_text())
    assert made["device"] == "CPU" and made["steps"][0]["figures"]["ring_forwards_selective"] == checkpoint.LAYERS
    assert list(records.RECORDS.glob("*")) == before


# -- the checks ----------------------------------------------------------------------------------------------------


def test_a_check_tells_wrong_from_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(device: torch.device) -> dict[str, Any]:
        raise AssertionError("dk is wrong")

    file = tmp_path / "figures.json"
    assert outcome.main(wrong, ["--cpu", "--json", str(file)]) == outcome.FAILED
    assert json.loads(file.read_text()) == {"reason": "AssertionError: dk is wrong"}
    assert outcome.main(syncs.check, ["--cpu"]) == outcome.CANNOT
    assert "test_no_syncs.py" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cpu_flash", "reference"])
def test_kernels_agree_with_float64_whole_and_in_blocks(name: str) -> None:
    for dtype, causal in ((torch.float32, False), (torch.bfloat16, True)):
        tensors = exact.inputs(96, (4, 2), (32, 32), dtype, CPU)
        errors = kernels.compare(KERNELS[name], tensors, causal)
        assert max(errors.values()) <= kernels.BOUNDS[dtype]
        assert causal or {"dk of two blocks", "lse of two blocks"} <= set(errors)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def __getattr__(self, name: str) -> Any:
            return getattr(KERNELS["cpu_flash"], name)

        def backward(self, *args: Any, **options: Any) -> Any:
            dq, dk, dv = KERNELS["cpu_flash"].backward(*args, **options)
            return dq, dk * 1.05, dv

    monkeypatch.setattr(kernels, "KERNELS", {"wrong": Wrong()})
    with pytest.raises(AssertionError, match=r"wrong, bfloat16 on cpu.*dk"):
        kernels.check(CPU)


def test_all_ranks_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated, "LAYOUTS", [LoongConfig(4, 2, 2)])
    figures = simulated.check(CPU)
    assert 0 < figures["max_error_float64"] <= 1e-12 and figures["rms_over_one_call"] <= simulated.MULTIPLE
    monkeypatch.setattr(simulate._Mailbox, "_fill", lambda self, end, box, timeout: box.get())
    with pytest.raises(AssertionError, match="cp 4 = head 2 x ring 2"):
        simulated.check(CPU)


def test_recomputing_the_ring_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "selective_checkpoint", checkpoint._full)
    with pytest.raises(AssertionError, match="ring forwards: 4, 4"):
        checkpoint.check(CPU)


@pytest.mark.parametrize(
    ("loss", "step_s", "message"),
    [(4.0001, 1.005, None), (4.0, 1.05, r"1\.050 times"), (4.0, 0.9, r"0\.900 times"), (4.1, 1.0, "losses differ")],
)
def test_training_is_judged(monkeypatch: pytest.MonkeyPatch, loss: float, step_s: float, message: str | None) -> None:
    def train(script: Path, device: torch.device, plugin: str) -> list[StepRecord]:
        own = (loss, step_s) if plugin == "with" else (4.0, 1.0)
        return [StepRecord(i, 9, own[0], 50.0 if i <= training.SKIPPED else own[1]) for i in range(1, 10)]

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setenv("MEGATRON_LM_PATH", "somewhere")
    if message is None:
        assert training.check(CUDA)["with_over_without"] == pytest.approx(step_s)
        return
    with pytest.raises(AssertionError, match=message):
        training.check(CUDA)


@pytest.mark.multi_rank
@pytest.mark.slow
@pytest.mark.skipif("LOONG_TEST_ALL" not in os.environ, reason="set LOONG_TEST_ALL=1")
def test_four_processes_agree_on_a_cpu() -> None:
    assert 0 < ranks.start("gloo", CPU)["max_error_float64"] <= 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [step.name for step in STEPS])
def test_every_step_on_this_gpu(name: str) -> None:
    """As scripts/gpu_check.sh runs them; NCCL and Megatron may be unable to, nothing may fail."""
    (step,) = (x for x in STEPS if x.name == name)
    result = runner.run_step(step, False, step.limit_s)
    assert not result.is_failure, result.reason
    if result.status == "cannot run here":
        pytest.skip(result.reason)
