"""`megatron-loong plan`: which flags, why, and what to expect. Runs on a login node, without torch."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from megatron_loong.planner.candidate import RECOMPUTE, Limits, Workload
from megatron_loong.planner.hardware import Hardware
from megatron_loong.planner.model import MODELS, ModelShape, model_from
from megatron_loong.planner.nearest import what_fits
from megatron_loong.planner.profiles import PROFILES, load_hardware
from megatron_loong.planner.report import as_json, as_text
from megatron_loong.planner.search import Outcome, any_fits, search
from megatron_loong.planner.units import tokens

_MODEL_FIELDS = [f for f in dataclasses.fields(ModelShape) if f.name != "gated"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megatron-loong plan",
        description="Choose parallel sizes, the layout of the attention and recomputation for a training job.",
    )
    add = parser.add_argument
    add(
        "--hardware", required=True, help=f"{', '.join(PROFILES)}, or a YAML file (megatron-loong calibrate writes one)"
    )
    add("--gpus", type=int, required=True)
    add("--nics-per-node", type=int, help="instead of the profile's")
    add("--nic-gbit", type=float, metavar="GBIT_PER_S", help="line rate of one NIC, instead of the profile's")
    add("--seq-length", type=tokens, required=True, metavar="TOKENS", help="such as 131072, 128K or 1M")
    add("--global-batch-size", type=int, required=True, metavar="SEQUENCES")
    add("--micro-batch-size", type=int, default=1)
    model = parser.add_argument_group("the model: a name, sizes as Megatron's flags, or a name and what differs")
    model.add_argument("--model", help=", ".join(MODELS))
    for field in _MODEL_FIELDS:
        form: dict[str, Any] = {"type": float if isinstance(field.default, float) else int}
        if isinstance(field.default, bool):
            form = {"action": argparse.BooleanOptionalAction, "default": None}
        model.add_argument("--" + field.name.replace("_", "-"), **form)
    model.add_argument("--no-gated-mlp", action="store_true", help="two matrices in the MLP instead of SwiGLU's three")
    fixed = parser.add_argument_group("what is decided already")
    fixed.add_argument("--tensor-model-parallel-size", type=int, dest="tensor")
    fixed.add_argument("--pipeline-model-parallel-size", type=int, dest="pipeline")
    fixed.add_argument("--context-parallel-size", type=int, dest="context")
    fixed.add_argument("--expert-model-parallel-size", type=int, dest="expert")
    fixed.add_argument("--loong-head-parallel-size", type=int, dest="head_parallel")
    fixed.add_argument("--recompute", choices=RECOMPUTE)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="for programs; `megatron-loong sbatch --plan` reads it")
    output.add_argument("--sbatch", type=Path, metavar="FILE", help="write a Slurm script that trains by the plan")
    output.add_argument("--script", default="pretrain_gpt.py", help="what it runs (default pretrain_gpt.py)")
    output.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw the plan (needs matplotlib)")
    return parser


def main(argv: list[str]) -> int:
    """Plan and print. 1: nothing fits the memory. 2: what was asked for cannot be."""
    args = parser().parse_args(argv)
    try:
        hardware = _hardware(args)
        work = Workload(_model(args), args.gpus, args.seq_length, args.global_batch_size, args.micro_batch_size)
        limits = Limits(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Limits)})
        outcome = search(work, hardware, limits=limits)
    except ValueError as error:
        print(f"megatron_loong: {error}", file=sys.stderr)
        return 2
    if not outcome.plans:
        need, there = outcome.smallest_bytes / 2**30, hardware.memory_bytes / 2**30
        lines = what_fits(work, lambda other: any_fits(other, hardware, limits))
        print(
            f"megatron_loong: nothing fits: the leanest of {outcome.effort.candidates} plans needs {need:.1f} GiB "
            f"a GPU, and {hardware.name} has {there:.0f}; change one of these:",
            *(lines or ["--model: no number of GPUs or length that was tried fits"]),
            sep="\n  ",
            file=sys.stderr,
        )
        return 1
    if args.json:
        print(json.dumps(as_json(outcome, work, hardware), indent=2))
    else:
        print(as_text(outcome, work, hardware))
    try:
        written = [*_draw(outcome, work, hardware, args.pictures), *_write_sbatch(outcome, work, hardware, args)]
    except ValueError as error:
        print(f"megatron_loong: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    return 0


def _draw(outcome: Outcome, work: Workload, hardware: Hardware, folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    from megatron_loong.planner.pictures import draw_plan

    return draw_plan(outcome.plans[0], work, hardware, folder)


def _write_sbatch(outcome: Outcome, work: Workload, hardware: Hardware, args: argparse.Namespace) -> list[Path]:
    """A Slurm script that runs the plan, and the plan as JSON beside it."""
    if args.sbatch is None:
        return []
    try:
        slurm = importlib.import_module("megatron_loong.launch.slurm")
    except ModuleNotFoundError:
        raise ValueError("--sbatch needs megatron_loong.launch.slurm, which this copy lacks; use --json") from None
    values = as_json(outcome, work, hardware)
    plan = args.sbatch.with_suffix(".plan.json")
    arguments = (*values["model_flags"], *values["flags"])
    job = slurm.Job(args.script, arguments, values["nodes"], values["ranks_per_node"], plan=str(plan))
    args.sbatch.parent.mkdir(parents=True, exist_ok=True)
    plan.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    args.sbatch.write_text(slurm.render(job), encoding="utf-8")
    return [args.sbatch, plan]


def _hardware(args: argparse.Namespace) -> Hardware:
    hardware = load_hardware(args.hardware)
    return hardware.with_network(nics_per_node=args.nics_per_node, nic_gbit_per_s=args.nic_gbit)


def _model(args: argparse.Namespace) -> ModelShape:
    given = {field.name: getattr(args, field.name) for field in _MODEL_FIELDS}
    return model_from(args.model, {**given, "gated": False if args.no_gated_mlp else None})
