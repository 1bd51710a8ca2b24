"""Does a candidate fit the GPU: the memory model's peak, and what lies outside of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from megatron_loong.planner.candidate import Candidate, Workload
from megatron_loong.planner.flags import TILED_LOSS_TOKENS, TILED_MLP_PIECES
from megatron_loong.planner.hardware import Hardware
from megatron_loong.planner.memory import MemoryPlan, layer_bytes, peak, state_bytes
from megatron_loong.planner.model import ModelShape

MemoryTerms = dict[str, int]
MemoryModel = Callable[[Candidate, Workload], MemoryTerms]
"""Peak bytes of the fullest rank by term."""

#: Share of a GPU's memory that a plan may take; the rest is left to the allocator's fragmentation.
USABLE = 0.92
#: CUDA context, NCCL's buffers, cuBLAS's workspace: outside of the memory model.
RESERVE_BYTES = 3 << 30


def memory_plan(candidate: Candidate, work: Workload) -> MemoryPlan:
    """A candidate in the words of the memory model."""
    c, config = candidate, candidate.attention
    return MemoryPlan(
        seq_len=work.seq_len,
        micro_batch_size=work.micro_batch_size,
        context_parallel_size=c.context,
        head_parallel_size=config.head_parallel_size,
        inner_ring_size=config.inner_ring_size,
        tensor_parallel_size=c.tensor,
        sequence_parallel=c.tensor > 1,
        pipeline_parallel_size=c.pipeline,
        expert_parallel_size=c.expert,
        micro_batches_in_flight=min(c.pipeline, c.micro_batches(work)),
        zero_param_size=c.zero.params,
        zero_grad_size=c.zero.grads,
        zero_optimizer_size=c.zero.optimizer,
        recompute=c.recompute != "none",
        selective_checkpoint="ring" if c.recompute == "selective" else "off",
        tiled_loss=TILED_LOSS_TOKENS if c.tiled_logits else 0,
        tiled_mlp=TILED_MLP_PIECES if c.tiled_mlp else 0,
        offload_activations=c.offload,
        offload_attention=c.offload_attention,
    )


def peak_bytes(candidate: Candidate, work: Workload) -> MemoryTerms:
    """Peak bytes of the fullest rank, by term of `planner.memory`."""
    return {**peak(work.model, memory_plan(candidate, work)).terms, "runtime": RESERVE_BYTES}


def host_bytes(model: ModelShape, plan: MemoryPlan) -> int:
    """What the offloads put into host memory for one GPU of the first pipeline stage."""
    layer, stages = layer_bytes(model, plan), plan.pipeline_parallel_size
    calls = math.ceil(model.num_layers / stages) * (plan.micro_batches_in_flight or stages)
    stash = layer.out + layer.lse if plan.selective_checkpoint == "ring" else 0
    kept = calls * (layer.hidden * plan.offload_activations + stash * plan.offload_attention)
    on_the_gpu = state_bytes(model, dataclasses.replace(plan, offload_optimizer=False))
    return kept + on_the_gpu["optimizer states"] * plan.offload_optimizer


def fits(terms: MemoryTerms, hardware: Hardware, host: int = 0) -> bool:
    """Whether the sum stays inside the usable share of a GPU, and `host` bytes a GPU inside that of a node."""
    on_host = host * hardware.gpus_per_node
    return sum(terms.values()) <= USABLE * hardware.memory_bytes and on_host <= USABLE * hardware.host_memory_bytes
