"""Interleaved rounds: every contestant once a round, so that a machine that slows down slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Phases = tuple[float, float, float]
"""Seconds of forward, of backward, and of CPU time in both, of one rank in one round."""


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
    rounds: int


def summarise(rounds: Sequence[Sequence[Phases]]) -> Timing:
    """`rounds[i][rank]` of one contestant as one `Timing`; `ValueError` when there are no rounds.

    >>> summarise([[(1.0, 2.0, 2.5), (1.5, 2.0, 3.0)], [(2.0, 2.0, 3.0), (1.0, 1.0, 2.0)]]).forward_backward_s
    3.75
    """
    if not rounds:
        raise ValueError("no rounds were run, so there is nothing to summarise")
    whole = [max(forward + backward for forward, backward, _ in ranks) for ranks in rounds]
    low, _, high = statistics.quantiles(whole, n=4, method="inclusive") if len(whole) > 1 else whole * 3
    return Timing(
        forward_s=statistics.median(max(forward for forward, _, _ in ranks) for ranks in rounds),
        forward_backward_s=statistics.median(whole),
        spread_s=(low, high),
        cpu_s=statistics.median(max(cpu for _, _, cpu in ranks) for ranks in rounds),
        rounds=len(rounds),
    )


def interleaved(
    contestants: Mapping[str, Callable[[], tuple[float, float]]],
    rounds: int,
    warmups: int,
    barrier: Callable[[], object],
) -> dict[str, list[Phases]]:
    """Run each contestant once a round, in an order that moves on by one each round; the first `warmups` do not count.

    A contestant returns the clock (`time.perf_counter`) at the end of its forward and of its backward.
    """
    names = list(contestants)
    taken: dict[str, list[Phases]] = {name: [] for name in names}
    for index in range(warmups + rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            barrier()
            cpu, started = time.process_time(), time.perf_counter()
            forward_end, backward_end = contestants[name]()
            if index >= warmups:
                used = time.process_time() - cpu
                taken[name].append((forward_end - started, backward_end - forward_end, used))
    return taken


def ratio_to(rounds: Sequence[Sequence[Phases]], reference: Sequence[Sequence[Phases]]) -> float:
    """Median over rounds of (this contestant's time / the reference's time in the same round)."""

    def whole(ranks: Sequence[Phases]) -> float:
        return max(forward + backward for forward, backward, _ in ranks)

    return statistics.median(whole(a) / whole(b) for a, b in zip(rounds, reference, strict=True))
