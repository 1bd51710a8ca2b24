"""A plan as Megatron's command-line flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_loong.planner.candidate import Candidate, Workload
from megatron_loong.planner.model import ModelShape

#: Tokens of one tile of the loss, and pieces of a tiled MLP.
TILED_LOSS_TOKENS, TILED_MLP_PIECES = 1024, 8


#: The variable by which CUDA limits the queues of a device; Megatron asks for a value.
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
#: What a run needs besides, in the words of the pretrain scripts.
LEFT_TO_THE_USER = (
    "tokenizer and data (--tokenizer-type, --tokenizer-model, --data-path), length and rate of training "
    "(--train-iters, --lr), checkpoints (--save, --load)"
)


def model_flags(model: ModelShape) -> list[str]:
    """The words that make Megatron build this model; its parser's defaults are another one, a GPT of 2019.

    The tokenizer is left to the user. The table of embeddings has the model's size whatever the tokenizer's is.
    """
    values = {
        "--num-layers": model.num_layers,
        "--hidden-size": model.hidden_size,
        "--num-attention-heads": model.num_attention_heads,
        "--kv-channels": model.head_dim,
        "--ffn-hidden-size": model.ffn_hidden_size,
        "--padded-vocab-size": model.vocab_size,
        "--normalization": "RMSNorm",
        "--norm-epsilon": model.norm_epsilon,
        "--position-embedding-type": "rope",
        "--rotary-base": model.rotary_base,
        "--attention-dropout": 0,
        "--hidden-dropout": 0,
    }
    if model.num_query_groups != model.num_attention_heads:
        values["--num-query-groups"] = model.num_query_groups
    if model.num_experts:
        values["--num-experts"] = model.num_experts
        values["--moe-router-topk"] = model.moe_router_topk
        values["--moe-ffn-hidden-size"] = model.moe_ffn_hidden_size or model.ffn_hidden_size
        values["--moe-router-load-balancing-type"] = "aux_loss"
        values["--moe-aux-loss-coeff"] = model.moe_aux_loss_coeff
        values["--moe-router-dtype"] = "fp32"  # Megatron warns of bf16 with many experts
    if model.moe_shared_expert_intermediate_size:
        values["--moe-shared-expert-intermediate-size"] = model.moe_shared_expert_intermediate_size
    switches = {
        "--group-query-attention": "--num-query-groups" in values,
        "--swiglu": model.gated,
        "--disable-bias-linear": True,
        "--add-qkv-bias": model.add_qkv_bias,
        "--qk-layernorm": model.qk_layernorm,
        "--use-rope-scaling": model.use_rope_scaling,
        "--untie-embeddings-and-output-weights": True,
    }
    return [*_words(values), *(flag for flag, is_on in switches.items() if is_on)]


def flags_of(candidate: Candidate, work: Workload) -> list[str]:
    """The words that carry out a plan, beside those of `model_flags`; expert and FSDP flags only where it uses them."""
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
    words = _words(sizes)
    if work.model.num_experts:
        words.append("--moe-grouped-gemm")  # Megatron's default computes one expert after another
    if c.expert > 1:  # Megatron's default gathers every token on every rank
        words += ["--moe-token-dispatcher-type", "alltoall"]
    if work.model.num_experts and c.tensor > 1:  # Megatron's default cuts each expert's matrices too
        words += ["--expert-tensor-parallel-size", "1"]
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
    if c.offload:
        words.append("--loong-offload-activations")
    if c.offload_attention:
        words.append("--loong-offload-attention")
    if c.tiled_logits:
        words += ["--loong-tiled-loss", str(TILED_LOSS_TOKENS)]
    if c.tiled_mlp:
        words += ["--loong-tiled-mlp", str(TILED_MLP_PIECES)]
    words += ["--bf16", "--use-distributed-optimizer"]
    copies = c.data * c.context // c.zero.optimizer
    if copies > 1:
        words += ["--num-distributed-optimizer-instances", str(copies)]
    if c.zero.grads > 1:
        strategy = "optim_grads_params" if c.zero.params > 1 else "optim_grads"
        words += ["--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor"]
        words += ["--data-parallel-sharding-strategy", strategy]
    return [*words, "--overlap-grad-reduce", "--overlap-param-gather"]


def _words(values: Mapping[str, object]) -> list[str]:
    return [word for flag, value in values.items() for word in (flag, str(value))]


def flag_value(arguments: Sequence[str], flag: str) -> str | None:
    """The word after the last `flag`, or None.

    >>> flag_value(["--context-parallel-size", "4", "--bf16"], "--context-parallel-size")
    '4'
    """
    found = None
    for i, word in enumerate(arguments):
        if word == flag:
            found = arguments[i + 1] if i + 1 < len(arguments) else None
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def connections(words: Sequence[str]) -> str | None:
    """What `CUDA_DEVICE_MAX_CONNECTIONS` has to be for these flags; None: not 1, which FSDP refuses.

    Without FSDP, Megatron asks for 1 as soon as TP or CP is above 1, on GPUs before Blackwell.

    >>> connections(["--context-parallel-size", "4"]), connections(["--loong-zero-grad-size", "all"])
    ('1', None)
    """
    sharded = any(flag_value(words, f"--loong-zero-{what}-size") not in (None, "1") for what in ("param", "grad"))
    return None if sharded or {"--use-megatron-fsdp", "--use-torch-fsdp2"} & {*words} else "1"
