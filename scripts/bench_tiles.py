#!/usr/bin/env python3
"""Speed of the CPU attention operator by tile shape, one thread: what a ring loses by its smaller tiles.

OMP_NUM_THREADS=1 python scripts/bench_tiles.py --lengths 256 512 1024
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.flops import attention_flops
from megatron_loong.kernels.cpu_flash import flash_backward, flash_forward


def least_cpu_s(run: Callable[[], object], repeats: int = 5) -> float:
    """CPU time of the fastest of some runs, after one that does not count."""
    run()
    taken = []
    for _ in range(repeats):
        started = time.thread_time()
        run()
        taken.append(time.thread_time() - started)
    return min(taken)


def speeds(query_len: int, kv_len: int, causal: bool, heads: int, head_dim: int, dtype: torch.dtype) -> list[float]:
    """Operations per second of forward and of backward; those that a causal mask makes useless do not count."""
    lengths = (query_len, kv_len, kv_len)
    q, k, v = (torch.randn(1, heads, length, head_dim).to(dtype) for length in lengths)
    out, lse = flash_forward(q, k, v, is_causal=causal)
    dout = torch.randn_like(out)
    taken = (
        least_cpu_s(lambda: flash_forward(q, k, v, is_causal=causal)),
        least_cpu_s(lambda: flash_backward(dout, q, k, v, out, lse=lse, is_causal=causal)),
    )
    flops = (
        attention_flops(1, heads, head_dim, query_len, kv_len, causal=causal, backward=backward)
        for backward in (False, True)
    )
    return [work / seconds for work, seconds in zip(flops, taken, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32", "float64"], default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)

    def cell(query_len: int, kv_len: int, causal: bool = False) -> str:
        forward, backward = speeds(query_len, kv_len, causal, args.heads, args.head_dim, dtype)
        return f"{forward / 1e9:.0f} / {backward / 1e9:.0f}"

    print(f"GFLOP/s forward / backward, {args.heads} heads, d {args.head_dim}, {args.dtype}; rows q, columns kv\n")
    print("| | " + " | ".join(map(str, args.lengths)) + " | causal |\n|" + "---|" * (len(args.lengths) + 2))
    for query_len in args.lengths:
        cells = [cell(query_len, kv_len) for kv_len in args.lengths]
        print(f"| {query_len} | " + " | ".join([*cells, cell(query_len, query_len, causal=True)]) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
