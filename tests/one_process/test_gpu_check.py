"""The check for GPU machines: its runner loses nothing, its record outlasts it, its page is what records say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as runner
from benchmarks.gpu import checkpoint, page, records
from benchmarks.gpu.records import StepResult
from benchmarks.gpu.steps import STEPS, Step

ROOT = Path(__file__).resolve().parents[2]


# -- the page ------------------------------------------------------------------------------------------------------


def record(device: str, date: str, **statuses: str) -> dict[str, Any]:
    """Every step passed but those that are named by their first word."""
    steps = [asdict(StepResult(x.name, statuses.get(x.name.split()[0], "passed"), 1)) for x in STEPS]
    return {"device": device, "date": date, "commit": "c" * 40, "versions": {"torch": "2.0"}, "steps": steps}


def test_the_page_is_what_the_records_give() -> None:
    made = page.render(records.read_all())
    assert (ROOT / "docs" / "gpu.md").read_text() == made, "run scripts/gpu_check.sh --docs"


def test_without_records_every_step_is_unproven() -> None:
    text = page.render([])
    assert "Nothing has been proven on a GPU yet" in text
    assert all((f"- {step.name}: {step.proves}" in text) == (step.on_gpu is not None) for step in STEPS)


def test_the_latest_record_of_a_device_counts() -> None:
    old, new = record("A100", "2026-01-01 10:00"), record("A100", "2026-02-01 10:00", kernel="failed")
    other = record("H100", "2026-01-15 10:00", all="cannot run here")
    lines = page._proven([new, other, old]).splitlines()
    row = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    assert row["kernel torch_flash"].endswith("| H100 | A100 |")
    assert row["all ranks on one device"].endswith("| A100 |  |"), "what cannot run proves nothing"


def test_a_step_that_was_run_again_counts_as_it_ended() -> None:
    twice = record("H100", "2026-01-01 10:00")
    twice["steps"].insert(0, {**twice["steps"][0], "status": "failed", "switches": {}})
    twice["steps"][1]["switches"] = {"LOONG_TRITON": "0"}
    assert page._devices([twice], STEPS[0], "passed") == "H100"
    assert page.table(twice["steps"])[3].endswith("| LOONG_TRITON=0 |")


def test_records_are_read_from_their_folders(tmp_path: Path) -> None:
    for date in ("2026-01-01 10:00", "2026-02-01 10:00"):
        made = record("NVIDIA H200", date)
        folder = tmp_path / records.folder_of(made).name
        folder.mkdir()
        (folder / "record.json").write_text(json.dumps(made))
    assert records.folder_of(made) == records.RECORDS / "nvidia_h200_202602011000_cccccccc"
    assert [x["date"] for x in records.read_all(tmp_path)] == ["2026-02-01 10:00", "2026-01-01 10:00"]
    (folder / "record.json").write_text(json.dumps(records.describe_machine(cpu=True)))
    with pytest.raises(ValueError, match="proves nothing about a GPU"):
        records.read_all(tmp_path)


# -- the runner ----------------------------------------------------------------------------------------------------


@pytest.fixture
def check_in(tmp_path: Path) -> Callable[..., runner.Check]:
    def make(limit_s: float = 60.0, cpu: bool = True) -> runner.Check:
        return runner.Check({"device": "CPU", "commit": "c" * 40}, cpu, tmp_path, time.monotonic() + limit_s)

    return make


def planted(folder: Path, code: str, name: str = "planted", on_cpu: tuple[str, ...] | None = ()) -> Step:
    """A step that is a few lines of Python; `sys.argv[1]` is where figures go."""
    file = folder / f"{name}.py"
    file.write_text("import os, sys, time\n" + code)
    return Step(name, "nothing", (str(file), "{json}"), 20, on_cpu=on_cpu)


WRITE = 'open(sys.argv[1], "w").write(\'{"x": 1, "reason": "because"}\'); '


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        (WRITE, "passed", ""),
        ("import planted; " + WRITE, "passed", ""),
        ("pass", "failed", "it left no figures"),
        (WRITE + "sys.exit(1)", "failed", "because"),
        ("raise KeyError", "failed", "ended with 1; see log.txt"),
        ("os.abort()", "failed", "ended with -6; see log.txt"),
        (WRITE + "sys.exit(3)", "cannot run here", "because"),
        (WRITE + "time.sleep(60)", "timed out", "no end after 2 s; because"),
    ],
    ids=["passes", "imports-what-lies-beside-it", "no-figures", "fails", "raises", "crashes", "cannot", "hangs"],
)
def test_what_becomes_of_a_step(
    code: str, status: str, reason: str, tmp_path: Path, check_in: Callable[..., runner.Check]
) -> None:
    result = check_in().run_step(planted(tmp_path, code), 2.0 if "sleep" in code else 20.0, {})
    assert (result.status, result.reason) == (status, reason)
    assert result.is_failure == (status in ("failed", "timed out"))
    assert status != "timed out" or result.figures == {"x": 1}, "what it had is kept"


def test_a_step_that_hangs_says_where_and_ends_within_the_limit_of_the_check(
    tmp_path: Path, check_in: Callable[..., runner.Check]
) -> None:
    """With what it started. Its output is in the log before it ends; its traceback comes before its limit."""
    hangs = "import subprocess\nprint('begun')\nsubprocess.Popen(['sleep', '61.7'])\ndef here(): time.sleep(60)\nhere()"
    start, limit_s = time.monotonic(), runner.END_S + runner.LEAST_S + 2
    results = check_in(limit_s=limit_s).run_all([planted(tmp_path, hangs), planted(tmp_path, WRITE, "next")])
    assert time.monotonic() - start < limit_s
    assert [x.status for x in results] == ["timed out", "not reached"]
    assert "61.7" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    log = (tmp_path / "log.txt").read_text()
    assert "begun" in log and "in here" in log


def test_the_record_and_the_log_outlast_a_check_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL, in the second step: the first is in the record, and the second ends too."""
    alive = tmp_path / "alive"
    hangs = f"open({str(alive)!r}, 'w').write(str(os.getpid())); print('hanging'); time.sleep(60)"
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from benchmarks.gpu.__main__ import Check
from tests.one_process.test_gpu_check import WRITE, planted
folder = Path({str(tmp_path)!r})
steps = [planted(folder, WRITE, "first"), planted(folder, {hangs!r}, "second")]
Check({{"device": "CPU", "commit": "c"}}, True, folder / "out", time.monotonic() + 60).run_all(steps)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    wait_for(lambda: alive.exists() and "hanging" in (tmp_path / "out" / "log.txt").read_text())
    process.kill()
    process.wait()
    made = json.loads((tmp_path / "out" / "record.json").read_text())
    assert [(x["name"], x["status"]) for x in made["steps"]] == [("first", "passed")] and not made["finished"]
    pid = alive.read_text()
    wait_for(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes())


def wait_for(condition: Callable[[], bool], patience_s: float = 60.0) -> None:
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_steps_without_time_or_device_or_package_are_told(
    tmp_path: Path, check_in: Callable[..., runner.Check]
) -> None:
    absent = replace(planted(tmp_path, "", "absent"), fault=lambda device_type: f"no such thing on {device_type}")
    steps = [planted(tmp_path, "", "gpu", on_cpu=None), absent, planted(tmp_path, WRITE)]
    results = check_in(limit_s=runner.END_S).run_all(steps)
    assert [x.status for x in results] == ["cannot run here", "cannot run here", "not reached"]
    assert results[1].reason == "no such thing on cpu"
    made = json.loads((tmp_path / "record.json").read_text())
    assert made["finished"] and [x["status"] for x in made["steps"]] == [x.status for x in results]


def test_later_steps_do_without_what_failed(tmp_path: Path, check_in: Callable[..., runner.Check]) -> None:
    """And a step that failed before the fault was known runs again."""
    fails, says = "sys.exit(1)", WRITE + "print(os.environ.get('LOONG_TRITON'), os.environ.get('LOONG_KERNEL'))"
    needs = "if 'LOONG_TRITON' not in os.environ: sys.exit(1)\n" + WRITE
    steps = [
        planted(tmp_path, fails, "kernel torch_cudnn"),
        planted(tmp_path, WRITE, "kernel torch_flash"),
        planted(tmp_path, WRITE, "kernel reference"),
        planted(tmp_path, needs, "speed"),
        planted(tmp_path, fails, "passes over memory"),
        planted(tmp_path, says, "later"),
    ]
    results = check_in().run_all(steps)
    kernel = {"LOONG_KERNEL": "torch_flash"}
    both = {"LOONG_TRITON": "0", **kernel}
    assert [(x.name, x.status, x.switches) for x in results[3:]] == [
        ("speed", "failed", kernel),
        ("passes over memory", "failed", kernel),
        ("speed", "passed", both),
        ("later", "passed", both),
    ]
    assert "0 torch_flash" in (tmp_path / "log.txt").read_text()


def test_nothing_is_switched_where_the_preferred_kernel_passed_or_none_did() -> None:
    passed, failed = StepResult("kernel torch_flash", "passed", 1), StepResult("kernel torch_cudnn", "failed", 1)
    only_fp8 = StepResult("kernel flash_attn_3_fp8", "failed", 1)
    assert runner.switches([passed, only_fp8]) == {} == runner.switches([failed])


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main([]) == 2
    assert "no CUDA device here, so nothing was checked" in capsys.readouterr().out


def test_the_script_leaves_a_record_and_a_log(tmp_path: Path) -> None:
    """The script itself, with the step that is quickest."""
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "scripts" / "gpu_check.sh"), "--cpu", "--only", "Selective", "--out", str(tmp_path / "x")]
    done = subprocess.run([*command, "--commit", "abc"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| Selective Checkpoint++ | passed |" in done.stdout
    assert (tmp_path / "x" / "log.txt").read_text() == done.stdout
    made = json.loads((tmp_path / "x" / "record.json").read_text())
    assert made["device"] == "CPU" and made["commit"] == "abc" and made["finished"]
    assert made["steps"][0]["figures"]["ring_forwards_selective"] == checkpoint.LAYERS


PLANTED_KERNEL = f"""
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.gpu import kernels
from megatron_loong.kernels.registry import KERNELS
class Broken:
    def __getattr__(self, name):
        return getattr(KERNELS["cpu_flash"], name)
    def forward(self, q, k, v, rules):
        if q.dtype is kernels.torch.float32:
            raise RuntimeError("CUDA error: misaligned address")
        return KERNELS["cpu_flash"].forward(q, k, v, rules)
KERNELS["broken"] = Broken()
kernels.SHAPES, kernels.speed = kernels.SHAPES[2:3], lambda *any: {{}}
sys.argv[1:1] = [NAME, "--cpu", "--json"]
sys.exit(kernels.main())
"""


def test_a_broken_kernel_leaves_its_traceback_and_the_other_kernels_their_results(
    tmp_path: Path, check_in: Callable[..., runner.Check]
) -> None:
    steps = [planted(tmp_path, PLANTED_KERNEL.replace("NAME", repr(x)), f"kernel {x}") for x in ("broken", "cpu_flash")]
    broken, cpu_flash = check_in(limit_s=120).run_all(steps)
    assert broken.status == "failed" and "RuntimeError: CUDA error: misaligned address" in broken.reason
    (text,) = broken.figures["failures"].values()
    assert text.startswith("Traceback") and "in forward" in text
    assert "float64" in broken.figures["worst_relative_rms"], "the other dtypes go on"
    assert cpu_flash.status == "passed" and "float32" in cpu_flash.figures["worst_relative_rms"]
    assert text in (tmp_path / "log.txt").read_text()
    assert runner.switches([broken, cpu_flash]) == {"LOONG_KERNEL": "cpu_flash"}


@pytest.mark.multi_rank
@pytest.mark.slow
@pytest.mark.nightly
def test_four_processes_agree_on_a_cpu(tmp_path: Path, check_in: Callable[..., runner.Check]) -> None:
    (step,) = (x for x in STEPS if x.name == "4 processes, staged gloo")
    result = check_in().run_step(step, 120, {})
    assert result.status == "passed", (tmp_path / "log.txt").read_text()
    assert 0 < max(result.figures["max_error_float64"].values()) <= 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [step.name for step in STEPS])
def test_every_step_on_this_gpu(name: str, check_in: Callable[..., runner.Check]) -> None:
    """As scripts/gpu_check.sh runs them; NCCL and Megatron may be unable to, nothing may fail."""
    (result,) = check_in(limit_s=300, cpu=False).run_all([x for x in STEPS if x.name == name])
    assert not result.is_failure, result.reason
    if result.status == "cannot run here":
        pytest.skip(result.reason)
