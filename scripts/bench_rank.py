"""How close one rank comes to the kernel that it runs: its whole schedule, its peers replaced by local copies.

    python scripts/bench_rank.py [--tokens-per-rank 8192 32768] [--ring 8] [--heads 64] [--kv-heads 8] [--json FILE]
    python scripts/bench_rank.py --rivals     # and other people's rings, over the same kernel and the same copies
    python scripts/bench_rank.py --cpu        # small, on a CPU: shows that it runs, and nothing about a GPU

One GPU, one process, nothing to download; the rivals are those of requirements/bench.txt, which says how to install
them. With --rivals the last rank alone, heads 64:8 and 32:32; each rival is held to the right answer at a small shape
first. Exit code 3: no rival is here. What an efficiency is: benchmarks/rank_alone.py.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import rank_alone
from benchmarks.gpu.outcome import write_json
from benchmarks.local_copies import init_world_of_one
from benchmarks.rivals.flash_attn_stand_in import OnGpu
from benchmarks.rivals.interface import Shape
from benchmarks.rivals.ring_alone import error_of, rings
from benchmarks.timing import Timing
from megatron_loong.config import LoongConfig

RIVALS = {"heads": [64, 32], "kv_heads": [8, 32], "rounds": 3, "warmups": 1}
SMALL = {"tokens_per_rank": [64], "heads": [16], "kv_heads": [8], "head_dim": 16, "rounds": 3, "warmups": 1}
SMALL_RIVALS = {"heads": [16, 8], "kv_heads": [8, 8]}

#: Relative RMS errors of bfloat16 are about 0.003; of a wrong schedule, 1.
LARGEST_ERROR = 0.02


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cpu", action="store_true", help="on a CPU, with a small shape for whatever is not given")
    add("--tokens-per-rank", type=int, nargs="+", default=[8192, 32768])
    add("--ring", type=int, default=8, help="ring size")
    add("--head-parallel-size", type=int, default=1)
    add("--inner-ring-size", type=int, default=None, help="default: one ring")
    add("--heads", type=int, nargs="+", default=[64])
    add("--kv-heads", type=int, nargs="+", default=[8], help="as many numbers as for --heads")
    add("--head-dim", type=int, default=128)
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--kernel", default="auto")
    add("--rank", type=int, nargs="+", help="ring ranks to run; default: the first, the middle one and the last")
    add("--rivals", action="store_true", help="other people's rings too")
    add("--rounds", type=int, default=5)
    add("--warmups", type=int, default=2)
    add("--json", type=Path)
    small, rivals = ("--cpu" in sys.argv[1:]), ("--rivals" in sys.argv[1:])
    for wanted, defaults in ((rivals, RIVALS), (small, SMALL), (small and rivals, SMALL_RIVALS)):
        parser.set_defaults(**defaults if wanted else {})
    args = parser.parse_args()
    if len(args.heads) != len(args.kv_heads):
        parser.error(f"--heads has {len(args.heads)} numbers, --kv-heads {len(args.kv_heads)}; give as many")
    if args.rivals and args.head_parallel_size > 1:
        parser.error("--rivals are rings alone; leave --head-parallel-size out")
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
    if not args.rivals:
        return found, {}
    others, missing = rings(kernel)
    small = replace(shape, seq_len=128 * config.ring_size)
    bshd = [x.detach().transpose(0, 1).contiguous() for x in inputs]
    bshd = [x.requires_grad_() for x in bshd[:3]] + bshd[3:]
    for name, function in others.items():
        run = rank_alone.timed(function, bshd)
        try:
            error = error_of(function, small, ring_rank, config.ring_size, device)
            run()
        except Exception as raised:  # whatever another's code does not like here, the others are measured
            missing[name] = f"failed: {type(raised).__name__}: {raised}"
            continue
        print(f"  {name}: relative RMS error of out and dq {error:.1e}", flush=True)
        if not error <= LARGEST_ERROR:
            missing[name] = f"wrong: relative RMS error {error:.1e} > {LARGEST_ERROR}"
            continue
        found[f"{name} rank {ring_rank}"] = run, counts.flops  # zigzag is theirs too: the rank has the same tiles
    return found, missing


def measure(
    args: argparse.Namespace,
    tokens: int,
    heads: tuple[int, int],
    device: torch.device,
    record: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """One shape, into `record` and saved after each rank. A rank that fails leaves its traceback in `failed`."""
    config = LoongConfig(args.ring * args.head_parallel_size, args.head_parallel_size, args.inner_ring_size)
    ranks = config.context_parallel_size
    shape = Shape(tokens * ranks, *heads, args.head_dim, getattr(torch, args.dtype))
    kernel = rank_alone.chosen_kernel(shape, config.head_parallel_size, device, args.kernel)
    reference = rank_alone.kernel_alone(shape, ranks, device, kernel)
    rows, failed = [], {}
    record |= {"tokens_per_rank": tokens, "shape": shape.describe(), "layout": config.describe(), "kernel": kernel.name,
               "rounds": args.rounds, "results": rows, "left_out": {}, "failed": failed}  # fmt: skip
    print(f"{shape.describe()}, {config.describe()}, kernel {kernel.name}", flush=True)
    last = config.ring_size - 1
    for ring_rank in args.rank or sorted({last} if args.rivals else {0, config.ring_size // 2, last}):
        init_world_of_one(ring_rank, config.ring_size)
        print(f"  rank {ring_rank} ...", flush=True)
        try:
            runs, record["left_out"] = contestants(args, config, shape, device, ring_rank)
            copied = {name: stand_in_copies(run) for name, (run, _) in runs.items()}
            alone, found = rank_alone.efficiencies(runs, reference, args.rounds, args.warmups)
        except Exception:  # the other ranks and shapes are measured all the same
            failed[f"rank {ring_rank}"] = traceback.format_exc()
            print(failed[f"rank {ring_rank}"], flush=True)
            continue
        finally:
            dist.destroy_process_group()
            save()
        for one in found:
            rows.append(row_of(one, alone, reference[1], copied[one.name], device))
            print(line_of(rows[-1]), flush=True)
        record["worst_efficiency"] = min(row["efficiency"] for row in rows if row["name"].startswith("loong"))
        save()
    for name, reason in record["left_out"].items():
        print(f"  {name}: {reason}")
    print(f"  worst rank: {record.get('worst_efficiency', float('nan')):.3f}", flush=True)


def row_of(one: rank_alone.Efficiency, alone: Timing, alone_flops: int, copied: int, device: torch.device) -> dict:
    """One contestant in the record; `copied`: bytes moved by the stand-in for flash-attn."""
    taken_s, stand_in_s = one.timing.forward_backward_s, rank_alone.copy_s(copied, device) if copied else 0.0
    return {
        "name": one.name,
        "efficiency": one.efficiency,
        "forward_efficiency": one.forward_efficiency,
        "forward_s": one.timing.forward_s,
        "forward_backward_s": taken_s,
        "kernel_s": alone.forward_backward_s,
        "flops": one.flops,
        "tflops": one.flops / taken_s / 1e12,
        "kernel_tflops": alone_flops / alone.forward_backward_s / 1e12,
        "stand_in_bytes": copied,
        "stand_in_s": stand_in_s,
        "efficiency_without_stand_in": one.efficiency / (1 - stand_in_s / taken_s),
    }


def line_of(row: dict) -> str:
    """The same to read."""
    text = (
        f"  {row['name']:32} forward {row['forward_efficiency']:.3f}  forward + backward {row['efficiency']:.3f}"
        f"  ({row['forward_backward_s'] * 1e3:.2f} ms, {row['tflops']:.3g} TFLOP/s; "
        f"kernel alone {row['kernel_s'] * 1e3:.2f} ms, {row['kernel_tflops']:.3g} TFLOP/s)"
    )
    if row["stand_in_bytes"]:
        text += (
            f"\n    of it {row['stand_in_s'] * 1e3:.2f} ms for {row['stand_in_bytes'] / 1e9:.3g} GB of gradients "
            f"which the stand-in\n    copies and flash-attn would not: {row['efficiency_without_stand_in']:.3f}"
        )
    return text


def stand_in_copies(run: rank_alone.Contestant) -> int:
    """Bytes that the stand-in for flash-attn moves in a forward and backward, and flash-attn itself would not."""
    before = OnGpu.copied_bytes
    run()
    return OnGpu.copied_bytes - before


def main() -> int:
    """Measure every shape; 1 when a rank of one failed, 3 when rivals were asked for and none could run."""
    args = parse_arguments()
    device = torch.device("cpu" if args.cpu else "cuda")
    torch.manual_seed(0)
    name, shapes = "CPU" if args.cpu else torch.cuda.get_device_name(), list[dict[str, Any]]()
    record: dict[str, Any] = {"device": name, "torch": torch.__version__, "shapes": shapes}

    def save() -> None:
        if args.json:  # as it comes, for whoever stops it
            write_json(args.json, record)

    for tokens in args.tokens_per_rank:
        for heads in zip(args.heads, args.kv_heads, strict=True):
            shapes.append({})
            measure(args, tokens, heads, device, shapes[-1], save)
    if any(shape["failed"] for shape in shapes):
        return 1
    if args.rivals and all(row["name"].startswith("loong") for shape in shapes for row in shape["results"]):
        reasons = [f"{name}: {reason}" for name, reason in shapes[0]["left_out"].items()]
        record["reason"] = "no rival could run; " + "; ".join(reasons)
        print(record["reason"])
        save()
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
