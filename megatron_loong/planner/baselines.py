"""What the same job takes with others' attention: Megatron's native context parallelism, and PyTorch's FSDP2."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from megatron_loong.config import LoongConfig, divisors
from megatron_loong.planner import fit
from megatron_loong.planner.candidate import Candidate, Workload, ZeroSizes
from megatron_loong.planner.hardware import Hardware
from megatron_loong.planner.methods import MEGATRON_CP, TORCH_CP, Method
from megatron_loong.planner.simulate import simulate_pass
from megatron_loong.planner.step import StepCost, step_cost


class Baseline(NamedTuple):
    """Somebody else's way to run the job. All *modelled*."""

    name: str
    candidate: Candidate
    cost: StepCost
    fits: bool


def baselines(winner: Candidate, work: Workload, hardware: Hardware) -> list[Baseline]:
    """Native CP in the best of TransformerEngine's layouts with the plan's sizes; FSDP2 with the plan's data ranks.

    Neither knows Selective Checkpoint++: what recomputes all but the attention here recomputes all of it there.
    """
    found = []
    recompute = "full" if winner.recompute == "selective" else winner.recompute
    if winner.context > 1:
        same = dataclasses.replace(winner, recompute=recompute, offload_attention=False)
        native = [
            _costed(name, dataclasses.replace(same, attention=config), MEGATRON_CP, work, hardware)
            for name, config in _native_layouts(winner, work, hardware)
        ]
        found.append(min(native, key=lambda one: one.cost.seconds))
    ranks = work.gpus // winner.data
    if work.seq_len % (2 * ranks) == 0:
        sharded = ZeroSizes(work.gpus, work.gpus, work.gpus)
        fsdp = Candidate(1, 1, winner.data, LoongConfig(ranks), "full", sharded, tiled_logits=True, offload=True)
        found.append(_costed("PyTorch's FSDP2 and ring", fsdp, TORCH_CP, work, hardware))
    return found


def _native_layouts(winner: Candidate, work: Workload, hardware: Hardware) -> list[tuple[str, LoongConfig]]:
    """`--cp-comm-type` and its layout; the all-to-all has to divide the KV heads, and stays inside a node."""
    context, shape = winner.context, winner.attention_shape(work)
    most = winner.site(hardware).cp_ranks_in_node
    kinds = {1: "p2p", context: "a2a"}
    return [
        (f"Megatron's native CP ({kinds.get(head, 'a2a+p2p')})", LoongConfig(context, head))
        for head in divisors(context)
        if shape.kv_heads % head == 0 and head <= most
    ]


def _costed(name: str, candidate: Candidate, method: Method, work: Workload, hardware: Hardware) -> Baseline:
    shape, site = candidate.attention_shape(work), candidate.site(hardware)
    forward, backward = (
        simulate_pass(candidate.attention, shape, site, backward=b, method=method) for b in (False, True)
    )
    host_bytes = fit.host_bytes(work.model, fit.memory_plan(candidate, work))
    fits = fit.fits(fit.peak_bytes(candidate, work), hardware, host_bytes)
    return Baseline(name, candidate, step_cost(candidate, work, hardware, (forward, backward)), fits)
