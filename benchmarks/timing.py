"""Interleaved rounds: every contestant once a round, so that a machine that slows down slows all of them alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Phases(NamedTuple):
    """One rank in one round, in seconds."""

    forward_s: float
    backward_s: float
    cpu_s: float
    """CPU time of all its threads."""
    main_cpu_s: float
    """CPU time of the thread that computes; the rest is gloo's."""
    idle_share: float
    """Of the time of all cores of this rank's machine, what nobody used."""

    @property
    def whole_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class Timing:
    """One contestant over all rounds. A round lasts as long as its slowest rank."""

    forward_s: float
    """Median over rounds of the slowest rank's forward."""
    forward_backward_s: float
    """Median over rounds of the slowest rank's forward and backward together."""
    spread_s: tuple[float, float]
    """Quartiles of the same."""
    cpu_s: float
    """Median of the CPU time of the rank that used most: what is left when the machine has cores for all."""
    main_cpu_s: float
    """The computing thread's part of it."""
    idle_share: float
    """Mean of the slowest rank's: whoever computes as much and never waits takes (1 - this) of the time."""
    rounds: int


def summarise(rounds: Sequence[Sequence[Phases]]) -> Timing:
    """`rounds[i][rank]` of one contestant as one `Timing`; `ValueError` when there are no rounds.

    >>> one = [Phases(1.0, 2.0, 2.5, 2.0, 0.1), Phases(1.5, 2.0, 3.0, 2.5, 0.1)]
    >>> other = [Phases(2.0, 2.0, 3.0, 2.0, 0.1), Phases(1.0, 1.0, 2.0, 1.5, 0.1)]
    >>> summarise([one, other]).forward_backward_s
    3.75
    """
    if not rounds:
        raise ValueError("no rounds were run, so there is nothing to summarise")
    whole = whole_s(rounds)
    busiest = [max(ranks, key=lambda rank: rank.cpu_s) for ranks in rounds]
    slowest = [max(ranks, key=lambda rank: rank.whole_s) for ranks in rounds]
    low, _, high = statistics.quantiles(whole, n=4, method="inclusive") if len(whole) > 1 else whole * 3
    return Timing(
        forward_s=statistics.median(max(rank.forward_s for rank in ranks) for ranks in rounds),
        forward_backward_s=statistics.median(whole),
        spread_s=(low, high),
        cpu_s=statistics.median(rank.cpu_s for rank in busiest),
        main_cpu_s=statistics.median(rank.main_cpu_s for rank in busiest),
        idle_share=sum(rank.idle_share * rank.whole_s for rank in slowest) / sum(whole),
        rounds=len(rounds),
    )


def interleaved(
    contestants: Mapping[str, Callable[[], tuple[float, float]]],
    rounds: int,
    warmups: int,
    barrier: Callable[[], object],
    go_on: Callable[[int], bool] = lambda counted: True,
) -> dict[str, list[Phases]]:
    """Run each contestant once a round, in an order that moves on by one each round; the first `warmups` do not count.

    A contestant returns the clock (`time.perf_counter`) at the end of its forward and of its backward. `go_on` is asked
    after each round, with the number of those that count; False ends the comparison early.
    """
    names = list(contestants)
    taken: dict[str, list[Phases]] = {name: [] for name in names}
    for index in range(warmups + rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            barrier()
            idle, cpu, main_cpu, started = _idle_s(), time.process_time(), time.thread_time(), time.perf_counter()
            forward_end, backward_end = contestants[name]()
            if index >= warmups:
                used, main_used, unused = time.process_time() - cpu, time.thread_time() - main_cpu, _idle_s() - idle
                whole = (os.cpu_count() or 1) * (time.perf_counter() - started)
                phases = forward_end - started, backward_end - forward_end
                taken[name].append(Phases(*phases, used, main_used, unused / whole))
        if not go_on(max(0, index + 1 - warmups)):
            break
    return taken


def _idle_s() -> float:
    """Time that the cores of this machine have been idle since it started, added up; NaN where Linux does not tell."""
    try:
        _, _, _, _, idle, waiting, *_ = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return float("nan")
    return (int(idle) + int(waiting)) / os.sysconf("SC_CLK_TCK")


def whole_s(rounds: Sequence[Sequence[Phases]]) -> list[float]:
    """By round: forward and backward of the slowest rank."""
    return [max(rank.whole_s for rank in ranks) for ranks in rounds]


def ratio_to(
    rounds: Sequence[Sequence[Phases]], reference: Sequence[Sequence[Phases]], at_least_s: float = 0.0
) -> float:
    """Median over rounds of this contestant's time over the reference's in the same round, or over `at_least_s`."""
    pairs = zip(whole_s(rounds), whole_s(reference), strict=True)
    return statistics.median(mine / max(theirs, at_least_s) for mine, theirs in pairs)
