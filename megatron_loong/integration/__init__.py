"""The Megatron-Core plugin. Importing this package imports neither torch nor Megatron."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_loong.integration.arguments import LoongOptions
    from megatron_loong.integration.hooks import install, uninstall

__all__ = ["LoongOptions", "install", "uninstall"]


def __getattr__(name: str) -> Any:
    if name == "LoongOptions":
        from megatron_loong.integration.arguments import LoongOptions

        return LoongOptions
    if name in __all__:
        from megatron_loong.integration import hooks

        return getattr(hooks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
