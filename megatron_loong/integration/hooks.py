"""`install()` and `uninstall()`: four seams of Megatron, replaced as attributes and put back as they were."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_loong.integration import compat
from megatron_loong.integration.arguments import LoongOptions, add_flags
from megatron_loong.integration.plugin import Plugin

_installed: Plugin | None = None
_originals: dict[str, tuple[compat.Seam, Any]] = {}


def install(options: LoongOptions | Mapping[str, Any] | str | Path | None = None) -> None:
    """Hook megatron_loong into Megatron-Core. Nothing changes for who does not ask for `loong`.

    `options`: None, to take them from Megatron's command line or from attributes of the TransformerConfig; or
    `LoongOptions`, a mapping or the path of a YAML file, for users who build configs without argparse. A second
    call replaces the options. Raises `MissingSeam` for a Megatron without what the plugin hooks into, `ValueError`
    for options that make no sense.
    """
    global _installed
    given = _as_options(options)
    if _installed is not None:
        _installed.given = given
        return
    plugin = Plugin(given)
    seams: dict[str, compat.Seam] = compat.core_seams()
    # Who gives options here builds configs without Megatron's parser and need not have what it imports.
    arguments = compat.argument_seam() if given is None else None
    if arguments is not None:
        seams["arguments"] = arguments
    for name, seam in seams.items():
        original = seam.get()
        _originals[name] = (seam, original)
        seam.set(_HOOKS[name](original, plugin))
    _installed = plugin


def uninstall() -> None:
    """Put Megatron back as it was and release the groups. Does nothing when not installed."""
    global _installed
    if _installed is None:
        return
    _installed.release_groups()
    for seam, original in _originals.values():
        seam.set(original)
    _originals.clear()
    _installed = None


def installed_plugin() -> Plugin:
    """The plugin in force; `RuntimeError` when there is none."""
    if _installed is None:
        raise RuntimeError("megatron_loong is not installed; call megatron_loong.integration.install() first")
    return _installed


def _as_options(options: LoongOptions | Mapping[str, Any] | str | Path | None) -> LoongOptions | None:
    if isinstance(options, (str, Path)):
        return LoongOptions.from_yaml(options)
    if isinstance(options, Mapping):
        return LoongOptions.from_mapping(options)
    return options


def _hook_arguments(original: Callable[..., Any], plugin: Plugin) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_megatron_arguments(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> argparse.ArgumentParser:
        parser = original(parser, *args, **kwargs)
        add_flags(parser)
        parse_known_args = parser.parse_known_args

        def parse_and_check(*a: Any, **k: Any) -> Any:
            # parse_args of argparse comes through here too. Megatron reads RANK only after it.
            parsed, rest = parse_known_args(*a, **k)
            plugin.on_arguments(parsed)
            return parsed, rest

        parser.parse_known_args = parse_and_check  # type: ignore[method-assign]
        return parser

    return add_megatron_arguments


def _hook_initialize(original: Callable[..., Any], plugin: Plugin) -> Callable[..., Any]:
    @functools.wraps(original)
    def initialize_model_parallel(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        from megatron.core import parallel_state

        minutes = compat.argument_of(original, "distributed_timeout_minutes", args, kwargs)
        ranks = dist.get_process_group_ranks(parallel_state.get_context_parallel_group())
        plugin.on_model_parallel(ranks, timedelta(minutes=minutes) if minutes else None)
        return result

    return initialize_model_parallel


def _hook_destroy(original: Callable[..., Any], plugin: Plugin) -> Callable[..., Any]:
    @functools.wraps(original)
    def destroy_model_parallel(*args: Any, **kwargs: Any) -> Any:
        plugin.release_groups()
        return original(*args, **kwargs)

    return destroy_model_parallel


def _hook_attention(original: Callable[..., Any], plugin: Plugin) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: Any, config: Any, submodules: Any, *args: Any, **kwargs: Any) -> None:
        original(self, config, _with_our_core_attention(config, submodules, plugin), *args, **kwargs)

    return __init__


def _with_our_core_attention(config: Any, submodules: Any, plugin: Plugin) -> Any:
    """`submodules` with `core_attention` swapped, when this model's context parallelism is ours."""
    if config.context_parallel_size <= 1 or not plugin.options_for(config).enabled:
        return submodules
    from megatron_loong.integration.core_attention import LoongCoreAttention

    spec = submodules.core_attention
    module = getattr(spec, "module", spec)  # a ModuleSpec, or the class itself
    if module is LoongCoreAttention:
        return submodules
    if not any(module is stock for stock in compat.stock_core_attentions()):
        raise NotImplementedError(
            f"--context-parallel-impl loong takes the place of Megatron's DotProductAttention and "
            f"TEDotProductAttention, not of {getattr(module, '__name__', module)}; "
            "use one of them in the layer spec, or --context-parallel-impl native"
        )
    ours = dataclasses.replace(spec, module=LoongCoreAttention) if spec is not module else LoongCoreAttention
    return dataclasses.replace(submodules, core_attention=ours)


_HOOKS = {
    "arguments": _hook_arguments,
    "initialize_model_parallel": _hook_initialize,
    "destroy_model_parallel": _hook_destroy,
    "attention": _hook_attention,
    "mla": _hook_attention,
}
