"""The core attention that takes the place of Megatron's when context parallelism is ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from megatron_loong.attention.attention_2d import attention_2d
from megatron_loong.attention.head_exchange import replicas_per_kv_head
from megatron_loong.integration import compat
from megatron_loong.integration.hooks import installed_plugin
from megatron_loong.kernels.interface import KernelRequest
from megatron_loong.kernels.registry import choose_kernel, explain


@dataclass(frozen=True)
class Refusal:
    """A feature of Megatron that the plugin does not offer yet: found on the config, refused at construction."""

    asked_for: Callable[[Any], bool]
    message: str


def _is_set(name: str, *harmless: Any) -> Callable[[Any], bool]:
    return lambda config: getattr(config, name, None) not in (None, False, *harmless)


REFUSALS = (
    Refusal(_is_set("attention_dropout", 0, 0.0), "--attention-dropout above 0 (Megatron's default is 0.1); "
            "use --attention-dropout 0"),
    Refusal(_is_set("window_size", (-1, -1)), "--window-size; leave it out"),
    Refusal(_is_set("softmax_type", "vanilla"), "--softmax-type other than vanilla; use --softmax-type vanilla"),
    Refusal(_is_set("qk_clip"), "--qk-clip; leave it out"),
    Refusal(_is_set("log_max_attention_logit"), "--log-max-attention-logit; leave it out"),
    Refusal(_is_set("fp8_dot_product_attention"), "fp8_dot_product_attention; leave attention in bf16"),
    Refusal(_is_set("fp8_multi_head_attention"), "fp8_multi_head_attention; leave attention in bf16"),
    Refusal(_is_set("batch_invariant_mode"), "--batch-invariant-mode; leave it out"),
    Refusal(_is_set("hybrid_context_parallel"), "--hybrid-context-parallel; leave it out"),
    Refusal(_is_set("dynamic_context_parallel"), "--dynamic-context-parallel; leave it out"),
    Refusal(_is_set("attention_cp_layout", "zigzag"), "attention_cp_layout other than zigzag; use zigzag"),
    Refusal(lambda config: getattr(config, "experimental_attention_variant", None) == "dsa",
            "--experimental-attention-variant dsa; leave it out"),
    Refusal(_is_set("cache_mla_latents"), "--cache-mla-latents (absorbed MLA); leave it out"),
)  # fmt: skip

_CAUSAL = {AttnMaskType.causal: True, AttnMaskType.no_mask: False}


class LoongCoreAttention(MegatronModule):
    """`CoreAttentionInterface` over `attention_2d`: this rank's tokens in, this rank's tokens out.

    Constructor arguments are those of Megatron's core attentions. Raises `NotImplementedError` for what
    `REFUSALS` lists and `ValueError` for heads that the layout does not divide, both when the model is built.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **extra: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        # Read from checkpoints and by layers around this one; sinks are refused above.
        self.softmax_offset = None
        self._refuse(attention_type, attention_dropout, extra)
        cp_group = getattr(pg_collection, "cp", None) or parallel_state.get_context_parallel_group()
        tp_group = getattr(pg_collection, "tp", None) or parallel_state.get_tensor_model_parallel_group()
        plugin = installed_plugin()
        heads = config.num_attention_heads // tp_group.size()
        kv_heads = max(1, (config.num_query_groups or config.num_attention_heads) // tp_group.size())
        if getattr(config, "multi_latent_attention", False):
            kv_heads = heads
        self.groups = plugin.groups_for(cp_group, heads, config)
        self.options = plugin.options_for(config)
        self._announce(plugin, heads, kv_heads, k_channels or config.kv_channels, v_channels or config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **extra: Any,
    ) -> torch.Tensor:
        """query [s, b, h, d], key [s, b, g, d], value [s, b, g, dv], local tokens -> [s, b, h * dv].

        A causal mask is applied from the token positions; `attention_mask` is then not looked at.
        """
        if packed_seq_params is not None:
            raise NotImplementedError(
                "packed sequences (packed_seq_params) are not supported by --context-parallel-impl loong yet; "
                "train with one document per sequence, or with --context-parallel-impl native"
            )
        if attention_bias is not None:
            raise NotImplementedError("an attention bias is not supported by --context-parallel-impl loong yet")
        mask_type = attn_mask_type or self.attn_mask_type
        if mask_type not in _CAUSAL or (mask_type == AttnMaskType.no_mask and attention_mask is not None):
            raise NotImplementedError(
                f"attention masks of type {mask_type} are not supported by --context-parallel-impl loong yet; "
                f"use {' or '.join(kind.name for kind in _CAUSAL)}"
            )
        out = attention_2d(
            query,
            key,
            value,
            self.groups,
            qkv_format="sbhd",
            causal=_CAUSAL[mask_type],
            softmax_scale=self.softmax_scale,
            kernel=self.options.loong_kernel,
            deterministic=bool(getattr(self.config, "deterministic_mode", False)),
        )
        return out.flatten(2)

    def _refuse(self, attention_type: str, attention_dropout: float | None, extra: dict[str, Any]) -> None:
        asked_for = [refusal.message for refusal in REFUSALS if refusal.asked_for(self.config)]
        if attention_type != "self":
            asked_for.append(f"{attention_type}-attention; only self-attention")
        if attention_dropout:
            asked_for.append(f"an attention dropout of {attention_dropout}; use 0")
        asked_for += [f"{name}={value!r}" for name, value in extra.items() if value not in (None, False, 1)]
        if asked_for:
            raise NotImplementedError(
                "--context-parallel-impl loong does not support yet: " + "; and: ".join(asked_for)
            )

    def _announce(self, plugin: Any, heads: int, kv_heads: int, head_dim: int, value_head_dim: int) -> None:
        hp = self.groups.config.head_parallel_size
        request = KernelRequest(
            device_type=compat.device_type(),
            dtype=self.config.params_dtype,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            query_heads=heads // hp,
            kv_heads=kv_heads * replicas_per_kv_head(kv_heads, hp) // hp,
            deterministic=bool(getattr(self.config, "deterministic_mode", False)),
        )
        kernel = choose_kernel(request, self.options.loong_kernel)
        others = [line for line in explain(request).splitlines() if not line.startswith(f"{kernel.name}:")]
        plugin.announce_once(self.groups, self.options, f"{kernel.name} (not taken: {'; '.join(others)})")
