"""The Megatron plugin. Importing it imports neither torch nor Megatron; `install` does."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_loong.integration.options import LoongOptions

if TYPE_CHECKING:
    from megatron_loong.integration.hooks import install, place_this_process, uninstall

__all__ = ["LoongOptions", "install", "place_this_process", "uninstall"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("megatron_loong.integration.hooks"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
