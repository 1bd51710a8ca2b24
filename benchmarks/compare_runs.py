"""Two training runs held against each other for CI: losses, gradient norms, step time, memory; JUnit and Markdown."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from benchmarks.record import StepRecord, parse_step, relative_differences

_GRAD_NORM = re.compile(r"grad norm:\s*([^ |]+) \|")
_MEMORY = re.compile(r"max allocated:\s*([\d.]+)")

#: Megatron's log rounds a gradient norm to three decimals: half of the last one, for each of two runs.
GRAD_NORM_ROUNDING = 1e-3


@dataclass(frozen=True)
class Run:
    """What a run wrote down."""

    name: str
    steps: tuple[StepRecord, ...]
    grad_norms: tuple[float, ...]
    peak_memory_mib: float | None
    """Of the rank that reports most; None where Megatron reports none (without `--log-memory-to-tensorboard` it does
    so once, after the first steps)."""


@dataclass(frozen=True)
class Thresholds:
    """What may differ, and by how much; None is not judged."""

    loss: float
    grad_norm: float
    step_time: float | None
    memory: float | None
    skip_steps: int = 2


@dataclass(frozen=True)
class Row:
    """One quantity of one comparison."""

    against: str
    quantity: str
    found: float
    allowed: float | None
    """None: shown, and not judged."""

    @property
    def passed(self) -> bool:
        """A value that is no number never passes."""
        return self.allowed is None or self.found <= self.allowed


def parse_run(name: str, lines: Iterable[str]) -> Run:
    """A run from Megatron's log with `--log-interval 1`. `ValueError` when it has no step."""
    steps, norms, memory = [], [], []
    for line in lines:
        step = parse_step(line)
        if step is not None:
            steps.append(step)
            norm = _GRAD_NORM.search(line)
            norms.append(float(norm[1]) if norm else math.nan)
        memory += [float(number) for number in _MEMORY.findall(line)]
    if not steps:
        raise ValueError(f"{name}: no step in the log; the run needs --log-interval 1")
    return Run(name, tuple(steps), tuple(norms), max(memory) if memory and max(memory) > 0 else None)


def compare(ours: Run, native: Run, thresholds: Thresholds) -> list[Row]:
    """Each quantity of `ours` against `native`. `ValueError` when they did not make the same steps."""
    losses = relative_differences(list(ours.steps), list(native.steps))
    norms = [_norm_difference(a, b) for a, b in zip(ours.grad_norms, native.grad_norms, strict=True)]
    rows = [
        Row(native.name, "loss, largest relative difference", worst(losses), thresholds.loss),
        Row(native.name, "gradient norm, largest relative difference", worst(norms), thresholds.grad_norm),
        Row(
            native.name,
            "step time, ratio of medians",
            step_time_s(ours, thresholds.skip_steps) / step_time_s(native, thresholds.skip_steps),
            thresholds.step_time,
        ),
    ]
    if ours.peak_memory_mib and native.peak_memory_mib:
        ratio = ours.peak_memory_mib / native.peak_memory_mib
        rows.append(Row(native.name, "peak memory, ratio", ratio, thresholds.memory))
    elif thresholds.memory is not None:
        rows.append(Row(native.name, "peak memory, ratio (not in the log)", math.nan, thresholds.memory))
    return rows


def _norm_difference(value: float, reference: float) -> float:
    if not (math.isfinite(value) and math.isfinite(reference) and reference):
        return math.inf
    return max(0.0, abs(value - reference) - GRAD_NORM_ROUNDING) / abs(reference)


def worst(values: Sequence[float]) -> float:
    """The largest; not-a-number if any is.

    >>> worst([0.1, float("nan"), 0.2])
    nan
    """
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def step_time_s(run: Run, skip: int) -> float:
    """Median step time after the first `skip` steps (after none of them, if there are no others)."""
    return statistics.median(step.step_time_s for step in run.steps[skip:] or run.steps)


def markdown(rows: Sequence[Row], note: str = "") -> str:
    """A table for a CI summary."""
    lines = ["| compared with | quantity | found | allowed | |", "|---|---|---|---|---|"]
    for row in rows:
        verdict = "not judged" if row.allowed is None else "pass" if row.passed else "**FAIL**"
        allowed = "" if row.allowed is None else f"{row.allowed:.3g}"
        lines.append(f"| {row.against} | {row.quantity} | {row.found:.3g} | {allowed} | {verdict} |")
    return "\n".join([*([note, ""] if note else []), *lines, ""])


def junit(rows: Sequence[Row]) -> str:
    """JUnit XML, one test case per quantity; what is not judged counts as skipped."""
    failures, skipped = sum(not row.passed for row in rows), sum(row.allowed is None for row in rows)
    suite = ElementTree.Element(
        "testsuite", name="compare_native", tests=str(len(rows)), failures=str(failures), skipped=str(skipped)
    )
    for row in rows:
        case = ElementTree.SubElement(suite, "testcase", classname=f"loong vs {row.against}", name=row.quantity)
        if row.allowed is None:
            ElementTree.SubElement(case, "skipped", message=f"{row.found:.3g}, not judged")
        elif not row.passed:
            ElementTree.SubElement(case, "failure", message=f"{row.found:.3g}, allowed {row.allowed:.3g}")
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
