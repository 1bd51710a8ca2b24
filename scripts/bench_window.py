"""Sliding windows in the ring: what falls with the window. Bytes and pairs are counted, times are medians of rounds.

usage: torchrun --nproc-per-node 4 scripts/bench_window.py [--seq-len 8192] [--rounds 10] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_loong import LoongConfig, attention_2d, build_groups, shard_sequence
from megatron_loong.comm.groups import LoongGroups
from megatron_loong.comm.ledger import count_bytes
from megatron_loong.schedule.tiles import Mask

HEADS, KV_HEADS, WIDTH = 8, 2, 64


def once(groups: LoongGroups, leaves: list[torch.Tensor], dout: torch.Tensor, seq_len: int, window: int) -> None:
    """One forward and backward; a window of `seq_len` is none."""
    size = None if window >= seq_len else (window, 0)
    out = attention_2d(leaves[0], leaves[1], leaves[2], groups, window_size=size, seq_len=seq_len)
    torch.autograd.grad(out, leaves, dout)


def main() -> None:
    """Run all windows once a round, and print the table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    ranks, seq_len = dist.get_world_size(), args.seq_len
    windows = [seq_len, *(seq_len // 4**i for i in range(1, 5))]
    torch.manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, seq_len, n, WIDTH, dtype=torch.bfloat16) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    groups = build_groups(LoongConfig(ranks), range(ranks))
    leaves = [shard_sequence(x, groups).requires_grad_() for x in (q, k, v)]
    dout = shard_sequence(dout, groups)
    sent, seconds = {}, {window: [] for window in windows}
    for window in windows:
        with count_bytes() as ledger:
            once(groups, leaves, dout, seq_len, window)
        sent[window] = ledger.total_bytes
    for _ in range(args.rounds):
        for window in windows:
            dist.barrier()
            start = time.perf_counter()
            once(groups, leaves, dout, seq_len, window)
            slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            seconds[window].append(slowest.item())
    totals = torch.tensor([sent[window] for window in windows])
    dist.all_reduce(totals)
    if dist.get_rank() == 0:
        rows = []
        for window, total in zip(windows, totals.tolist(), strict=True):
            mask = Mask(None if window >= seq_len else window, 0)
            of_full = [a / b for a, b in zip(seconds[window], seconds[seq_len], strict=True)]
            rows.append(
                {
                    "window": None if window >= seq_len else window,
                    "pairs_of_causal": mask.pairs(seq_len, seq_len) / Mask(None, 0).pairs(seq_len, seq_len),
                    "sent_mib": total / 2**20,
                    "median_ms": 1e3 * statistics.median(seconds[window]),
                    "median_of_ratios": statistics.median(of_full),
                }
            )
        print("| window | pairs, of causal | sent, all ranks, MiB | forward + backward, ms | of causal |")
        print("|---|---|---|---|---|")
        for row in rows:
            print(
                f"| {row['window'] or 'none'} | {row['pairs_of_causal']:.3f} | {row['sent_mib']:.2f} "
                f"| {row['median_ms']:.0f} | {row['median_of_ratios']:.2f} |"
            )
        if args.json:
            record = {
                "ranks": ranks,
                "seq_len": seq_len,
                "torch": torch.__version__,
                "rounds": args.rounds,
                "rows": rows,
            }
            args.json.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    groups.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
