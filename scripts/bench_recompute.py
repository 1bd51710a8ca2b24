r"""Time of a training step without recomputation, with full recomputation and with Selective Checkpoint++, interleaved.

    OMP_NUM_THREADS=1 python scripts/bench_recompute.py --ranks 2 --seq-len 8192 --json record.json

A transformer's layers (RMSNorm, grouped-query attention over a ring of ranks, SwiGLU) on the CPU over gloo. Every way
runs once a round, in an order that moves on by one each round; a ratio is taken round by round, and its median shown.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as full_checkpoint

from megatron_loong import LoongConfig, attention_2d, build_groups
from megatron_loong.recompute.selective import checkpoint as selective_checkpoint

HEADS, KV_HEADS, WIDTH = 4, 2, 64
HIDDEN, FFN = HEADS * WIDTH, 2 * HEADS * WIDTH


class Layer(torch.nn.Module):
    """One layer; tensors are [b, s, hidden]."""

    def __init__(self, groups: Any) -> None:
        super().__init__()
        self.groups = groups
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(HIDDEN) for _ in range(2))
        self.qkv = torch.nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * WIDTH, bias=False)
        self.proj = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.up = torch.nn.Linear(HIDDEN, 2 * FFN, bias=False)
        self.down = torch.nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (-1, WIDTH))
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=2)
        x = x + self.proj(attention_2d(q, k, v, self.groups).flatten(2))
        gate, up = self.up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


WAYS: dict[str, Callable[..., torch.Tensor]] = {
    "none": lambda layer, x: layer(x),
    "full": partial(full_checkpoint, use_reentrant=False),
    "selective": selective_checkpoint,
}


def step(layers: torch.nn.ModuleList, x: torch.Tensor, way: Callable[..., torch.Tensor]) -> tuple[float, float]:
    """Seconds of one forward and backward, from and to a barrier: on the clock, and of this rank's CPU."""
    dist.barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    h = x
    for layer in layers:
        h = way(layer, h)
    h.float().square().mean().backward()
    cpu_s = time.process_time() - cpu_start
    dist.barrier()
    return time.perf_counter() - start, cpu_s


def work(rank: int, args: argparse.Namespace, store: str) -> None:
    """One rank; rank 0 prints, and writes the record."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    groups = build_groups(LoongConfig(args.ranks), range(args.ranks))
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(Layer(groups) for _ in range(args.layers)).to(torch.bfloat16)
    x = torch.randn(1, args.seq_len // args.ranks, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    names = list(WAYS)
    for index in range(1 + args.rounds):  # the first round warms up
        for name in names[index % 3 :] + names[: index % 3]:
            taken = step(layers, x, WAYS[name])
            if index:
                times[name].append(taken)
    if rank == 0:
        report(times, args)
    groups.destroy()
    dist.destroy_process_group()


def report(times: dict[str, list[tuple[float, float]]], args: argparse.Namespace) -> None:
    """Medians, and ratios to full recomputation taken round by round."""
    record: dict[str, Any] = {"arguments": vars(args), "machine": f"{platform.machine()}, torch {torch.__version__}"}
    for index, clock in enumerate(("wall", "cpu")):
        taken = {name: [pair[index] for pair in pairs] for name, pairs in times.items()}
        medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
        by_round = {name: [a / b for a, b in zip(taken[name], taken["full"], strict=True)] for name in WAYS}
        ratios = {name: statistics.median(found) for name, found in by_round.items()}
        record[clock] = {"median_s": medians, "ratio_to_full": ratios, "rounds_s": taken}
        for name in WAYS:
            print(f"{clock:5} {name:10} {medians[name]:7.3f} s   {ratios[name]:.3f} of full")
    if args.json:
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("seq-len", 8192), ("layers", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", help="where the record goes")
    with tempfile.TemporaryDirectory() as folder:
        chosen = parser.parse_args()
        torch.multiprocessing.spawn(work, (chosen, f"{folder}/store"), nprocs=chosen.ranks)  # type: ignore[attr-defined]
