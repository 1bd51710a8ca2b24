#!/usr/bin/env python3
"""Draw one forward and backward of `attention_2d` on every rank: tiles, messages under way, waits. Run once per rank:

sudo scripts/emulate_cluster.sh 2 4 --nic 400mbit -- python scripts/bench_timeline.py --head-parallel-size 4 \\
    --picture runs/bench/timeline.png
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.rivals.interface import GroupCache, Shape
from benchmarks.rivals.ours import Loong
from benchmarks.timeline import Event, record_timeline, shares
from megatron_loong.config import LoongConfig

COLOURS = {"head": "#2e8b57", "inner": "#1f4e79", "outer": "#f2a154", "inner_dkv": "#6fa8dc", "outer_dkv": "#c27c0e"}
TILE = {"forward": "#c9d3dc", "backward": "#8b9aa7"}
WAIT = "#b03a2e"


def draw(ranks: list[tuple[list[Event], float, float, float]], title: str, picture: Path) -> None:
    """One lane a rank: tiles and waits as bars, below them a line for each message under way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(figsize=(12, 0.75 * len(ranks) + 1.4), layout="constrained")
    origin = min(start for _, start, _, _ in ranks)
    names = list(COLOURS)
    for lane, (events, start, middle, end) in enumerate(ranks):
        for kind, label, event_start, event_end in events:
            left, width = 1e3 * (event_start - origin), 1e3 * (event_end - event_start)
            if kind == "tile":
                axes.barh(lane - 0.2, width, 0.36, left, color=TILE[label], edgecolor="white", linewidth=0.4)
            elif kind == "wait":
                axes.barh(lane - 0.2, width, 0.36, left, color=WAIT)
            else:
                name = label.removeprefix("loong_")
                height = lane + 0.06 + 0.09 * names.index(name)
                axes.plot([left, left + width], [height, height], color=COLOURS[name], linewidth=2)
        for moment in (start, middle, end):
            axes.plot([1e3 * (moment - origin)] * 2, [lane - 0.45, lane + 0.48], color="black", linewidth=0.7)
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))])
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    keys = [Patch(color=TILE["forward"], label="tile, forward"), Patch(color=TILE["backward"], label="tile, backward")]
    keys += [Patch(color=WAIT, label="waiting")]
    keys += [Patch(color=colour, label=f"under way: {name}") for name, colour in COLOURS.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-parallel-size", type=int, default=1)
    parser.add_argument("--inner-ring-size", type=int)
    parser.add_argument("--placement", default="head_first")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--picture", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shape = Shape(args.seq_len, args.heads, args.kv_heads, args.head_dim, torch.bfloat16)
    config = LoongConfig(world_size, args.head_parallel_size, args.inner_ring_size, args.placement)
    ours = Loong(config)
    ours.set_up(GroupCache(world_size), shape)
    q, k, v, dout = (ours.dispatch(x, rank) for x in shape.inputs())
    mine: tuple[list[Event], float, float, float] = ([], 0.0, 0.0, 0.0)
    for _ in range(3):  # the last one counts
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        dist.barrier()
        with record_timeline() as events:
            start = time.perf_counter()
            out = ours.apply(*leaves)
            middle = time.perf_counter()
            out.backward(dout)
            mine = (events, start, middle, time.perf_counter())
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, mine)
    if rank == 0:
        draw(everyone, f"{config.describe()}; {shape.describe()}", args.picture)
        for index, (events, start, _, end) in enumerate(everyone):
            parts = ", ".join(f"{name} {part:.0%}" for name, part in shares(events, start, end).items())
            print(f"rank {index}: {1e3 * (end - start):.0f} ms: {parts}")
        print(f"picture: {args.picture}")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
