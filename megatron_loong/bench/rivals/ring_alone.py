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
NO_ADAPTER = {
    "TransformerEngine p2p": "no adapter: its ring was never at hand to be tried; Megatron runs it (compare_native.py)",
}


def rings() -> tuple[dict[str, Callable[..., torch.Tensor]], dict[str, str]]:
    """Those that can run as (q, k, v) -> output, and the reasons of the others."""
    found, missing = {}, dict(NO_ADAPTER)
    for name, (module, function) in RINGS.items():
        reason = absent(module.split(".")[0])
        if reason:
            missing[name] = reason
            continue
        install_stand_in()
        without_hugging_face_adapters()
        found[name] = _on_the_world(getattr(import_module(module), function))
    return found, missing


def _on_the_world(function: Any) -> Callable[..., torch.Tensor]:
    def apply(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return function(q, k, v, causal=True, group=dist.group.WORLD)

    return apply
