#!/usr/bin/env python3
"""Attention over ranks: megatron_loong in every layout against every rival that runs here. Run it once per rank:

torchrun --nproc-per-node 8 scripts/bench_attention.py
torchrun --nproc-per-node 8 scripts/bench_attention.py --seq-len 4096 --rounds 10 --json runs/bench/mha.json
sudo scripts/emulate_cluster.sh 2 4 --nic 400mbit -- python scripts/bench_attention.py --seq-len 4096 --rounds 10

The first ends in about two minutes on any machine: 2048 tokens, and as many rounds, up to 10, as fit. With --rounds it
runs as many as that, however long they take; a line per contestant and per round says how long.

The rivals come from requirements/bench.txt, installed beside the environment so that they bring no other PyTorch:
pip install --no-deps --target runs/rivals -r requirements/bench.txt; export PYTHONPATH=runs/rivals
InternEvo's double ring is in no release: export INTERNEVO_PATH=(a checkout of InternEvo).
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.compare import compare
from benchmarks.report import conditions, make_record, markdown
from benchmarks.rivals.interface import Shape
from benchmarks.rivals.registry import all_contestants, choose

#: Without --rounds. The limit leaves some of two minutes for starting and for the report.
DEFAULT_ROUNDS, DEFAULT_LIMIT_S = 10, 100.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=2048, help="global sequence length; default 2048")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="default: as many as --heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32", "float64"], default="bfloat16")
    parser.add_argument("--rounds", type=int, help="default: as many, up to 10, as fit into two minutes")
    parser.add_argument("--warmups", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names, with wildcards; see --list")
    parser.add_argument("--list", type=int, metavar="RANKS", help="print the contestants for so many ranks and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where rank 0 writes the record")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.list:
        print("\n".join(one.name for one in all_contestants(args.list)))
        return 0
    if "RANK" not in os.environ:
        print("run it under torchrun or scripts/emulate_cluster.sh; see --help", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    kv_heads = args.kv_heads or args.heads
    shape = Shape(args.seq_len, args.heads, kv_heads, args.head_dim, getattr(torch, args.dtype))
    try:
        contestants, left_out = choose(world_size, shape, args.only)
    except ValueError as error:
        print(error if rank == 0 else "", file=sys.stderr)
        return 2
    load_average = os.getloadavg()[0]
    # Ranks of one machine talk by loopback; on an emulated cluster the interface is set already.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))
    rounds, limit_s = (args.rounds, math.inf) if args.rounds else (DEFAULT_ROUNDS, DEFAULT_LIMIT_S)
    say = partial(print, file=sys.stderr, flush=True)
    entries = compare(contestants, shape, rounds, args.warmups, limit_s, say)
    if rank == 0:
        cluster = json.loads(os.environ.get("LOONG_EMULATED_CLUSTER", "null"))
        facts = conditions(max((len(entry.rounds) for entry in entries), default=0), args.warmups, load_average)
        record = make_record(entries, left_out, shape, cluster, facts)
        print(f"\n{record['shape']}, {world_size} ranks, load average {load_average:.1f}\n\n{markdown(record)}")
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
