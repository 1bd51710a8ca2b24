"""What a training run wrote down: Megatron's log lines as numbers, and two runs held against each other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

_STEP = re.compile(
    r"iteration\s+(?P<step>\d+)/\s*(?P<steps>\d+) \|"
    r".*?elapsed time per iteration \(ms\):\s*(?P<time_ms>[\d.]+) \|"
    r".*?lm loss:\s*(?P<loss>[^ |]+) \|"
)


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as Megatron logs it with `--log-interval 1`."""

    step: int
    """Counted from 1."""

    steps: int
    """Steps that the run intends to make."""

    loss: float
    """Seven significant digits: more are not in the log."""

    step_time_s: float


def parse_step(line: str) -> StepRecord | None:
    """The step that a line of Megatron's log reports; None for any other line.

    >>> parse_step(" iteration 3/ 80 | elapsed time per iteration (ms): 950.0 | lm loss: 5.545177E+00 | x")
    StepRecord(step=3, steps=80, loss=5.545177, step_time_s=0.95)
    """
    found = _STEP.search(line)
    if found is None:
        return None
    step_time_s = float(found["time_ms"]) / 1000
    return StepRecord(int(found["step"]), int(found["steps"]), float(found["loss"]), step_time_s)


def parse_log(lines: Iterable[str]) -> list[StepRecord]:
    """The steps of a log, in order; everything else is skipped."""
    return [record for record in map(parse_step, lines) if record is not None]


def relative_differences(ours: list[StepRecord], reference: list[StepRecord]) -> list[float]:
    """`|ours - reference| / |reference|` of the loss at every step; inf where either loss is not finite.

    Raises `ValueError` unless both runs made the same steps, and at least one: what did not run cannot agree.

    >>> relative_differences([StepRecord(1, 1, 4.04, 0.1)], [StepRecord(1, 1, 4.0, 0.2)])
    [0.01...]
    """
    if not ours or [record.step for record in ours] != [record.step for record in reference]:
        raise ValueError(f"runs of {len(ours)} and {len(reference)} logged steps cannot be compared step by step")
    return [_relative_difference(a.loss, b.loss) for a, b in zip(ours, reference, strict=True)]


def _relative_difference(value: float, reference: float) -> float:
    if not (math.isfinite(value) and math.isfinite(reference)):
        return math.inf
    return abs(value - reference) / abs(reference)
