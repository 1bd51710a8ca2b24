"""The transformer that is to be trained: what its flags say, what costs time and memory, and its FLOPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer with RMSNorm, rotary embedding and an output layer of its own.

    Fields are Megatron's flags, which the `ValueError` of the constructor names. Norms, biases and routers are small
    and cost nothing here.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """KV heads."""
    ffn_hidden_size: int
    vocab_size: int = 128_000
    kv_channels: int | None = None
    """Head width; None: hidden_size / num_attention_heads."""
    gated: bool = True
    """`--swiglu`: three matrices in the MLP instead of two."""
    num_experts: int | None = None
    """None: a dense model."""
    moe_router_topk: int = 2
    moe_ffn_hidden_size: int | None = None
    """None: as ffn_hidden_size."""
    moe_shared_expert_intermediate_size: int = 0
    moe_aux_loss_coeff: float = 0.01
    """Of the loss that balances the experts."""
    rotary_base: int = 10_000
    use_rope_scaling: bool = False
    """Llama 3.1's scaling of low frequencies, by 8."""
    norm_epsilon: float = 1e-5
    add_qkv_bias: bool = False
    qk_layernorm: bool = False

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value, flag = getattr(self, item.name), "--" + item.name.replace("_", "-")
            if value is None or isinstance(value, bool):
                continue
            if isinstance(item.default, float):
                if not 0 <= value < 1:
                    raise ValueError(f"{flag} {value} must be a number from 0 to 1")
                continue
            least = 0 if item.name == "moe_shared_expert_intermediate_size" else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{flag} {value} must be a whole number of at least {least}")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"--num-attention-heads {self.num_attention_heads} is not a multiple of "
                f"--num-query-groups {self.num_query_groups}"
            )
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"--hidden-size {self.hidden_size} is not a multiple of --num-attention-heads "
                f"{self.num_attention_heads}; give --kv-channels, the width of a head"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def attention_width(self) -> int:
        """Query heads times their width: what `hidden` means in the FLOPs of attention."""
        return self.num_attention_heads * self.head_dim

    @property
    def attention_params(self) -> int:
        """Of the four projections of one layer."""
        return self.hidden_size * self.head_dim * (2 * self.num_attention_heads + 2 * self.num_query_groups)

    @property
    def expert_params(self) -> int:
        """Of one expert (of the MLP, in a dense model)."""
        width = self.moe_ffn_hidden_size if self.num_experts and self.moe_ffn_hidden_size else self.ffn_hidden_size
        return self.hidden_size * width * (3 if self.gated else 2)

    @property
    def shared_expert_params(self) -> int:
        """Of the expert that every token visits."""
        return self.hidden_size * self.moe_shared_expert_intermediate_size * (3 if self.gated else 2)

    @property
    def active_layer_params(self) -> int:
        """Parameters of one layer that a token meets."""
        visited = self.moe_router_topk if self.num_experts else 1
        return self.attention_params + visited * self.expert_params + self.shared_expert_params

    @property
    def layer_params(self) -> int:
        """Parameters of one layer."""
        return self.attention_params + (self.num_experts or 1) * self.expert_params + self.shared_expert_params

    @property
    def embedding_params(self) -> int:
        """Of the input embedding, and as many of the output layer."""
        return self.vocab_size * self.hidden_size

    @property
    def total_params(self) -> int:
        """All of them; embedding and output layer are apart."""
        return self.num_layers * self.layer_params + 2 * self.embedding_params

    def flops_per_token(self, seq_len: int) -> float:
        """Useful FLOPs of training on one token, causal: 6 * params that multiply it + 6 * layers * width * S.

        The input embedding is a look-up and not counted. Forward is a third of each term; recomputation never counts.
        """
        params = self.num_layers * self.active_layer_params + self.embedding_params
        return 6.0 * params + 6.0 * self.num_layers * self.attention_width * seq_len


def _llama3(layers: int, hidden: int, heads: int, ffn: int) -> ModelShape:
    return ModelShape(layers, hidden, heads, 8, ffn, 128256, rotary_base=500_000, use_rope_scaling=True)


def _qwen3(layers: int, hidden: int, heads: int, ffn: int) -> ModelShape:
    return ModelShape(
        *(layers, hidden, heads, 8, ffn, 151936),
        kv_channels=128,
        rotary_base=1_000_000,
        norm_epsilon=1e-6,
        qk_layernorm=True,
    )


#: Models by name, from their published configurations; what a paper leaves out is from config.json on Hugging Face.
MODELS: dict[str, ModelShape] = {
    "llama2-7b": ModelShape(32, 4096, 32, 32, 11008, 32000),  # arXiv 2307.09288
    "llama2-7b-gqa": ModelShape(32, 4096, 32, 8, 11008, 32000),  # LoongTrain's 7B-GQA: 8 KV heads, section 6.1
    "llama2-13b": ModelShape(40, 5120, 40, 40, 13824, 32000),  # arXiv 2307.09288
    "llama2-70b": ModelShape(80, 8192, 64, 8, 28672, 32000),  # arXiv 2307.09288
    "llama3-8b": _llama3(32, 4096, 32, 14336),  # arXiv 2407.21783, table 3; rope_scaling as released (Llama 3.1)
    "llama3-70b": _llama3(80, 8192, 64, 28672),  # the same
    "llama3-405b": _llama3(126, 16384, 128, 53248),  # the same
    "qwen2.5-14b": ModelShape(
        48, 5120, 40, 8, 13824, 152064, rotary_base=1_000_000, add_qkv_bias=True
    ),  # arXiv 2412.15115
    "qwen3-8b": _qwen3(36, 4096, 32, 12288),  # Hugging Face Qwen/Qwen3-8B, config.json
    "qwen3-32b": _qwen3(64, 5120, 64, 25600),  # Hugging Face Qwen/Qwen3-32B, config.json
    "qwen3-30b-a3b": ModelShape(
        48,
        2048,
        32,
        4,
        6144,
        151936,
        kv_channels=128,
        num_experts=128,
        moe_router_topk=8,
        moe_ffn_hidden_size=768,
        moe_aux_loss_coeff=0.001,
        rotary_base=1_000_000,
        norm_epsilon=1e-6,
        qk_layernorm=True,
    ),  # Hugging Face Qwen/Qwen3-30B-A3B, config.json
    # arXiv 2401.04088; the balancing loss is weighed as in Megatron-LM's examples/mixtral
    "mixtral-8x7b": ModelShape(32, 4096, 32, 8, 14336, 32000, num_experts=8, rotary_base=1_000_000),
}


def model_from(name: str | None, changes: Mapping[str, Any]) -> ModelShape:
    """A named model with some numbers changed, or one from numbers alone; `ValueError` says what is missing."""
    given = {key: value for key, value in changes.items() if value is not None}
    if name is not None:
        if name not in MODELS:
            raise ValueError(f"--model {name} is unknown; use one of {', '.join(MODELS)}, or give its sizes as flags")
        return dataclasses.replace(MODELS[name], **given)
    required = {f.name for f in dataclasses.fields(ModelShape) if f.default is dataclasses.MISSING}
    if "num_query_groups" not in given and "num_attention_heads" in given:
        given["num_query_groups"] = given["num_attention_heads"]
    if missing := sorted(required - set(given)):
        flags = ", ".join("--" + key.replace("_", "-") for key in missing)
        raise ValueError(f"the model is not known without {flags}; or name one with --model: {', '.join(MODELS)}")
    return ModelShape(**given)
