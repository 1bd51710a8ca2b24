"""Multi-latent attention in Megatron with the latent on the ring (`--loong-mla-latent`).

Megatron expands the latent to keys and values before it calls core attention. With the flag, core attention takes the
latent that went into `linear_kv_up_proj` and that layer's weight instead, and expands on every rank what comes along
the ring. Keys are still made, for their part that carries the position; what else was expanded is not used, and its
gradient is zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

from megatron_loong.attention.heads import latent_is_smaller
from megatron_loong.config import LoongConfig
from megatron_loong.integration.low_precision import asked


class Latent(NamedTuple):
    """What `attention_2d` is given in place of expanded keys and values, sequence first; `t` for packs."""

    k: torch.Tensor
    """[s, b, 1, r] ([t, 1, r])."""
    v: torch.Tensor
    """[s, b, 1, d_rope] ([t, 1, d_rope])."""
    weight: torch.Tensor
    """[h, d_nope + dv, r]."""


class LatentSource:
    """The up-projection of one MLA layer, and the input that it had last."""

    def __init__(self, layer: Any) -> None:
        self._projection = layer.linear_kv_up_proj
        self._nope = layer.config.qk_head_dim
        self._heads = layer.num_attention_heads_per_partition
        self._tp_group = layer.pg_collection.tp
        self._latent: torch.Tensor | None = None
        self._projection.register_forward_pre_hook(self._note)

    def _note(self, module: Any, inputs: tuple[Any, ...]) -> None:
        self._latent = inputs[0]

    def take(self, key: torch.Tensor) -> Latent:
        """The latent of the tokens whose expanded `key` [.., h, d_nope + d_rope] this is; forgets it."""
        latent, self._latent = self._latent, None
        assert latent is not None and latent.shape[:-1] == key.shape[:-2]
        # Every tensor-parallel rank expands it for heads of its own, so its gradient is the sum over them.
        latent = copy_to_tensor_model_parallel_region(latent, group=self._tp_group)
        weight = self._projection.weight.unflatten(0, (self._heads, -1))
        return Latent(latent.unsqueeze(-2), key[..., :1, self._nope :], weight)


def check_latent(layer: Any) -> None:
    """Raise `NotImplementedError` where the latent of an MLA layer cannot be had, or its gradient would be lost."""
    config = layer.config
    obstacles = {
        "--sequence-parallel (the latent is gathered inside the projection)": config.sequence_parallel,
        "gradient accumulation fusion (give --no-gradient-accumulation-fusion)": config.gradient_accumulation_fusion,
        "--recompute-modules mla_up_proj": getattr(layer, "recompute_up_proj", False),
        "a bias in linear layers (give --disable-bias-linear)": config.add_bias_linear,
        f"{asked(config)} (the latent is expanded outside of TransformerEngine's layer)": asked(config) is not None,
    }
    _refuse(name for name, there in obstacles.items() if there)


def attach_before_first_use(layer: Any, layout: LoongConfig) -> None:
    """Let the core attention of an MLA layer have the latent, unless keys and values are fewer bytes.

    The projection is made after the part of the constructor that is hooked, so it is looked for at the first forward.
    """
    config = layer.config
    rope = config.qk_pos_emb_head_dim
    if not latent_is_smaller(
        config.kv_lora_rank + rope,
        config.qk_head_dim + rope + config.v_head_dim,
        layer.num_attention_heads_per_partition,
        layout.head_parallel_size,
        layout.ring_size,
    ):
        return

    def attach(module: Any, inputs: tuple[Any, ...]) -> None:
        hook.remove()
        if hasattr(layer.linear_kv_up_proj, "layer_norm_weight"):
            _refuse(["a projection with a layer norm of its own"])
        layer.core_attention.latent_source = LatentSource(layer)

    hook = layer.register_forward_pre_hook(attach)


def _refuse(obstacles: Iterable[str]) -> None:
    for name in obstacles:
        raise NotImplementedError(
            f"{name} does not work with --loong-mla-latent yet; supported: one of the two without the other"
        )
