"""Megatron's log lines as numbers, and when two runs count as agreeing."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.record import StepRecord, parse_log, parse_step, relative_differences

ROOT = Path(__file__).resolve().parents[2]
LINE = (
    " [2026-08-01 05:50:38.123456] iteration {step:8d}/       3 | consumed samples:            8 | "
    "elapsed time per iteration (ms): 570.1 | throughput per GPU (TFLOP/s/GPU): 0.1 | learning rate: 2.000000E-03 | "
    "global batch size:     8 | lm loss: {loss:.6E} | loss scale: 1.0 | grad norm: 1.234 | "
    "number of skipped iterations:   0 | number of nan iterations:   0 |"
)


def log_of(*losses: float) -> list[str]:
    """What Megatron would log, between lines that are none of our business."""
    lines = ["> building train, validation, and test datasets ..."]
    return lines + [LINE.format(step=i, loss=loss) for i, loss in enumerate(losses, start=1)] + ["done"]


def test_a_line_of_megatron_is_read() -> None:
    assert parse_step(LINE.format(step=2, loss=5.5006094)) == StepRecord(2, 3, 5.500609, 0.5701)


def test_other_lines_are_skipped() -> None:
    assert [record.step for record in parse_log(log_of(3.0, 2.0))] == [1, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["ours", "reference", "both"])
def test_a_loss_that_is_not_finite_never_agrees(bad: float, which: str) -> None:
    good = parse_log(log_of(3.0))
    broken = parse_log(log_of(bad))
    ours, reference = {"ours": (broken, good), "reference": (good, broken), "both": (broken, broken)}[which]
    assert relative_differences(ours, reference) == [math.inf]


@pytest.mark.parametrize("ours, reference", [((), ()), ((3.0,), (3.0, 2.0)), ((), (3.0,))])
def test_runs_of_different_lengths_are_refused(ours: tuple[float, ...], reference: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        relative_differences(parse_log(log_of(*ours)), parse_log(log_of(*reference)))


@pytest.mark.parametrize("last_loss, exit_code, verdict", [(2.00001, 0, "agree"), (2.00004, 1, "DIFFER")])
def test_the_demo_says_whether_the_runs_agree(tmp_path: Path, last_loss: float, exit_code: int, verdict: str) -> None:
    for name, losses in (("ours", (5.5, 3.0, last_loss)), ("reference", (5.5, 3.0, 2.0))):
        (tmp_path / name).write_text("\n".join(log_of(*losses)))
    command = [sys.executable, str(ROOT / "scripts/demo_report.py"), "compare", "ours", "reference"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (exit_code, "")
    assert f"the runs {verdict};" in done.stdout


def test_the_demo_notices_a_run_that_stopped_early(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/demo_report.py"), "watch", "--log", str(tmp_path / "log")]
    done = subprocess.run(command, input="\n".join(log_of(5.5, 3.0)), capture_output=True, text=True)
    assert done.returncode == 1
    assert "stopped early" in done.stderr
    assert parse_log((tmp_path / "log").read_text().splitlines()) == parse_log(log_of(5.5, 3.0))
