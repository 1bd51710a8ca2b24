"""A search's outcome as text for people and as JSON for programs. Every figure in it is modelled."""

from __future__ import annotations

import shlex
from typing import Any

from megatron_loong.planner.baselines import Baseline, baselines
from megatron_loong.planner.candidate import Workload
from megatron_loong.planner.error_band import ERROR_BAND
from megatron_loong.planner.fit import host_bytes, memory_plan
from megatron_loong.planner.flags import CONNECTIONS, LEFT_TO_THE_USER, connections, flags_of, model_flags
from megatron_loong.planner.hardware import Hardware
from megatron_loong.planner.reasons import against, changes, crossing_axes, describe, reasons
from megatron_loong.planner.search import Outcome, Plan
from megatron_loong.planner.step import StepCost
from megatron_loong.planner.units import duration, length, number

_GIB = 1 << 30


def as_text(outcome: Outcome, work: Workload, hardware: Hardware) -> str:
    """The plan, why, what else, what would change it, and the flags."""
    winner = outcome.plans[0]
    cost, flags = winner.cost, flags_of(winner.candidate, work)
    others = baselines(winner.candidate, work, hardware)
    lines = [
        f"Best plan for {work.gpus} x {hardware.name}, {length(work.seq_len)} tokens, "
        f"{work.global_batch_size} sequence{'s' if work.global_batch_size > 1 else ''}",
        f"  {describe(winner.candidate)}",
        f"  {duration(cost.seconds)} a step, {number(cost.tokens_per_gpu_s)} tokens/GPU/s, MFU {100 * cost.mfu:.1f}%; "
        "modelled",
        f"  {_band(hardware)}",
        "",
        "Why",
        *(f"  - {line}" for line in reasons(winner, hardware)),
        "",
        "The same sizes with others' attention (tiles and copies to host memory are this package's here too)",
        *([f"  {_beside(one, cost)}" for one in others] or ["  none of the others can run it with these sizes"]),
        "",
        "Where the time of a step goes",
        *_rows({name: duration(s) for name, s in cost.terms_s.items() if s >= 5e-4 * cost.seconds}),
        "",
        "Peak memory of a rank (GiB)",
        *_rows({name: f"{size / _GIB:.2f}" for name, size in {**winner.memory, **_host(winner, work)}.items() if size}),
        "",
        "Runner-ups",
        *([f"  {describe(plan.candidate)}: {against(plan, winner)}" for plan in outcome.plans[1:5]] or ["  none"]),
        "",
        "What would change the choice",
        *([f"  - {line}" for line in changes(outcome, work, hardware)] or ["  - none of the cases that were tried"]),
        "",
        "Flags for the pretrain script: the model",
        f"  {shlex.join(model_flags(work.model))}",
        "and the plan",
        f"  {shlex.join(flags)}",
        f"Yours to add: {LEFT_TO_THE_USER}.",
        f"In the environment: {_environment(flags)}",
    ]
    return "\n".join(lines)


def _band(hardware: Hardware) -> str:
    """How far the model is from what others have measured on this GPU."""
    if hardware.name not in ERROR_BAND:
        return "no published training run on this GPU has been set beside the model"
    rows, median, largest = ERROR_BAND[hardware.name]
    return f"published training runs on this GPU: within {largest}%, half of {rows} within {median}%"


def _beside(one: Baseline, cost: StepCost) -> str:
    words = f"{one.name}: {describe(one.candidate)}: {duration(one.cost.seconds)} a step"
    return (
        f"{words}, {one.cost.seconds / cost.seconds:.2f}x the time{'' if one.fits else '; it does not fit the memory'}"
    )


def _host(plan: Plan, work: Workload) -> dict[str, int]:
    return {"(in host memory)": host_bytes(work.model, memory_plan(plan.candidate, work))}


def _environment(flags: list[str]) -> str:
    needed = connections(flags)
    return f"{CONNECTIONS} unset, for Megatron-FSDP refuses 1" if needed is None else f"{CONNECTIONS}={needed}"


def _rows(values: dict[str, str]) -> list[str]:
    width = max(map(len, values), default=0)
    return [f"  {name:<{width}}  {value}" for name, value in values.items()]


def as_json(outcome: Outcome, work: Workload, hardware: Hardware) -> dict[str, Any]:
    """Everything of `as_text` with names and plain numbers; `flags` are the words for the script."""
    winner, band = outcome.plans[0], ERROR_BAND.get(hardware.name)
    return {
        "modelled": True,
        "hardware": hardware.name,
        "gpus": work.gpus,
        "nodes": -(-work.gpus // hardware.gpus_per_node),
        "ranks_per_node": min(work.gpus, hardware.gpus_per_node),
        "seq_length": work.seq_len,
        "global_batch_size": work.global_batch_size,
        "flags": flags_of(winner.candidate, work),
        "model_flags": model_flags(work.model),
        "plan": plan_as_json(winner, hardware),
        "reasons": reasons(winner, hardware),
        "runner_ups": [
            {**plan_as_json(plan, hardware), "against_winner": against(plan, winner)} for plan in outcome.plans[1:]
        ],
        "what_would_change_it": list(changes(outcome, work, hardware)),
        "baselines": [
            {
                "name": one.name,
                "description": describe(one.candidate),
                "head_parallel_size": one.candidate.attention.head_parallel_size,
                "recompute": one.candidate.recompute,
                "step_s": one.cost.seconds,
                "times_the_plan": one.cost.seconds / winner.cost.seconds,
                "fits": one.fits,
            }
            for one in baselines(winner.candidate, work, hardware)
        ],
        "host_memory_bytes": sum(_host(winner, work).values()),
        "error_band": dict(zip(("rows", "median_percent", "largest_percent"), band, strict=True)) if band else None,
        "effort": vars(outcome.effort),
    }


def plan_as_json(plan: Plan, hardware: Hardware) -> dict[str, Any]:
    """One plan: sizes, cost, bytes per link, memory."""
    c, a = plan.candidate, plan.candidate.attention
    forward, backward = plan.passes
    return {
        "description": describe(c),
        "tensor_parallel_size": c.tensor,
        "pipeline_parallel_size": c.pipeline,
        "data_parallel_size": c.data,
        "context_parallel_size": c.context,
        "expert_parallel_size": c.expert,
        "head_parallel_size": a.head_parallel_size,
        "inner_ring_size": a.inner_ring_size,
        "placement": a.placement,
        "recompute": c.recompute,
        "zero": c.zero._asdict(),
        "tiled_mlp": c.tiled_mlp,
        "tiled_logits": c.tiled_logits,
        "offload_activations": c.offload,
        "offload_attention": c.offload_attention,
        "step_s": plan.cost.seconds,
        "tokens_per_gpu_s": plan.cost.tokens_per_gpu_s,
        "mfu": plan.cost.mfu,
        "terms_s": plan.cost.terms_s,
        "exposed_s": plan.cost.exposed_s,
        "memory_bytes": plan.memory,
        "peak_memory_bytes": sum(plan.memory.values()),
        "axes_that_cross_nodes": crossing_axes(c, hardware),
        "attention_layer": {
            name: {
                "seconds": one.seconds,
                "exposed_s": one.exposed_s,
                "sent_bytes": one.sent_bytes,
                "link_bytes": {f"{kind} {index}": sent for (kind, index), sent in sorted(one.link_bytes.items())},
            }
            for name, one in (("forward", forward), ("backward", backward))
        },
    }
