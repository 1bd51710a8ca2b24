"""The time of one training step: the simulated attention, and the rest in closed form, term by term.

    layer, forward    attention + matrix products + memory traffic + TP collectives + expert all-to-all
    layer, backward   the attention's backward, twice the matrix products, the same collectives
    recomputation     the forward again: all of it (full), or all but the attention (selective); the MLP's if tiled
    micro-batch       layers of a stage x the above, + output layer on the last stage
    step              micro-batches x that, x (1 + (PP - 1) / micro-batches) for the bubble, + DP + optimizer

Matrix products and memory traffic run at `Hardware.training_efficiency` of their best rates.

MFU = useful FLOPs (`ModelShape.flops_per_token`) x tokens / (GPUs x step time x peak FLOP/s of the data sheet).
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

from megatron_loong.config import LoongConfig
from megatron_loong.layout.ranks import coordinates_of, logical_rank_of
from megatron_loong.planner.candidate import Candidate, Workload
from megatron_loong.planner.hardware import Hardware
from megatron_loong.planner.model import ModelShape
from megatron_loong.planner.simulate import PassTime

#: Memory traffic of a layer outside attention and matrix products in bf16, bytes per token.
#: Forward, per element of hidden_size: two norms (read 2, write 2), two residual sums (read 4, write 2), rotary
#: embedding of q and k (about 5); per element of the MLP's width: a gated activation (read 4, write 2).
_FORWARD_BYTES = (25, 6)
#: Backward: two norms (read 4, write 2), two sums, rotary; the activation (read 6, write 4).
_BACKWARD_BYTES = (29, 10)
#: Per parameter and micro-batch: the float32 gradient is read and written.
_GRADIENT_BYTES = 8
#: Optimizer: float32 gradient, master weight and two moments read, the last three written, bf16 weight written.
_OPTIMIZER_BYTES_PER_PARAM = 30


@dataclass(frozen=True)
class StepCost:
    """What a step is expected to cost. All *modelled*."""

    seconds: float
    tokens_per_gpu_s: float
    mfu: float
    """Model FLOPs utilization; the formula stands at the head of this module."""
    terms_s: dict[str, float]
    """Where the time of the busiest rank goes; they add up to `seconds`."""
    attention_s: float
    """Of `seconds`, attention forward and backward, all-to-all and waiting included."""

    @property
    def exposed_s(self) -> float:
        """Communication that nothing hides, and the pipeline bubble."""
        return sum(s for name, s in self.terms_s.items() if name in EXPOSED_TERMS)


EXPOSED_TERMS = (
    *("attention, waiting", "TP collectives", "expert all-to-all"),
    *("host copies", "pipeline bubble", "DP collectives"),
)


def step_cost(
    candidate: Candidate, work: Workload, hardware: Hardware, attention: tuple[PassTime, PassTime]
) -> StepCost:
    """Cost of one step; `attention` is (forward, backward) of one layer and one micro-batch, simulated."""
    layer = _layer_terms(candidate, work, hardware, attention)
    layers, micro = candidate.layers(work), candidate.micro_batches(work)
    terms = {name: seconds * layers * micro for name, seconds in layer.items()}
    terms["output layer"] = _output_layer_s(candidate, work, hardware) * micro
    terms["host copies"] = layers * micro * _host_s(candidate, work, hardware, sum(layer.values()))
    busy = sum(terms.values())
    terms["pipeline bubble"] = busy * (candidate.pipeline - 1) / micro
    terms["DP collectives"] = _data_parallel_s(candidate, work, hardware, layers * sum(layer.values()))
    shard = candidate.stage_params(work, candidate.zero.optimizer)
    terms["optimizer"] = shard * _OPTIMIZER_BYTES_PER_PARAM / _memory_rate(hardware)
    seconds = sum(terms.values())
    tokens = work.global_batch_size * work.seq_len
    useful = work.model.flops_per_token(work.seq_len) * tokens
    attention_s = terms["attention, computing"] + terms["attention, waiting"]
    return StepCost(
        seconds,
        tokens / (work.gpus * seconds),
        useful / (work.gpus * seconds * hardware.peak_flops_per_s),
        terms,
        attention_s,
    )


def _layer_terms(
    candidate: Candidate, work: Workload, hardware: Hardware, attention: tuple[PassTime, PassTime]
) -> dict[str, float]:
    """Forward, recomputation and backward of one layer and one micro-batch."""
    forward, backward = attention
    again = 0 if candidate.recompute == "none" else 1
    attention_again = 1 if candidate.recompute == "full" else 0
    runs = 3 + again  # a backward is twice a forward in everything but the attention
    model, tokens = work.model, candidate.local_tokens(work)
    flops = 2.0 * tokens * model.active_layer_params / candidate.tensor
    visited = model.moe_router_topk if model.num_experts else 1
    width = visited * model.expert_params + model.shared_expert_params
    ffn = width / model.hidden_size / (3 if model.gated else 2)
    tiled = 2.0 * tokens * width / candidate.tensor if candidate.tiled_mlp else 0.0
    per_hidden, per_ffn = (f * (1 + again) + b for f, b in zip(_FORWARD_BYTES, _BACKWARD_BYTES, strict=True))
    memory = tokens * (per_hidden * model.hidden_size + per_ffn * ffn) / candidate.tensor
    memory += _GRADIENT_BYTES * sum(candidate.layer_params(work))
    if model.num_experts:
        memory += tokens * (2 + again) * _dispatch_bytes(candidate, model) / candidate.tensor
    return {
        "attention, computing": forward.compute_s * (1 + attention_again) + backward.compute_s,
        "attention, waiting": forward.exposed_s * (1 + attention_again) + backward.exposed_s,
        "matrix products": (runs * flops + tiled) / _matmul_rate(hardware),
        "memory traffic": memory / _memory_rate(hardware),
        "TP collectives": (2 + again) * _tensor_parallel_s(candidate, work, hardware),
        "expert all-to-all": (2 + again) * _expert_s(candidate, work, hardware),
    }


def _tensor_parallel_s(candidate: Candidate, work: Workload, hardware: Hardware) -> float:
    """An all-gather and a reduce-scatter of the hidden states (sequence parallelism) for the attention and for the MLP,
    inside the node; routed experts are not cut and have none."""
    tp, model = candidate.tensor, work.model
    if tp == 1:
        return 0.0
    collectives = 2 if model.num_experts and not model.shared_expert_params else 4
    moved = candidate.local_tokens(work) * work.model.hidden_size * hardware.dtype_bytes * (tp - 1) / tp
    return collectives * (moved / hardware.node_link_bytes_per_s + (tp - 1) * hardware.node_link_latency_s)


def _expert_s(candidate: Candidate, work: Workload, hardware: Hardware) -> float:
    """Dispatch and combine of one forward; what leaves the node goes through the NICs, the rest over NVLink."""
    ep, model = candidate.expert, work.model
    if ep == 1 or not model.num_experts:
        return 0.0
    tokens = candidate.local_tokens(work) / candidate.tensor
    moved = tokens * model.moe_router_topk * model.hidden_size * hardware.dtype_bytes
    in_node = experts_in_node(candidate, hardware)
    outside, inside = moved * (ep - in_node) / ep, moved * (in_node - 1) / ep
    once = max(inside / hardware.node_link_bytes_per_s, outside / _nic_share(hardware)) + hardware.nic_latency_s
    return 2 * once


def experts_in_node(candidate: Candidate, hardware: Hardware) -> int:
    """Of the ranks that share a layer's experts, those on one node: they follow one another in Megatron's order, TP
    first, then CP, and stand where the placement puts their context-parallel ranks."""
    config, per_node = candidate.attention, candidate.site(hardware).cp_ranks_in_node
    group = -(-candidate.expert // candidate.tensor)
    if group > config.context_parallel_size:  # all of a context-parallel group, and of its data-parallel neighbours
        whole = per_node == config.context_parallel_size
        return min(candidate.expert, hardware.gpus_per_node if whole else per_node * candidate.tensor)
    nodes = Counter(rank // per_node for rank, logical in enumerate(_logical_ranks(config)) if logical < group)
    return min(candidate.expert, max(nodes.values()) * candidate.tensor)


@functools.lru_cache(maxsize=1024)
def _logical_ranks(config: LoongConfig) -> tuple[int, ...]:
    ranks = range(config.context_parallel_size)
    return tuple(logical_rank_of(config, coordinates_of(config, rank)) for rank in ranks)


def _host_s(candidate: Candidate, work: Workload, hardware: Hardware, layer_s: float) -> float:
    """Copies of what a layer keeps to host memory under its forward, and back under a later backward, as far as neither
    hides them: a forward is a quarter of a layer's time or more."""
    if not candidate.offload:
        return 0.0
    width = work.model.hidden_size + work.model.attention_width * candidate.offload_attention
    moved = candidate.local_tokens(work) * width * hardware.dtype_bytes / candidate.tensor
    return 2 * max(0.0, moved / hardware.host_link_bytes_per_s - layer_s / 4)


def _dispatch_bytes(candidate: Candidate, model: ModelShape) -> int:
    """Memory traffic per token of one forward of Megatron's all-to-all dispatcher: a copy for each expert is made and
    summed up again, and between them, with EP, copies are sorted by expert and back."""
    copies = 2 * model.moe_router_topk * model.hidden_size
    return 4 * model.hidden_size + 2 * copies + (4 * copies if candidate.expert > 1 else 0)


def _output_layer_s(candidate: Candidate, work: Workload, hardware: Hardware) -> float:
    """Forward and backward of the output layer; loss in float32 over the vocabulary read and written twice."""
    tokens, vocab = candidate.local_tokens(work), work.model.vocab_size / candidate.tensor
    flops = 6.0 * tokens * work.model.hidden_size * vocab * (4 / 3 if candidate.tiled_logits else 1)
    return flops / _matmul_rate(hardware) + tokens * vocab * 16 / _memory_rate(hardware)


def _matmul_rate(hardware: Hardware) -> float:
    return hardware.matmul_flops_per_s * hardware.training_efficiency


def _memory_rate(hardware: Hardware) -> float:
    return hardware.memory_bytes_per_s * hardware.training_efficiency


def _data_parallel_s(candidate: Candidate, work: Workload, hardware: Hardware, last_micro_batch_s: float) -> float:
    """Gradients reduced (float32) and parameters gathered, as far as the last micro-batch does not hide them.

    Within the ranks that share one copy of the optimizer's states; between their copies shares of gradients are summed.
    `--overlap-grad-reduce --overlap-param-gather` are on the flag line; half of a micro-batch's time hides each.
    """
    ranks = candidate.data * candidate.context
    if ranks == 1:
        return 0.0
    params = candidate.stage_params(work)
    shared = candidate.zero.optimizer
    copies = ranks // shared

    def rate(members: int) -> float:
        if members * candidate.tensor <= hardware.gpus_per_node:
            return hardware.node_link_bytes_per_s
        # A ring enters each node once, and a node's ranks are members of as many rings as they have NICs for.
        in_node = max(1, hardware.gpus_per_node // candidate.tensor)
        return min(hardware.node_link_bytes_per_s, in_node * _nic_share(hardware))

    share = (shared - 1) / shared * params / rate(shared)
    between = 2 * (copies - 1) / copies * params / shared / rate(ranks)
    exposed = max(0.0, 4 * (share + between) - last_micro_batch_s / 2) + max(0.0, 2 * share - last_micro_batch_s / 2)
    if candidate.zero.grads > 1:  # reduced in every micro-batch
        exposed += (candidate.micro_batches(work) - 1) * max(0.0, 4 * share - last_micro_batch_s / 2)
    if candidate.zero.params > 1:  # gathered again for every micro-batch, forward and backward
        gathers = 2 * candidate.micro_batches(work)
        exposed += max(0.0, gathers * 2 * share - candidate.micro_batches(work) * last_micro_batch_s)
    return exposed


def _nic_share(hardware: Hardware) -> float:
    """Bytes per second of one GPU when all of a node send at once."""
    return hardware.nic_bytes_per_s * hardware.nics_per_node / hardware.gpus_per_node
