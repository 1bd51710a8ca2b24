"""scripts/compare_native.py judges: what differs fails, what is not there is not passed over."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from benchmarks.compare_runs import Run, Thresholds, compare, junit, markdown, parse_run

LINE = (
    " [2026-01-01 00:00:00] iteration {step:8d}/       3 | consumed samples: 4 | elapsed time per iteration (ms): {ms} "
    "| learning rate: 1.0E-01 | global batch size: 4 | lm loss: {loss:.6E} | loss scale: 1.0 | grad norm: {norm:.3f} |"
)
MEMORY = "[Rank 0] (after 2 iterations) memory (MB) | allocated: 9.0 | max allocated: {peak} | reserved: 9.0"


def run(name: str = "loong", *, ms: float = 10.0, loss: float = 5.0, norm: float = 1.0, peak: float = 100.0) -> Run:
    lines = [LINE.format(step=step, ms=ms, loss=loss / step, norm=norm) for step in (1, 2, 3)]
    return parse_run(name, ["noise", *lines, MEMORY.format(peak=peak)])


STRICT = Thresholds(loss=1e-4, grad_norm=1e-2, step_time=1.05, memory=1.05, skip_steps=1)


def failed(ours: Run, thresholds: Thresholds = STRICT) -> list[str]:
    return [row.quantity.split(",")[0] for row in compare(ours, run("native-p2p"), thresholds) if not row.passed]


def test_a_log_gives_steps_norms_and_memory() -> None:
    found = run()
    assert [step.loss for step in found.steps] == [5.0, 2.5, pytest.approx(5 / 3, 1e-6)]
    assert found.grad_norms == (1.0, 1.0, 1.0) and found.peak_memory_mib == 100.0


def test_equal_runs_pass() -> None:
    assert failed(run()) == []


@pytest.mark.parametrize(
    ("changed", "quantity"),
    [
        ({"loss": 5.001}, "loss"),
        ({"loss": float("nan")}, "loss"),
        ({"norm": 1.02}, "gradient norm"),
        ({"norm": float("nan")}, "gradient norm"),
        ({"ms": 11.0}, "step time"),
        ({"peak": 110.0}, "peak memory"),
    ],
)
def test_each_quantity_can_fail(changed: dict[str, float], quantity: str) -> None:
    assert failed(run(**changed)) == [quantity]


def test_memory_that_is_judged_and_not_there_fails() -> None:
    ours = run()
    assert failed(Run(ours.name, ours.steps, ours.grad_norms, None)) == ["peak memory"]


def test_faster_and_smaller_is_fine_and_what_is_not_judged_is_shown() -> None:
    rows = compare(run(ms=5.0, peak=50.0), run("native-a2a"), Thresholds(1e-4, 1e-2, None, None))
    assert all(row.passed for row in rows)
    assert "| native-a2a | step time, ratio of medians | 0.5 |  | not judged |" in markdown(rows)


def test_junit_counts_what_markdown_shows() -> None:
    rows = compare(run(loss=6.0), run("native-p2p"), Thresholds(1e-4, 1e-2, None, 1.05))
    suite = ElementTree.fromstring(junit(rows))
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "1", "1")
    assert "**FAIL**" in markdown(rows, "a note") and markdown(rows, "a note").startswith("a note\n")


def test_a_log_without_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match="no step in the log; the run needs --log-interval 1"):
        parse_run("loong", ["nothing"])
