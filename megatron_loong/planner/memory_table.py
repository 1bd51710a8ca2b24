"""`python -m megatron_loong memory`: the switches one after another, what each leaves, and the longest sequence."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from megatron_loong.config import divisors
from megatron_loong.planner.fit import host_bytes
from megatron_loong.planner.memory import MemoryPlan, MemoryReport, peak
from megatron_loong.planner.model import MODELS, ModelShape, model_from
from megatron_loong.planner.units import length, tokens

#: The order in which a user would turn them on: what costs least time first. Each adds to those above it.
STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("full recomputation", {}),
    ("+ --loong-tiled-loss", {"tiled_loss": 1024}),
    ("+ --loong-tiled-mlp", {"tiled_mlp": 64}),
    ("+ --loong-offload-activations", {"offload_activations": True}),
    ("+ --optimizer-cpu-offload", {"offload_optimizer": True}),
    ("+ --grad-reduce-in-bf16", {"gradient_bytes": 2}),
)
#: What `--zero` assumes to be spread over the context-parallel ranks, and Megatron's means for it.
ZERO = (
    "nothing is spread, every rank holds all states (--zero 3: all are spread)",
    "optimizer states are spread over the CP ranks (ZeRO-1: --use-distributed-optimizer)",
    "gradients and optimizer states are spread over the CP ranks (ZeRO-2: Megatron-FSDP, optim_grads)",
    "parameters, gradients and optimizer states are spread over the CP ranks (ZeRO-3: Megatron-FSDP; --zero 1: the "
    "distributed optimizer alone)",
)
SELECTIVE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Selective Checkpoint++", {"selective_checkpoint": "ring"}),
    ("  and --loong-offload-attention", {"selective_checkpoint": "ring", "offload_attention": True}),
)


def main(argv: list[str]) -> int:
    """Print the table; return an exit code. 2: the command line was wrong, and stderr says how."""
    args = _parser().parse_args(argv)
    try:
        print(table(args))
    except ValueError as error:
        print(f"megatron_loong: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-loong memory", description="The longest sequence that fits, switch by switch."
    )
    parser.add_argument("--model", default="llama3-8b", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that train one copy of the model")
    parser.add_argument("--gpu-memory-gb", type=float, default=80.0, help="of one GPU, 1e9 bytes each")
    parser.add_argument(
        "--reserve-gb",
        type=float,
        default=5.0,
        help="taken off: CUDA context, NCCL and cuBLAS buffers, fragmentation (not modelled)",
    )
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--loong-head-parallel-size", type=int, default=None, help="default: most that the heads allow")
    parser.add_argument("--loong-inner-ring-size", type=int, default=None)
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=3, help="states spread over all CP ranks")
    parser.add_argument(
        "--seq-length", type=tokens, metavar="TOKENS", help="show the terms of this length instead; such as 64K or 1M"
    )
    return parser


def table(args: argparse.Namespace) -> str:
    """The text that the command prints."""
    model = model_from(args.model, {})
    budget = int((args.gpu_memory_gb - args.reserve_gb) * 1e9)
    if budget <= 0:
        raise ValueError(f"--gpu-memory-gb {args.gpu_memory_gb} leaves nothing after --reserve-gb {args.reserve_gb}")
    plan = _plan(args, model)
    head = (
        f"{args.model} on {args.gpus} GPU(s) of {args.gpu_memory_gb:g} GB, of which {budget / 1e9:.1f} GB are counted "
        f"on; CP {plan.context_parallel_size} (head parallel {plan.head_parallel_size}), "
        f"TP {plan.tensor_parallel_size}, PP {plan.pipeline_parallel_size}. MODELLED, not measured.\n"
        f"Assumed: {ZERO[args.zero]}. All figures are GB (1e9 bytes) of one GPU, or of host memory for each GPU."
    )
    rows = [(name, dataclasses.replace(plan, **changes)) for name, changes in _cumulative()]
    if args.seq_length:
        rows = [(name, dataclasses.replace(row, seq_len=args.seq_length)) for name, row in rows]
        lines = [_terms(name, peak(model, row), host_bytes(model, row)) for name, row in rows]
        return "\n".join([head, f"the peak of one rank at --seq-length {length(args.seq_length)}", *lines])
    lines = [f"{'switches':48} {'longest sequence':>16} {'host':>7}   what fills the GPU"]
    for name, row in rows:
        found = longest_sequence(model, row, budget)
        if found is None:
            least = peak(model, dataclasses.replace(row, seq_len=1024 * row.context_parallel_size))
            lines.append(f"{name:48} {'none':>16} {'-':>7}   {_largest(least)}: {least.peak_bytes / 1e9:.0f}")
        else:
            seq_len, report = found
            host = host_bytes(model, dataclasses.replace(row, seq_len=seq_len))
            lines.append(
                f"{name:48} {length(seq_len):>16} {f'{host / 1e9:.0f}' if host else '-':>7}   {_largest(report)}"
            )
    return "\n".join([head, *lines])


def longest_sequence(
    model: ModelShape, plan: MemoryPlan, memory_bytes: int, *, multiple: int | None = None
) -> tuple[int, MemoryReport] | None:
    """The longest sequence whose peak is at most `memory_bytes`, in steps of `multiple` tokens; None if none fits."""
    step = multiple or 1024 * plan.context_parallel_size

    def at(steps: int) -> MemoryReport:
        return peak(model, dataclasses.replace(plan, seq_len=steps * step))

    if at(1).peak_bytes > memory_bytes:
        return None
    low, high = 1, 2
    while at(high).peak_bytes <= memory_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle).peak_bytes <= memory_bytes else (low, middle)
    return low * step, at(low)


def _cumulative() -> list[tuple[str, dict[str, Any]]]:
    """Every step with all steps before it, and Selective Checkpoint++ on top of the first and of the last."""
    changes: dict[str, Any] = {}
    rows = []
    for name, change in STEPS:
        changes = changes | change
        rows.append((name, changes))
    first, last = rows[0][1], rows[-1][1]
    rows += [(f"full recomputation, {name.strip()}", first | change) for name, change in SELECTIVE[:1]]
    rows += [(f"all of the above, {name.strip()}", last | change) for name, change in SELECTIVE]
    return rows


def _plan(args: argparse.Namespace, model: ModelShape) -> MemoryPlan:
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if min(args.gpus, tp, pp) < 1 or args.gpus % (tp * pp):
        raise ValueError(
            f"--gpus {args.gpus} is not a multiple of --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp}; all three are at least 1"
        )
    if model.num_attention_heads % tp:
        raise ValueError(
            f"--tensor-model-parallel-size {tp} does not divide the {model.num_attention_heads} heads of {args.model}; "
            f"try one of {divisors(model.num_attention_heads)}"
        )
    cp = args.gpus // (tp * pp)
    heads = model.num_attention_heads // tp
    _check_divides("--loong-head-parallel-size", args.loong_head_parallel_size, cp, "--gpus / (TP x PP)")
    fitting = [hp for hp in range(1, min(cp, 8) + 1) if cp % hp == 0 and heads % hp == 0]
    hp = args.loong_head_parallel_size or fitting[-1]
    _check_divides("--loong-inner-ring-size", args.loong_inner_ring_size, cp // hp, "the ring, CP / head parallel,")
    return MemoryPlan(
        seq_len=1024 * cp,
        context_parallel_size=cp,
        head_parallel_size=hp,
        inner_ring_size=args.loong_inner_ring_size,
        tensor_parallel_size=tp,
        sequence_parallel=tp > 1,
        pipeline_parallel_size=pp,
        zero_optimizer_size=cp if args.zero >= 1 else 1,
        zero_grad_size=cp if args.zero >= 2 else 1,
        zero_param_size=cp if args.zero >= 3 else 1,
    )


def _check_divides(flag: str, size: int | None, whole: int, words: str) -> None:
    if size is not None and (size < 1 or whole % size):
        raise ValueError(f"{flag} {size} does not divide {words} of {whole}; try one of {divisors(whole)}")


def _largest(report: MemoryReport) -> str:
    """The terms above a twentieth of the whole, largest first."""
    ordered = sorted(report.terms.items(), key=lambda item: -item[1])
    shown = [(name, size) for name, size in ordered if size * 20 > report.peak_bytes]
    return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in shown)


def _terms(name: str, report: MemoryReport, host: int) -> str:
    shown = {**report.terms, "(in host memory)": host} if host else report.terms
    rows = [f"  {term:28} {size / 1e9:9.3f}" for term, size in shown.items()]
    return "\n".join([f"{name}: {report.peak_bytes / 1e9:.3f} GB", *rows])
