"""The comparison: every contestant checked for exactness, observed once, then timed in interleaved rounds.

Each rank calls `compare`; rank 0 gets the record.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from benchmarks.observe import Observer
from benchmarks.rivals.interface import Contestant, GroupCache, Shape
from benchmarks.rivals.ours import ComputeAlone
from benchmarks.timing import Phases, interleaved
from megatron_loong.kernels.cpu_flash import flash_forward

#: RMS error allowed, as a multiple of the one-device kernel's own on the same inputs.
ERROR_MULTIPLE = 2.5


@dataclass(frozen=True)
class Counts:
    """One rank's forward and backward, observed."""

    flops: int
    attention_calls: int
    attention_cpu_s: float
    """CPU time inside the operator."""
    peak_live_bytes: int
    """Above the inputs."""
    forward_sent_bytes: list[int]
    """To each rank, in the forward alone."""
    sent_bytes: list[int]
    """To each rank."""


@dataclass
class Entry:
    """What was learned of one contestant."""

    name: str
    package: str
    refused: str | None = None
    """Why it was not timed: it raised, or its result was wrong."""
    error_multiple: float = 0.0
    """Largest RMS error of out, dq, dk and dv over that of the one-device kernel."""
    counts: list[Counts] = field(default_factory=list)
    """By rank."""
    rounds: list[list[Phases]] = field(default_factory=list)
    """By round and rank; none when it was refused."""

    @property
    def traffic(self) -> list[list[int]]:
        """`traffic[a][b]`: bytes that rank a sent to rank b in one forward and backward."""
        return [one.sent_bytes for one in self.counts]


def compare(
    contestants: Sequence[Contestant],
    shape: Shape,
    rounds: int,
    warmups: int,
    limit_s: float = float("inf"),
    say: Callable[[str], object] = lambda line: None,
) -> list[Entry]:
    """Entries in the order of the contestants, complete on rank 0. Collective over the world.

    No round but the first is begun that would end more than `limit_s` after the start. `say` is given, on rank 0, a
    line per contestant checked and per round.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    progress = _Progress(rounds, warmups, limit_s, say if rank == 0 else lambda line: None)
    groups = GroupCache(world_size)
    q, k, v, dout = shape.inputs()
    truth = _Truth(q, k, v, dout) if rank == 0 else None
    entries, runs = [], {}
    for contestant in contestants:
        entry = Entry(contestant.name, contestant.package)
        entries.append(entry)
        local = [contestant.dispatch(x, rank) for x in (q, k, v, dout)]
        try:
            contestant.set_up(groups, shape)
            results = _observe(contestant, local, entry)
            raised = None
        except Exception as error:
            results, raised = [], f"{type(error).__name__}: {error}".split("\n")[0]
        # A fault of the program is the same on every rank; a lost peer ends the run by its own error.
        faults: list[str | None] = [None] * world_size
        dist.all_gather_object(faults, raised)
        entry.refused = next((fault for fault in faults if fault), None)
        if entry.refused is None and not isinstance(contestant, ComputeAlone):
            _check(contestant, results, truth, entry)
        if entry.refused is None:
            runs[contestant.name] = _Run(contestant, local)
        del results
        gc.collect()
        progress.checked(len(entries), len(contestants), entry)
    if runs:
        taken = interleaved(runs, rounds, warmups, lambda: dist.barrier(), progress.go_on)
        gathered: list[dict[str, list[Phases]] | None] = [None] * world_size
        dist.all_gather_object(gathered, taken)
        for entry in entries:
            if entry.refused is None:
                per_rank = [one[entry.name] for one in gathered if one is not None]
                entry.rounds = [list(phases) for phases in zip(*per_rank, strict=True)]
    groups.close()
    return entries


class _Progress:
    """What is said while it runs, and when to stop."""

    def __init__(self, rounds: int, warmups: int, limit_s: float, say: Callable[[str], object]) -> None:
        self.rounds, self.warmups, self.limit_s, self.say = rounds, warmups, limit_s, say
        self.started_s = self.round_began_s = time.perf_counter()

    def checked(self, count: int, of: int, entry: Entry) -> None:
        """After a contestant was checked and observed."""
        self.round_began_s = time.perf_counter()
        spent_s = self.round_began_s - self.started_s
        # A round is about as long as the checks: each contestant runs once in either.
        left_s = min(spent_s / count * (of - count + of * (self.warmups + self.rounds)), self.limit_s - spent_s)
        verdict = f"refused, {entry.refused}" if entry.refused else "exact"
        self.say(f"{spent_s:4.0f} s: checked {count} of {of}, {entry.name}: {verdict}; about {left_s:.0f} s to go")

    def go_on(self, counted: int) -> bool:
        """After a round: whether there is time for another. Rank 0 decides for all."""
        now_s = time.perf_counter()
        round_s, spent_s = now_s - self.round_began_s, now_s - self.started_s
        self.round_began_s = now_s
        fits = [counted < 1 or spent_s + round_s <= self.limit_s]
        dist.broadcast_object_list(fits, src=0)
        left_s = min(round_s * (self.rounds - counted), self.limit_s - spent_s) if fits[0] else 0.0
        which = f"round {counted} of {self.rounds}" if counted else "warm-up"
        end = f"about {left_s:.0f} s to go" if fits[0] else f"no further round fits into {self.limit_s:.0f} s"
        self.say(f"{spent_s:4.0f} s: {which}, {round_s:.1f} s; {end}")
        return fits[0]


class _Run:
    """One forward and backward of a contestant; the clock after each."""

    def __init__(self, contestant: Contestant, local: list[torch.Tensor]) -> None:
        self.contestant, self.local = contestant, local

    def __call__(self) -> tuple[float, float]:
        leaves = [x.detach().requires_grad_() for x in self.local[:3]]
        out = self.contestant.apply(*leaves)
        forward_end = time.perf_counter()
        out.backward(self.local[3])
        return forward_end, time.perf_counter()


def _observe(contestant: Contestant, local: list[torch.Tensor], entry: Entry) -> list[torch.Tensor]:
    """One observed forward and backward: local out, dq, dk, dv; counts of all ranks into the entry."""
    world_size = dist.get_world_size()
    leaves = [x.detach().requires_grad_() for x in local[:3]]
    with Observer() as seen:
        out = contestant.apply(*leaves)
        forward_sent = dict(seen.sent_bytes)
        out.backward(local[3])
    sent = dict(seen.sent_bytes)
    mine = Counts(
        seen.flops,
        seen.attention_calls,
        seen.attention_cpu_s,
        seen.peak_live_bytes,
        [forward_sent.get(peer, 0) for peer in range(world_size)],
        [sent.get(peer, 0) for peer in range(world_size)],
    )
    everyone: list[Counts | None] = [None] * world_size
    dist.all_gather_object(everyone, mine)
    entry.counts = [one for one in everyone if one is not None]
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


class _Truth:
    """out, dq, dk and dv of one device in float32 (float64 stays), and the error of the kernel in the input's dtype."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> None:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.exact = _one_device([x.to(wide) for x in (q, k, v, dout)])
        if q.dtype in (torch.float32, torch.float64):
            self.own_error = [torch.finfo(q.dtype).eps * 8] * 4
        else:
            one = _one_device([q, k, v, dout])
            self.own_error = [relative_error(a, b) for a, b in zip(one, self.exact, strict=True)]

    def error_multiple(self, results: list[torch.Tensor]) -> float:
        """Largest relative RMS error of the four over that of the one-device kernel."""
        found = [relative_error(a, b) for a, b in zip(results, self.exact, strict=True)]
        return max(error / own for error, own in zip(found, self.own_error, strict=True))


def _one_device(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in tensors[:3]]
    out, _ = flash_forward(*leaves, is_causal=True)
    out.backward(tensors[3].transpose(1, 2))
    return [x.transpose(1, 2) for x in (out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None))]


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """RMS of the difference over RMS of `exact`; infinite where a value is not finite."""
    difference = (value.to(exact.dtype) - exact).norm() / exact.norm()
    return float(difference) if torch.isfinite(difference) else float("inf")


def _check(contestant: Contestant, results: list[torch.Tensor], truth: _Truth | None, entry: Entry) -> None:
    """Put the whole tensors together on rank 0 and refuse, on every rank, a contestant whose result is wrong."""
    whole = []
    for part in results:
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())] if truth else None
        dist.gather(part, parts, dst=0)
        if parts is not None:
            whole.append(contestant.undispatch(parts))
    verdict: list[str | None] = [None]
    if truth is not None:
        entry.error_multiple = truth.error_multiple(whole)
        if not entry.error_multiple <= ERROR_MULTIPLE:
            verdict[0] = f"wrong result: {entry.error_multiple:.3g} times the one-device kernel's RMS error"
    dist.broadcast_object_list(verdict, src=0)
    entry.refused = verdict[0]
