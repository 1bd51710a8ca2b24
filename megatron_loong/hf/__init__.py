"""Long sequences in Hugging Face transformers: `parallelize` for a model, `with_loong` for a Trainer.

Importing this imports neither transformers nor torch; the names load on first use. Needs no Megatron.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_loong.hf.data import ShardCollator, data_loader, shard_batch
    from megatron_loong.hf.model import parallelize
    from megatron_loong.hf.trainer import with_loong

__all__ = ["ShardCollator", "data_loader", "parallelize", "shard_batch", "with_loong"]

_HOME = {"ShardCollator": "data", "data_loader": "data", "parallelize": "model", "shard_batch": "data"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"megatron_loong.hf.{_HOME.get(name, 'trainer')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
