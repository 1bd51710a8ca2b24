"""The swap: an attention layer's submodules with `LoongCoreAttention` where a stock core attention stood.

It is made when the layer is built, from the class itself, so every spec is covered, whenever it was written and
whoever wrote it: local or TransformerEngine, GPT, hybrid or MLA.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from megatron_loong.integration.checks import refuse
from megatron_loong.integration.compat import group_of
from megatron_loong.integration.core_attention import LoongCoreAttention
from megatron_loong.integration.runtime import Runtime


def swapped_submodules(runtime: Runtime, layer: object, config: Any, submodules: Any) -> Any:
    """`submodules` for a layer under construction: untouched unless it is to run 2D-Attention.

    Raises `ValueError` when 2D-Attention is asked for on `config` itself with a context-parallel size of 1, and
    `NotImplementedError` when it is asked for and the layer has another core attention than Megatron's stock ones.
    """
    chosen = runtime.options(config)
    if not chosen.loong:
        return submodules
    if config.context_parallel_size == 1 and not getattr(config, "hybrid_context_parallel", False):
        # Fine for a tower beside the model (a vision encoder); asked for on this very config, it is a mistake.
        if getattr(config, "context_parallel_impl", "native") == "loong":
            raise ValueError(
                "context_parallel_impl='loong' needs context_parallel_size above 1, which is 1 in the same "
                "TransformerConfig: set it, or leave context_parallel_impl at 'native'"
            )
        return submodules
    refuse(config)
    absorbed = runtime.megatron.absorbed_mla_class
    if absorbed is not None and isinstance(layer, absorbed):
        raise NotImplementedError(
            f"{type(layer).__name__} (absorbed MLA) does not work with --context-parallel-impl loong yet; supported: "
            "multi-latent attention without absorption (or --context-parallel-impl native)"
        )
    swapped = _swapped(getattr(submodules, "core_attention", None), runtime.megatron.stock_core_attentions)
    if swapped is None or not dataclasses.is_dataclass(submodules):
        raise NotImplementedError(
            f"{type(layer).__name__} has the core attention {getattr(submodules, 'core_attention', None)!r}, which "
            "--context-parallel-impl loong cannot take the place of; supported: DotProductAttention and "
            "TEDotProductAttention (or --context-parallel-impl native)"
        )
    return dataclasses.replace(submodules, core_attention=swapped)  # type: ignore[type-var]


def refuse_forgotten_size(runtime: Runtime, model: Any) -> None:
    """Raise `ValueError` where a language model's config has a context-parallel size of 1 and its ranks share batches.

    All its layers would then attend to this rank's tokens alone. A tower beside the model is no `GPTModel`.
    """
    config = model.config
    if config.context_parallel_size != 1 or getattr(config, "hybrid_context_parallel", False):
        return
    cp_group = group_of(getattr(model, "pg_collection", None), "cp")
    if cp_group is not None and cp_group.size() > 1 and runtime.options(config).loong:
        raise ValueError(
            f"context_parallel_size=1 in the TransformerConfig of {type(model).__name__}, but its context-parallel "
            f"group has {cp_group.size()} ranks: no layer would have 2D-Attention, though the ranks share each batch. "
            f"Give TransformerConfig(context_parallel_size={cp_group.size()}, ...)"
        )


def _swapped(core_attention: Any, stock: tuple[Any, ...]) -> Any:
    """The builder with its class replaced: a class, a ModuleSpec or a partial; None when the class is not stock."""
    if isinstance(core_attention, functools.partial):
        inner = _swapped(core_attention.func, stock)
        return inner and functools.partial(inner, *core_attention.args, **core_attention.keywords)
    # `is`, not issubclass: without TransformerEngine its class is a mock.
    if core_attention is LoongCoreAttention or any(core_attention is one for one in stock):
        return LoongCoreAttention
    if dataclasses.is_dataclass(core_attention) and hasattr(core_attention, "module"):
        inner = _swapped(core_attention.module, stock)  # type: ignore[attr-defined]
        return inner and dataclasses.replace(core_attention, module=inner)  # type: ignore[type-var]
    return None
