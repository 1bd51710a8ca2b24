"""Does a candidate fit the GPU: peak bytes of one rank, term by term, in a closed form good enough to choose by."""

from __future__ import annotations

from collections.abc import Callable

from megatron_loong.planner.candidate import Candidate, Workload
from megatron_loong.planner.hardware import Hardware
from megatron_loong.planner.traffic import hop_bytes

MemoryTerms = dict[str, int]
MemoryModel = Callable[[Candidate, Workload], MemoryTerms]
"""Peak bytes of the fullest rank by term."""

#: Share of a GPU's memory that a plan may take; the rest is left to fragmentation.
USABLE = 0.92
#: CUDA context, NCCL buffers, cuBLAS workspace.
_RUNTIME_BYTES = 3 << 30
#: Pieces that a tiled MLP or a tiled loss is cut into.
_TILES = 8


def peak_bytes(candidate: Candidate, work: Workload) -> MemoryTerms:
    """Peak bytes of a rank of the first pipeline stage, which holds the most micro-batches."""
    model, tokens, tp = work.model, candidate.local_tokens(work), candidate.tensor
    params = candidate.stage_params(work)
    in_flight = min(candidate.pipeline, candidate.micro_batches(work)) * candidate.layers(work)
    stash = _kept_bytes_per_token(candidate, work) * tokens / tp
    terms = {
        "parameters": 2 * params / candidate.zero.params,
        "gradients": 4 * params / candidate.zero.grads,
        "optimizer": 12 * params / candidate.zero.optimizer,
        "activations kept": stash * in_flight,
        "one layer at work": _working_bytes(candidate, work),
        "runtime": _RUNTIME_BYTES,
    }
    if candidate.pipeline == 1:
        # bf16 logits, float32 logits and their gradient.
        logits = 10 * tokens * model.vocab_size / tp
        terms["logits"] = logits / _TILES if candidate.tiled_logits else logits
    return {name: int(value) for name, value in terms.items()}


def fits(terms: MemoryTerms, hardware: Hardware) -> bool:
    """Whether the sum stays inside the usable share of a GPU."""
    return sum(terms.values()) <= USABLE * hardware.memory_bytes


def _kept_bytes_per_token(candidate: Candidate, work: Workload) -> float:
    """Of one layer, before TP divides it."""
    model = work.model
    attention_out = 2 * model.attention_width + 4 * model.num_attention_heads
    if candidate.recompute == "full":
        return 2 * model.hidden_size
    if candidate.recompute == "selective":
        return 2 * model.hidden_size + attention_out
    qkv = 2 * model.head_dim * (model.num_attention_heads + 2 * model.num_query_groups)
    return 8 * model.hidden_size + qkv + attention_out + 6 * _ffn_width(work)


def _working_bytes(candidate: Candidate, work: Workload) -> float:
    """The backward of one layer: its activations while they exist again, or the attention's buffers."""
    tokens, tp, config = candidate.local_tokens(work), candidate.tensor, candidate.attention
    shape = candidate.attention_shape(work)
    mlp = 12 * _ffn_width(work) * tokens / tp
    if candidate.tiled_mlp:
        mlp /= _TILES
    query = tokens * shape.heads * shape.head_dim  # as many elements after the all-to-all as before it
    block_tokens = work.seq_len // config.ring_size
    # q, out, dout in bf16, dq in float32; KV blocks held (README), dKV in float32: own, leaving, arriving.
    blocks = 1 if config.ring_size == 1 else 3 if config.outer_ring_size == 1 else 5
    attention = 10 * query + blocks * hop_bytes(config, shape, block_tokens, 2)
    attention += 3 * hop_bytes(config, shape, block_tokens, 4)
    again = 0 if candidate.recompute == "none" else 8 * work.model.hidden_size * tokens / tp
    return again + max(mlp, attention)


def _ffn_width(work: Workload) -> float:
    model = work.model
    visited = model.moe_router_topk if model.num_experts else 1
    width = visited * model.expert_params + model.shared_expert_params
    return width / model.hidden_size / (3 if model.gated else 2)
