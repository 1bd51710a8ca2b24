"""`LoongCoreAttention`: Megatron's core-attention contract on one side, `attention_2d` on the other."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from megatron_loong.attention.attention_2d import attention_2d, kernel_request
from megatron_loong.integration import compat, runtime
from megatron_loong.integration.checks import check_options, refuse
from megatron_loong.integration.lengths import refuse_seen_padding
from megatron_loong.integration.packed import packed_arguments
from megatron_loong.kernels.registry import choose_kernel, explain
from megatron_loong.topology.groups import LoongGroups

#: Mask types whose meaning does not depend on a mask tensor: what `attention_2d(causal=...)` is given for each.
#: `causal_bottom_right` differs from `causal` only where queries and keys differ in number, which is refused later.
CAUSAL_OF = {AttnMaskType.causal: True, AttnMaskType.causal_bottom_right: True, AttnMaskType.no_mask: False}


class LoongCoreAttention(MegatronModule):
    """2D-Attention in the place of `DotProductAttention` / `TEDotProductAttention`. No parameters, no state.

    Not a subclass of either: the local one refuses context parallelism in its constructor, the other is a mock
    where TransformerEngine is missing. All layers share one `LoongGroups`.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        num_splits: int | None = None,
        *,
        groups: LoongGroups | None = None,
        **unknown: Any,
    ) -> None:
        """Megatron's constructor contract; `groups` in place of those that the installed plugin would build.

        `k_channels` and `v_channels` (MLA) are the head widths of k and v. `num_splits` tunes one of
        TransformerEngine's kernels and changes no result. Collective over the context-parallel group at the first
        layer, unless Megatron's `initialize_model_parallel` has built the groups. Raises `ValueError` and
        `NotImplementedError` as `checks` says, on every rank alike.
        """
        super().__init__(config=config)
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        self.v_channels = v_channels
        _refuse_construction(config, attention_type, attention_dropout, unknown)
        chosen = runtime.active().options(config) if groups is None else None
        if chosen is not None:
            check_options(chosen, cp=config.context_parallel_size, cp_comm_type=cp_comm_type)
            groups = _groups_for(config, pg_collection, chosen)
        assert groups is not None
        self.groups = groups
        self.plugin = None if chosen is None else runtime.active()
        self.kernel = "auto" if chosen is None else chosen.loong_kernel
        self._kernel_said = chosen is None  # without the plugin, nobody logs
        # `apply_query_key_layer_scaling` divides by the layer number before a half-precision softmax and multiplies
        # again inside it. Scores are float32 here, so there is nothing to divide.
        self.softmax_scale = 1 / math.sqrt(k_channels or config.kv_channels) if softmax_scale is None else softmax_scale
        self.deterministic = bool(getattr(config, "deterministic_mode", False))
        self.softmax_offset = None  # read by Megatron where sinks are in use
        self.current_max_attn_logits = None  # read by --qk-clip

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **unknown: Any,
    ) -> torch.Tensor:
        """Attention over the whole sequence for this rank's tokens.

        Shapes: query [s, b, h, d], key [s, b, g, d], value [s, b, g, dv] with s = S / cp_size; returns
        [s, b, h * dv]. With `packed_seq_params`: [t, h, d] to [t, h * dv]. As with TransformerEngine, a causal mask
        type ignores `attention_mask`. Raises `NotImplementedError` for biases and masks that only a tensor can
        describe.
        """
        causal = causal_of(self.attn_mask_type if attn_mask_type is None else attn_mask_type, attention_mask)
        _refuse_inputs(attention_bias, unknown)
        cp_size = self.groups.config.context_parallel_size
        if packed_seq_params is None:
            extra: dict[str, Any] = {"qkv_format": "sbhd"}
            if self.plugin is not None:
                refuse_seen_padding(self.plugin, causal)
            self._say_kernel(query, key, value)
        else:
            extra = packed_arguments(
                packed_seq_params, query.shape[0], cp_size, causal=causal, config=self.config, state=self.plugin
            )
            extra["qkv_format"] = "thd"
            self._say_kernel(*(x.unsqueeze(1) for x in (query, key, value)))
        out = attention_2d(
            query,
            key,
            value,
            self.groups,
            causal=causal,
            softmax_scale=self.softmax_scale,
            kernel=self.kernel,
            deterministic=self.deterministic,
            **extra,
        )
        return out.flatten(-2)

    def _say_kernel(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Log once which kernel serves, and why not the others; known only now that there are tensors."""
        if self._kernel_said:
            return
        self._kernel_said = True
        request = kernel_request(query, key, value, self.groups.config.head_parallel_size, self.deterministic)
        taken = choose_kernel(request, self.kernel).name
        others = [line for line in explain(request, self.kernel).splitlines() if not line.startswith(f"{taken}:")]
        runtime.active().say(f"attention kernel {taken} (--loong-kernel {self.kernel}); " + "; ".join(others))


def causal_of(mask_type: AttnMaskType, attention_mask: torch.Tensor | None) -> bool:
    """Whether a mask type is causal (True) or full (False); `NotImplementedError` when it needs the mask tensor."""
    if mask_type in CAUSAL_OF:
        return CAUSAL_OF[mask_type]
    # "causal, and the mask says what is padding": without a mask, only causal is left.
    if mask_type is AttnMaskType.padding_causal and attention_mask is None:
        return True
    raise NotImplementedError(
        f"attention mask type {getattr(mask_type, 'name', mask_type)} does not work with --context-parallel-impl loong "
        f"yet; supported: {', '.join(kind.name for kind in CAUSAL_OF)} (or --context-parallel-impl native)"
    )


def _groups_for(config: Any, pg_collection: Any, chosen: Any) -> LoongGroups:
    plugin = runtime.active()
    cp_group = compat.group_of(pg_collection, "cp")
    if cp_group is None:
        cp_group = plugin.megatron.parallel_state.get_context_parallel_group()
    tp_group = compat.group_of(pg_collection, "tp")
    cp_ranks = dist.get_process_group_ranks(cp_group)
    if len(cp_ranks) != config.context_parallel_size:
        raise ValueError(
            f"context_parallel_size={config.context_parallel_size} in the TransformerConfig, but the context-parallel "
            f"group has {len(cp_ranks)} ranks; make them equal"
        )
    tp = config.tensor_model_parallel_size if tp_group is None else tp_group.size()
    return plugin.groups_of_layer(chosen, cp_ranks, heads=config.num_attention_heads, tp=tp)


def _refuse_construction(
    config: Any, attention_type: str, attention_dropout: float | None, unknown: dict[str, Any]
) -> None:
    refuse(config)
    supported = "supported: self-attention with Megatron's own arguments (or --context-parallel-impl native)"
    if attention_type != "self":
        raise NotImplementedError(
            f"attention_type={attention_type!r} does not work with --context-parallel-impl loong yet; {supported}"
        )
    if attention_dropout:
        raise NotImplementedError(
            f"attention_dropout={attention_dropout} does not work with --context-parallel-impl loong yet; "
            "supported: --attention-dropout 0"
        )
    given = sorted(name for name, value in unknown.items() if value is not None)
    if given:
        raise NotImplementedError(f"LoongCoreAttention does not know {', '.join(given)} yet; {supported}")


def _refuse_inputs(attention_bias: object, unknown: dict[str, Any]) -> None:
    given = sorted(name for name, value in unknown.items() if value is not None)
    reason = None
    if attention_bias is not None:
        reason, instead = "an attention bias", "rotary or no position embedding"
    elif given:
        reason, instead = f"core attention with {', '.join(given)}", "dot-product attention or multi-latent attention"
    if reason:
        raise NotImplementedError(
            f"{reason} does not work with --context-parallel-impl loong yet; "
            f"supported: {instead} (or --context-parallel-impl native)"
        )
