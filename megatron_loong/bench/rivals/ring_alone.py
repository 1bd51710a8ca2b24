"""Other people's rings as one rank sees them: their code as installed, on `local_copies` for a network.

`torch.distributed` must believe in the world: `local_copies.init_world_of_one`. Tensors are [b, s, heads, d], zigzag.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from megatron_loong.bench.rivals.flash_attn_stand_in import install_stand_in
from megatron_loong.bench.rivals.others import absent, without_hugging_face_adapters

#: Name -> (module, function).
RINGS = {
    "ring-flash-attn zigzag": ("ring_flash_attn", "zigzag_ring_flash_attn_func"),
    "yunchang zigzag ring": ("yunchang.ring", "zigzag_ring_flash_attn_func"),
}
TRANSFORMER_ENGINE = "TransformerEngine p2p"


def rings() -> tuple[dict[str, Callable[..., torch.Tensor]], dict[str, str]]:
    """Those that can run as (q, k, v) -> output, and the reasons of the others."""
    found: dict[str, Callable[..., torch.Tensor]] = {}
    missing: dict[str, str] = {}
    for name, (module, function) in RINGS.items():
        reason = absent(module.split(".")[0])
        if reason:
            missing[name] = reason
            continue
        install_stand_in()
        without_hugging_face_adapters()
        found[name] = _on_the_world(getattr(import_module(module), function))
    reason = absent("transformer_engine") or (None if torch.cuda.is_available() else "needs a GPU")
    if reason:
        missing[TRANSFORMER_ENGINE] = reason
    else:
        found[TRANSFORMER_ENGINE] = _transformer_engine(torch.cuda.Stream())
    return found, missing


def _transformer_engine(stream: Any) -> Callable[..., torch.Tensor]:
    """Megatron's own context parallelism: the module that it builds, with `cp_comm_type="p2p"`."""
    modules: dict[tuple[int, int, int], Any] = {}

    def apply(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads, width, kv_heads = key = q.shape[2], q.shape[3], k.shape[2]
        if key not in modules:
            modules[key] = import_module("transformer_engine.pytorch").DotProductAttention(
                heads,
                width,
                num_gqa_groups=kv_heads,
                attention_dropout=0.0,
                qkv_format="bshd",
                attn_mask_type="causal",
            )
            ranks = list(range(dist.get_world_size()))
            modules[key].set_context_parallel_group(dist.group.WORLD, ranks, stream, cp_comm_type="p2p")
        return modules[key](q, k, v).unflatten(-1, (heads, width))

    return apply


def _on_the_world(function: Any) -> Callable[..., torch.Tensor]:
    def apply(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return function(q, k, v, causal=True, group=dist.group.WORLD)

    return apply
