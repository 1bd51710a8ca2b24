"""The Megatron plugin. Importing it imports neither torch nor Megatron; `install` does."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_loong.integration.options import LoongOptions

# Inside this package, `import megatron_loong.integration.x as x`: `from megatron_loong.integration import x` would
# import what this file imports, and close a circle.
if TYPE_CHECKING:
    from megatron_loong.integration.data_hooks import slice_packed_batch
    from megatron_loong.integration.hooks import install, place_this_process, uninstall

__all__ = ["LoongOptions", "install", "place_this_process", "slice_packed_batch", "uninstall"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = "data_hooks" if name == "slice_packed_batch" else "hooks"
        return getattr(import_module(f"megatron_loong.integration.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
