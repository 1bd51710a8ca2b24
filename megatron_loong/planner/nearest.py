"""When no sizes fit: which flag is at fault, and the nearest values that would work, found by trying them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from megatron_loong.config import divisors
from megatron_loong.planner.candidate import RECOMPUTE, Limits, Workload
from megatron_loong.planner.units import length

#: What the user has decided: field of `Limits` -> flag, and what binds it.
_DECIDED = {
    "tensor": ("--tensor-model-parallel-size", "it divides --gpus, the GPUs of a node and the heads"),
    "pipeline": ("--pipeline-model-parallel-size", "it divides --gpus / (TP x CP) and the layers"),
    "context": ("--context-parallel-size", "it divides --gpus / TP, and twice it divides --seq-length"),
    "expert": ("--expert-model-parallel-size", "it divides the experts and the TP x data x context parallel ranks"),
    "head_parallel": ("--loong-head-parallel-size", "it divides CP and the heads of a TP rank"),
    "recompute": ("--recompute", "selective needs CP above 1"),
}
#: What the job is: field of `Workload` -> flag, what binds it, and the step in which others are tried.
_GIVEN = {
    "gpus": ("--gpus", "they are TP x PP x CP x DP", 1),
    "seq_len": ("--seq-length", "a multiple of 2 x CP", 2),
    "global_batch_size": ("--global-batch-size", "a multiple of DP x --micro-batch-size", 1),
}
_TRIES = 128


def why_not(work: Workload, limits: Limits, is_possible: Callable[[Workload, Limits], bool]) -> str:
    """What to change, one flag at a time, so that `is_possible`; for the text of a `ValueError`.

    What the user decided is looked at first, the job itself only when no change of that helps.
    """
    lines = [*_decided(work, limits, is_possible)] or [*_given(work, limits, is_possible)]
    flags = [f"{flag} {getattr(limits, name)}" for name, (flag, _) in _DECIDED.items() if _is_decided(limits, name)]
    given = [f"{flag} {getattr(work, name)}" for name, (flag, _, _) in _GIVEN.items() if name != "seq_len"]
    given.insert(1, f"--seq-length {length(work.seq_len)}")
    job = f"no sizes fit {work.gpus} GPUs with {', '.join([*given[1:], *flags])}"
    if not lines:
        return f"{job}, and no change of one of them would do; leave out what is decided, or change --gpus"
    return "\n".join([f"{job}; change one of these:", *(f"  {line}" for line in lines)])


def what_fits(work: Workload, any_fits: Callable[[Workload], bool]) -> list[str]:
    """When nothing fits the memory: the fewest GPUs and the longest sequence that do, one a line; both in steps."""
    found = []
    for times in (2**i for i in range(1, 11)):
        if _does(any_fits, work, "gpus", work.gpus * times):
            found.append(f"--gpus {work.gpus}: {work.gpus * times} would do")
            break
    least = 1024 * work.gpus
    for eighths in (*range(7, 0, -1), *(1 / 2**i for i in range(1, 11))):
        seq_len = int(work.seq_len * eighths / 8) // least * least
        if seq_len and _does(any_fits, work, "seq_len", seq_len):
            found.append(f"--seq-length {length(work.seq_len)}: {length(seq_len)} would do")
            break
    return found


def _does(any_fits: Callable[[Workload], bool], work: Workload, name: str, value: int) -> bool:
    try:
        return any_fits(dataclasses.replace(work, **{name: value}))
    except ValueError:
        return False


def _is_decided(limits: Limits, name: str) -> bool:
    return getattr(limits, name) is not None


def _decided(work: Workload, limits: Limits, is_possible: Callable[[Workload, Limits], bool]) -> Iterable[str]:
    for name, (flag, rule) in _DECIDED.items():
        present = getattr(limits, name)
        if present is None or not is_possible(work, dataclasses.replace(limits, **{name: None})):
            continue
        others: tuple[Any, ...] = RECOMPUTE if name == "recompute" else tuple(divisors(work.gpus))
        works = [x for x in others if is_possible(work, dataclasses.replace(limits, **{name: x}))]
        yield f"{flag} {present}: {_or(works)} would work ({rule})"


def _given(work: Workload, limits: Limits, is_possible: Callable[[Workload, Limits], bool]) -> Iterable[str]:
    for name, (flag, rule, step) in _GIVEN.items():
        present = getattr(work, name)
        found = []
        for direction in (-1, 1):
            # From the nearest multiple on; a micro-batch above 1 has to divide the global batch.
            start = present - present % step + (step if direction > 0 and present % step else 0)
            for other in (start + direction * step * i for i in range(_TRIES)):
                if other >= 1 and other != present and _fits(work, name, other, limits, is_possible):
                    found.append(other)
                    break
        if found:
            said = length if name == "seq_len" else str
            yield f"{flag} {said(present)}: {_or([said(x) for x in found])} would work ({rule})"


def _fits(
    work: Workload, name: str, value: int, limits: Limits, is_possible: Callable[[Workload, Limits], bool]
) -> bool:
    try:
        return is_possible(dataclasses.replace(work, **{name: value}), limits)
    except ValueError:  # the micro-batch does not divide this global batch
        return False


def _or(values: list[Any]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
