"""`LoongCoreAttention`: Megatron's core-attention contract on one side, `attention_2d` on the other."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint

import megatron_loong.integration.compat as compat
import megatron_loong.integration.runtime as runtime
from megatron_loong.attention.attention_2d import attention_2d
from megatron_loong.attention.options import AttentionOptions
from megatron_loong.attention.stash import Level, keeping
from megatron_loong.comm.groups import LoongGroups
from megatron_loong.integration.checks import (
    check_options,
    refuse_beside_contiguous,
    refuse_beside_hybrid,
    refuse_construction,
    refuse_inputs,
)
from megatron_loong.integration.dynamic import members_of
from megatron_loong.integration.latent import LatentSource
from megatron_loong.integration.lengths import refuse_seen_padding
from megatron_loong.integration.low_precision import kernel_of_layer
from megatron_loong.integration.packed import packed_arguments
from megatron_loong.integration.recompute import level_of_layer
from megatron_loong.integration.reset_mask import refuse_lost_documents
from megatron_loong.kernels.interface import KernelRequest
from megatron_loong.kernels.registry import choose_kernel, explain, in_fp8

#: Mask types whose meaning does not depend on a mask tensor: what `attention_2d(causal=...)` is given for each. With
#: as many keys as queries `causal` is `causal_bottom_right`; with others `attention_2d` is bottom-right.
CAUSAL_OF = {AttnMaskType.causal: True, AttnMaskType.causal_bottom_right: True, AttnMaskType.no_mask: False}


class LoongCoreAttention(MegatronModule):
    """2D-Attention in the place of `DotProductAttention` / `TEDotProductAttention`.

    Its one parameter is `softmax_offset` [heads of a TP rank], with `--softmax-type learnable`. Not a subclass of
    either: the local one refuses context parallelism in its constructor, the other is a mock where TransformerEngine
    is missing. All layers share one `LoongGroups`.
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
        refuse_construction(config, attention_type, unknown)
        chosen = runtime.active().options(config) if groups is None else None
        if chosen is not None:
            hybrid = bool(getattr(config, "hybrid_context_parallel", False))
            runtime.active().hybrid |= hybrid
            refuse_beside_hybrid(chosen, config)
            refuse_beside_contiguous(chosen, config)
            check_options(chosen, cp=config.context_parallel_size, cp_comm_type=cp_comm_type, hybrid=hybrid)
            groups = _groups_for(config, pg_collection, chosen)
        assert groups is not None
        self.groups = groups
        self.chosen = chosen
        # With groups of one's own, whoever checkpoints decides what is kept.
        self.kept_in_checkpoint: Level = "ring" if chosen is None else level_of_layer(chosen, config, layer_number)
        self.plugin = None if chosen is None else runtime.active()
        self.kernel = kernel_of_layer("auto" if chosen is None else chosen.loong_kernel, config, self.layer_number)
        self.gradient_wire = "auto" if chosen is None else chosen.loong_gradient_wire
        self._kernel_said = chosen is None  # without the plugin, nobody logs
        # `apply_query_key_layer_scaling` divides by the layer number before a half-precision softmax and multiplies
        # again inside it. Scores are float32 here, so there is nothing to divide.
        self.softmax_scale = 1 / math.sqrt(k_channels or config.kv_channels) if softmax_scale is None else softmax_scale
        self.deterministic = bool(getattr(config, "deterministic_mode", False))
        self.window_size = _window_of_layer(config, self.layer_number)
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.tp_group = compat.group_of(pg_collection, "tp")
        self._make_softmax_offset()
        self.latent_source: LatentSource | None = None
        """Set by `latent.attach_before_first_use` where the latent is to travel."""
        # Raised by every forward where asked for, read and put back to None by --qk-clip.
        self.current_max_attn_logits: torch.Tensor | None = None
        self._wants_max_logits = any(getattr(config, name, False) for name in ("qk_clip", "log_max_attention_logit"))
        self._check_kernel(k_channels, v_channels)

    def _make_softmax_offset(self) -> None:
        """Megatron's sinks: none, zeros, or a parameter, of the size of this TP rank's heads."""
        kind = getattr(self.config, "softmax_type", "vanilla")
        heads = self.config.num_attention_heads // self.config.tensor_model_parallel_size
        if kind == "vanilla":
            self.softmax_offset = None
            return
        offset = torch.zeros(self.config.num_attention_heads, device=_device(), dtype=self.config.params_dtype)
        if kind == "off-by-one":
            self.softmax_offset = offset[:heads]
        elif kind == "learnable":
            # Every rank draws the sinks of all heads and keeps its own: the same ones for any tensor parallel size.
            if self.config.perform_initialization and self.config.init_method is not None:
                self.config.init_method(offset)
            first = self._tp_rank() * heads
            self.softmax_offset = torch.nn.Parameter(offset[first : first + heads].clone())
            # Megatron's own attention does not mark it: its gradient norm then has the sinks of TP rank 0 alone.
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)
        else:
            raise ValueError(f"--softmax-type {kind} is unknown; use vanilla, off-by-one or learnable")

    def _tp_rank(self) -> int:
        if self.config.tensor_model_parallel_size == 1:
            return 0
        return get_tensor_model_parallel_rank() if self.tp_group is None else self.tp_group.rank()

    def _check_kernel(self, k_channels: int | None, v_channels: int | None) -> None:
        """Find now, on every rank alike, that no kernel here has what the configuration asks for."""
        config = self.config
        tp, width = config.tensor_model_parallel_size, config.kv_channels
        heads = config.num_attention_heads // tp
        kv_heads = heads if config.multi_latent_attention else max(1, (config.num_query_groups or heads * tp) // tp)
        dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else config.params_dtype
        assert width is not None  # TransformerConfig fills it in
        shapes = ((heads, k_channels or width), (kv_heads, k_channels or width), (kv_heads, v_channels or width))
        q, k, v = (torch.empty(1, 1, *shape, dtype=dtype, device="meta") for shape in shapes)
        request = dataclasses.replace(self._request(q, k, v), device_type=_device().type)
        try:
            choose_kernel(request, self.kernel)
        except ValueError as error:
            if request.dropout:
                asked = f"--attention-dropout {self.attention_dropout} (Megatron's default is 0.1)"
                instead = "give --attention-dropout 0"
            elif in_fp8(self.kernel) and getattr(config, "fp8_dot_product_attention", False):
                asked = "fp8_dot_product_attention"
                instead = "leave it out: the linear layers are then in fp8, attention in bfloat16"
            else:
                raise
            raise ValueError(f"{asked}: {error}\n(or {instead})") from None

    def _request(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, varying: bool = False
    ) -> KernelRequest:
        options = AttentionOptions(
            window_size=self.window_size,
            dropout_p=self.attention_dropout,
            deterministic=self.deterministic,
            varying_lengths=varying,
        )
        return options.request(query, key, value, self.groups.config.head_parallel_size)

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
        [s, b, h * dv]. With `packed_seq_params`: [t, h, d] to [t, h * dv], and over the ranks that its `cp_group` or
        `local_cp_size` names, if any. As with TransformerEngine, a causal mask type ignores `attention_mask`. In
        cross-attention key and value are this rank's share of the other sequence.
        Raises `NotImplementedError` for biases and masks that only a tensor can describe.
        """
        causal = causal_of(self.attn_mask_type if attn_mask_type is None else attn_mask_type, attention_mask)
        refuse_inputs(attention_bias, unknown)
        groups = self._groups_of(packed_seq_params)
        cp = groups.config.context_parallel_size
        # "sbhd" is not packed: hybrid context parallelism before 0.18 brings its group that way, LLaVA whole sequences.
        if packed_seq_params is None or packed_seq_params.qkv_format == "sbhd":
            lengths: dict[str, Any] = {"qkv_format": "sbhd", "seq_len": query.shape[0] * cp}
            if self.attention_type == "cross":
                lengths["kv_seq_len"] = key.shape[0] * cp
            if self.plugin is not None:
                refuse_seen_padding(self.plugin, causal)
                refuse_lost_documents(self.plugin)
            # Nothing else would tell `attention_2d` that the next length is another. (In a graph it is not.)
            varying = packed_seq_params is not None or self.config.variable_seq_lengths
            self._say_kernel(query, key, value, varying)
            lengths["varying_lengths"] = varying
        else:
            lengths = packed_arguments(
                packed_seq_params,
                query.shape[0],
                cp,
                causal=causal,
                config=self.config,
                state=self.plugin,
                pack_layout=groups.config.pack_layout,
            )
            lengths["qkv_format"] = "thd"
            self._say_kernel(*(x.unsqueeze(1) for x in (query, key, value)), varying=True)
        value_width = value.shape[-1]
        if self.latent_source is not None:
            key, value, lengths["kv_up_weight"] = self.latent_source.take(key)
        compiling = torch.compiler.is_compiling()
        with contextlib.nullcontext() if compiling else keeping(self.kept_in_checkpoint):
            out = attention_2d(
                query,
                key,
                value,
                groups,
                causal=causal,
                softmax_scale=self.softmax_scale,
                window_size=self.window_size,
                dropout_p=self.attention_dropout if self.training else 0.0,
                dropout_seed=self._dropout_seed(),
                softmax_offset=self.softmax_offset,
                max_logits=self._max_logits(query),
                kernel=self.kernel,
                gradient_wire=self.gradient_wire,
                deterministic=self.deterministic,
                **lengths,
            )
        # In packs Megatron widens the values of multi-latent attention, and cuts the output back to their width.
        if out.shape[-1] < value_width:
            out = torch.nn.functional.pad(out, (0, value_width - out.shape[-1]))
        return out.flatten(-2)

    def _groups_of(self, packed_seq_params: Any) -> LoongGroups:
        """The layer's own, or those of the ranks that share this micro-batch alone."""
        members = members_of(packed_seq_params)
        if members is None or members.global_ranks == self.groups.cp_global_ranks:
            return self.groups
        if self.plugin is None or self.chosen is None:
            raise NotImplementedError(
                f"packed_seq_params.cp_group of ranks {list(members.global_ranks)} does not work with a layer that was "
                f"given groups of ranks {list(self.groups.cp_global_ranks)}; supported: the groups of the plugin"
            )
        tp = self.config.tensor_model_parallel_size
        return self.plugin.groups_of_members(self.chosen, members, heads=self.config.num_attention_heads, tp=tp)

    def _dropout_seed(self) -> int | None:
        """A number from Megatron's RNG, which recomputation puts back before it replays the layer."""
        if not self.attention_dropout or not self.training:
            return None
        tracker = get_cuda_rng_tracker()
        assert tracker is not None
        with contextlib.nullcontext() if self.config.sequence_parallel else tracker.fork():
            return int(torch.randint(2**62, (), device=_device()))

    def _max_logits(self, query: torch.Tensor) -> torch.Tensor | None:
        """Where `--qk-clip` finds the greatest score of each head; it takes the maximum over the ranks itself."""
        if not self._wants_max_logits:
            return None
        if self.current_max_attn_logits is None:
            self.current_max_attn_logits = torch.full((query.shape[2],), -torch.inf, device=query.device)
        return self.current_max_attn_logits

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As `DotProductAttention`'s: `softmax_offset`, where it is learned, split over tensor-parallel ranks."""
        if not isinstance(self.softmax_offset, torch.nn.Parameter):
            return {}
        return make_sharded_tensors_for_checkpoint(
            {"softmax_offset": self.softmax_offset},
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )

    def _say_kernel(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, varying: bool) -> None:
        """Log once which kernel serves, and why not the others; known only now that there are tensors."""
        if self._kernel_said or torch.compiler.is_compiling():
            return
        self._kernel_said = True
        request = self._request(query, key, value, varying)
        taken = choose_kernel(request, self.kernel).name
        others = [line for line in explain(request, self.kernel).splitlines() if not line.startswith(f"{taken}:")]
        runtime.active().say(f"attention kernel {taken} (--loong-kernel {self.kernel}); " + "; ".join(others))


def _device() -> torch.device:
    """Where Megatron puts its tensors; in CPU mode `torch.cuda` is played by the CPU."""
    return torch.empty(0, device=torch.cuda.current_device() if torch.cuda.is_available() else "cpu").device


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


def _window_of_layer(config: Any, layer_number: int) -> tuple[int, int] | None:
    """`--window-size` where `--window-attn-skip-freq` lets this layer (counted from 1) have it."""
    window = getattr(config, "window_size", None)
    if not window or not is_layer_window_attention(window, config.window_attn_skip_freq, layer_number):
        return None
    return tuple(window)


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
