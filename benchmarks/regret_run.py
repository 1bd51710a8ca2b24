"""Every layout of some attentions measured on one network, and the network calibrated by the same processes.

Run it once per rank; scripts/measure_regret.py does so on emulated clusters. Each layout has its groups for the whole
run and is timed in interleaved rounds. Layouts that are far from the fastest drop out early, so that the rounds go to
those that could be the best; what was measured of them stays in the record.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.regret import HEAD_DIM, Case, Heads, Layout, Network, fastest, layouts_of
from benchmarks.rivals.interface import Shape
from benchmarks.timing import Phases, interleaved, whole_s
from megatron_loong.attention.attention_2d import attention_2d
from megatron_loong.calibration import command as calibrate
from megatron_loong.comm.groups import build_groups
from megatron_loong.comm.sequence import shard_sequence
from megatron_loong.config import LoongConfig
from megatron_loong.planner.hardware import Hardware, hardware_to_text
from megatron_loong.planner.profiles import hardware_from_mapping

#: (rounds, layouts slower than this many times the fastest drop out behind them); the first round is a warm-up.
STAGES = ((1, 3.0), (1, 1.6), (2, 1.3))


def main(argv: list[str] | None = None) -> int:
    """Calibrate unless the profile is there, measure the cases that are not, on every rank."""
    parser = argparse.ArgumentParser(prog="regret_run", description=__doc__)
    parser.add_argument("network", type=Network.parse, help="as the cluster was made, such as 2x4-1x400mbit")
    parser.add_argument("shapes", type=Heads.parse, nargs="+", help="sequence length-heads-KV heads, such as 4096-8-2")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=30.0, help="for the last rounds of a case (default 30)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    args.folder.mkdir(parents=True, exist_ok=True)
    hardware = profile(args.network, args.folder)
    for shape in args.shapes:
        case = Case(args.network, shape)
        path = args.folder / f"{case.name}.json"
        if path.exists():
            continue
        load_average = os.getloadavg()[0]
        rounds = measure(case, args.seconds)
        if dist.get_rank() == 0:
            path.write_text(json.dumps(record(case, hardware, rounds, load_average)) + "\n", encoding="utf-8")
            print(f"{case.name}: {len(rounds)} layouts, best {fastest(rounds).words}", flush=True)
        dist.barrier()
    dist.destroy_process_group()
    return 0


def profile(network: Network, folder: Path) -> Hardware:
    """The calibrated profile of this network, measured once."""
    path = folder / f"{network.name}.profile.json"
    if path.exists():
        return hardware_from_mapping(json.loads(path.read_text(encoding="utf-8")), str(path))
    words = ["--output", str(path), "--name", network.name, "--nics-per-node", str(network.nics_per_node)]
    words += ["--nic-order", "cyclic", "--heads", "2", "--head-dim", str(HEAD_DIM), "--seconds", "0.4"]
    words += ["--lengths", "128", "256", "512", "1024", "2048", "4096"]
    hardware = calibrate.measure(calibrate.parser().parse_args(words))
    if dist.get_rank() == 0:
        path.write_text(hardware_to_text(hardware), encoding="utf-8")
    dist.barrier()
    return hardware


class _Run:
    """Forward and backward of one layout; the clock after each. Its groups live until it is released."""

    def __init__(self, config: LoongConfig, whole: list[torch.Tensor]) -> None:
        self.groups = build_groups(config, range(dist.get_world_size()))
        self.local = [shard_sequence(x, self.groups, dim=1) for x in whole]

    def __call__(self) -> tuple[float, float]:
        q, k, v = (x.detach().requires_grad_() for x in self.local[:3])
        out = attention_2d(q, k, v, self.groups, qkv_format="bshd", causal=True)
        forward_end = time.perf_counter()
        out.backward(self.local[3])
        return forward_end, time.perf_counter()


def measure(case: Case, seconds: float) -> dict[Layout, list[float]]:
    """Seconds of the slowest rank's forward and backward, by layout and round; the warm-up is not among them.

    gloo gives each group a thread that polls, so layouts that drop out give up theirs.
    """
    whole = Shape(*case.shape, HEAD_DIM, torch.bfloat16).inputs()
    runs = {Layout.of(config): _Run(config, whole) for config in layouts_of(case)}
    best = dict.fromkeys(runs, math.inf)
    next(iter(runs.values()))()  # the first call of all pays for what every later one finds done
    taken: dict[Layout, list[float]] = {layout: [] for layout in runs}
    for index, (rounds, factor) in enumerate([*STAGES, (0, math.inf)]):
        rounds = rounds or _rounds_within(seconds, [best[layout] for layout in runs])
        for layout, times in _rounds(runs, rounds).items():
            taken[layout] = taken[layout] + times if index > 1 else times
            best[layout] = min(times)
        for layout in [x for x in runs if best[x] > factor * min(best[y] for y in runs)]:
            runs.pop(layout).groups.destroy()
    for run in runs.values():
        run.groups.destroy()
    return taken


def _rounds(runs: dict[Layout, _Run], rounds: int) -> dict[Layout, list[float]]:
    """By layout: the slowest rank's time of every round, the same on every rank."""
    named = {repr(layout): run for layout, run in runs.items()}
    mine = interleaved(named, rounds, 0, lambda: dist.barrier())
    everyone: list[dict[str, list[Phases]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return {x: whole_s(list(zip(*(one[repr(x)] for one in everyone), strict=True))) for x in runs}


def _rounds_within(seconds: float, one_round: list[float]) -> int:
    return max(3, min(40, int(seconds / sum(one_round))))


def record(case: Case, hardware: Hardware, rounds: dict[Layout, list[float]], load_average: float) -> dict[str, Any]:
    """One case, ready for JSON."""
    return {
        "network": case.network.name,
        "shape": list(case.shape),
        "load_average": round(load_average, 1),
        "conditions": f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}",
        "rounds_s": [[*layout, [round(s, 4) for s in times]] for layout, times in rounds.items()],
        "profile": json.loads(hardware_to_text(hardware)),
    }


if __name__ == "__main__":
    sys.exit(main())
