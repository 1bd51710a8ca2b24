"""megatron_loong: LoongTrain's 2D-Attention (arXiv 2406.18485) as a Megatron-Core plugin.

Importing this package has no side effect and does not import torch; the public names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_loong.config import LoongConfig

if TYPE_CHECKING:
    from megatron_loong.attention.attention_2d import attention_2d
    from megatron_loong.comm.groups import LoongGroups, build_groups
    from megatron_loong.comm.sequence import shard_sequence, unshard_sequence
    from megatron_loong.layout.sharding import token_positions
    from megatron_loong.multimodal.images import deal_images
    from megatron_loong.multimodal.join import join_tokens

__version__ = "0.2.0"

__all__ = [
    "LoongConfig",
    "LoongGroups",
    "attention_2d",
    "build_groups",
    "deal_images",
    "join_tokens",
    "shard_sequence",
    "token_positions",
    "unshard_sequence",
]

_HOME = {
    "LoongGroups": "megatron_loong.comm.groups",
    "attention_2d": "megatron_loong.attention.attention_2d",
    "build_groups": "megatron_loong.comm.groups",
    "deal_images": "megatron_loong.multimodal.images",
    "join_tokens": "megatron_loong.multimodal.join",
    "shard_sequence": "megatron_loong.comm.sequence",
    "token_positions": "megatron_loong.layout.sharding",
    "unshard_sequence": "megatron_loong.comm.sequence",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
