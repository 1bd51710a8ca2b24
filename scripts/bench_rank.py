"""How close one rank comes to the kernel that it runs: its whole schedule, its peers replaced by local copies.

    python scripts/bench_rank.py [--tokens-per-rank 8192 32768] [--ring 8] [--heads 64] [--kv-heads 8] [--json FILE]
    python scripts/bench_rank.py --cpu        # small, on a CPU: shows that it runs, and nothing about a GPU

Beside it other people's rings under the same copies, where they are installed. One GPU, one process, nothing to
download. What an efficiency is: megatron_loong/bench/rank_alone.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_loong.bench import rank_alone
from megatron_loong.bench.local_copies import init_world_of_one
from megatron_loong.bench.rivals.interface import Shape
from megatron_loong.bench.rivals.ring_alone import rings
from megatron_loong.config import LoongConfig

SMALL = {"tokens_per_rank": [64], "heads": 16, "kv_heads": 8, "head_dim": 16, "rounds": 3, "warmups": 1}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cpu", action="store_true", help="on a CPU, with a small shape for whatever is not given")
    add("--tokens-per-rank", type=int, nargs="+", default=[8192, 32768])
    add("--ring", type=int, default=8, help="ring size")
    add("--head-parallel-size", type=int, default=1)
    add("--inner-ring-size", type=int, default=None, help="default: one ring")
    add("--heads", type=int, default=64)
    add("--kv-heads", type=int, default=8)
    add("--head-dim", type=int, default=128)
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--kernel", default="auto")
    add("--rank", type=int, nargs="+", help="ring ranks to run; default: the first, the middle one and the last")
    add("--rounds", type=int, default=5)
    add("--warmups", type=int, default=2)
    add("--json", type=Path)
    if "--cpu" in sys.argv[1:]:
        parser.set_defaults(**SMALL)
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        parser.error("no CUDA device here; --cpu runs a small shape on a CPU")
    return args


def contestants(
    args: argparse.Namespace, config: LoongConfig, shape: Shape, device: torch.device, ring_rank: int
) -> tuple[dict[str, tuple[rank_alone.Contestant, int]], dict[str, str]]:
    """(run, FLOPs) by name for one ring rank, and who is left out why."""
    kernel = rank_alone.chosen_kernel(shape, config.head_parallel_size, device, args.kernel)
    cp_rank = ring_rank * config.head_parallel_size
    counts = rank_alone.count(config, cp_rank, shape, device, kernel.name)
    inputs = rank_alone.rank_inputs(shape, config.context_parallel_size, device)
    mine = rank_alone.timed(rank_alone.our_rank(config, cp_rank, shape, kernel), inputs)
    found = {f"loong rank {ring_rank}": (mine, counts.flops)}
    if config.head_parallel_size > 1:
        return found, {"other rings": "they are rings alone; ask for --head-parallel-size 1"}
    others, missing = rings()
    bshd = [x.detach().transpose(0, 1).contiguous() for x in inputs]
    bshd = [x.requires_grad_() for x in bshd[:3]] + bshd[3:]
    for name, function in others.items():
        run = rank_alone.timed(function, bshd)
        try:
            run()
        except Exception as error:  # whatever another's code does not like here, the others are measured
            missing[name] = f"failed: {type(error).__name__}: {error}"
            continue
        found[f"{name} rank {ring_rank}"] = run, counts.flops  # zigzag is theirs too: the rank has the same tiles
    return found, missing


def measure(args: argparse.Namespace, tokens: int, device: torch.device) -> dict:
    """One shape as a record."""
    config = LoongConfig(args.ring * args.head_parallel_size, args.head_parallel_size, args.inner_ring_size)
    ranks = config.context_parallel_size
    shape = Shape(tokens * ranks, args.heads, args.kv_heads, args.head_dim, getattr(torch, args.dtype))
    kernel = rank_alone.chosen_kernel(shape, config.head_parallel_size, device, args.kernel)
    reference = rank_alone.kernel_alone(shape, ranks, device, kernel)
    rows, left_out = [], {}
    print(f"{shape.describe()}, {config.describe()}, kernel {kernel.name}")
    for ring_rank in args.rank or sorted({0, config.ring_size // 2, config.ring_size - 1}):
        init_world_of_one(ring_rank, config.ring_size)
        try:
            runs, left_out = contestants(args, config, shape, device, ring_rank)
            alone, found = rank_alone.efficiencies(runs, reference, args.rounds, args.warmups)
        finally:
            dist.destroy_process_group()
        for one in found:
            print(
                f"  {one.name:32} forward {one.forward_efficiency:.3f}  forward + backward {one.efficiency:.3f}"
                f"  ({one.timing.forward_backward_s * 1e3:.2f} ms; kernel alone {alone.forward_backward_s * 1e3:.2f})"
            )
            rows.append({"name": one.name, "efficiency": one.efficiency, "forward_efficiency": one.forward_efficiency,
                         "forward_s": one.timing.forward_s, "forward_backward_s": one.timing.forward_backward_s,
                         "kernel_s": alone.forward_backward_s, "flops": one.flops})  # fmt: skip
    for name, reason in left_out.items():
        print(f"  {name}: {reason}")
    worst = min(row["efficiency"] for row in rows if row["name"].startswith("loong"))
    print(f"  worst rank: {worst:.3f}")
    return {"tokens_per_rank": tokens, "shape": shape.describe(), "layout": config.describe(), "kernel": kernel.name,
            "rounds": args.rounds, "worst_efficiency": worst, "results": rows, "left_out": left_out}  # fmt: skip


def main() -> None:
    args = parse_arguments()
    device = torch.device("cpu" if args.cpu else "cuda")
    torch.manual_seed(0)
    shapes = [measure(args, tokens, device) for tokens in args.tokens_per_rank]
    if args.json:
        name = "CPU" if args.cpu else torch.cuda.get_device_name()
        record = {"device": name, "torch": torch.__version__, "shapes": shapes}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
