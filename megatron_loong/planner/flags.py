"""A plan as Megatron's command-line flags."""

from __future__ import annotations

from megatron_loong.planner.candidate import Candidate, Workload
from megatron_loong.planner.model import ModelShape

#: Tokens of one tile of the loss, and pieces of a tiled MLP.
TILED_LOSS_TOKENS, TILED_MLP_PIECES = 1024, 8


def model_flags(model: ModelShape) -> list[str]:
    """The words that describe the model, without biases, to Megatron; the vocabulary comes with the tokenizer."""
    sizes = {
        "--num-layers": model.num_layers,
        "--hidden-size": model.hidden_size,
        "--num-attention-heads": model.num_attention_heads,
        "--kv-channels": model.head_dim,
        "--ffn-hidden-size": model.ffn_hidden_size,
    }
    if model.num_experts:
        sizes["--num-experts"] = model.num_experts
        sizes["--moe-router-topk"] = model.moe_router_topk
        sizes["--moe-ffn-hidden-size"] = model.moe_ffn_hidden_size or model.ffn_hidden_size
    if model.moe_shared_expert_intermediate_size:
        sizes["--moe-shared-expert-intermediate-size"] = model.moe_shared_expert_intermediate_size
    words = [word for flag, value in sizes.items() for word in (flag, str(value))]
    if model.num_query_groups != model.num_attention_heads:
        words += ["--group-query-attention", "--num-query-groups", str(model.num_query_groups)]
    words.append("--disable-bias-linear")
    return [*words, "--swiglu"] if model.gated else words


def flags_of(candidate: Candidate, work: Workload) -> list[str]:
    """The words to put behind a pretrain script; the model's own flags and the data's are the user's.

    Expert and FSDP flags come only where the plan uses them.
    """
    c, config = candidate, candidate.attention
    sizes = {
        "--tensor-model-parallel-size": c.tensor,
        "--pipeline-model-parallel-size": c.pipeline,
        "--context-parallel-size": c.context,
        "--seq-length": work.seq_len,
        "--max-position-embeddings": work.seq_len,
        "--micro-batch-size": work.micro_batch_size,
        "--global-batch-size": work.global_batch_size,
    }
    if c.expert > 1:
        sizes["--expert-model-parallel-size"] = c.expert
    words = [word for flag, value in sizes.items() for word in (flag, str(value))]
    if c.tensor > 1:
        words.append("--sequence-parallel")
    if c.context > 1:
        words += ["--context-parallel-impl", "loong"]
        words += ["--loong-head-parallel-size", str(config.head_parallel_size)]
        words += ["--loong-inner-ring-size", str(config.inner_ring_size)]
        words += ["--loong-placement", config.placement]
    if c.recompute != "none":
        words += ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    if c.recompute == "selective":
        words.append("--loong-selective-checkpoint")
    if c.tiled_logits:
        words += ["--loong-tiled-loss", str(TILED_LOSS_TOKENS)]
    if c.tiled_mlp:
        words += ["--loong-tiled-mlp", str(TILED_MLP_PIECES)]
    words += ["--bf16", "--attention-dropout", "0", "--use-distributed-optimizer"]
    copies = c.data * c.context // c.zero.optimizer
    if copies > 1:
        words += ["--num-distributed-optimizer-instances", str(copies)]
    if c.zero.grads > 1:
        strategy = "optim_grads_params" if c.zero.params > 1 else "optim_grads"
        words += ["--use-megatron-fsdp", "--data-parallel-sharding-strategy", strategy]
    return [*words, "--overlap-grad-reduce", "--overlap-param-gather"]
