"""What stands in for TransformerEngine's checkpoint on a CPU, and no tests."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

MODULE = "transformer_engine.pytorch.distributed"
#: Where Megatron holds `te_checkpoint` by value, in one version or another.
HOLDERS = ("megatron.core.transformer.transformer_block", "megatron.core.recompute")


class Reentrant(torch.autograd.Function):
    """As TransformerEngine's: runs without a graph, keeps the inputs, and runs again within backward."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], kwargs: dict[str, Any], *inputs: Any) -> Any:
        ctx.function, ctx.kwargs = function, kwargs
        with torch.no_grad():
            results = function(*inputs, **kwargs)
        ctx.save_for_backward(*(x if torch.is_tensor(x) else None for x in inputs))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inputs = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
        with torch.enable_grad():
            results = ctx.function(*inputs, **ctx.kwargs)
        torch.autograd.backward(results[0], grads[0])
        return None, None, *(None if x is None else x.grad for x in inputs)


def checkpoint(function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
    """`transformer_engine.pytorch.distributed.checkpoint`."""
    for name in ("distribute_saved_activations", "get_rng_state_tracker", "tp_group"):
        del kwargs[name]
    return Reentrant.apply(function, kwargs, *inputs)


def modules() -> Iterator[tuple[str, types.ModuleType]]:
    """The module that Megatron imports it from, after the packages around it."""
    parts = MODULE.split(".")
    for i in range(1, len(parts) + 1):
        name = ".".join(parts[:i])
        module = types.ModuleType(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
        if name == MODULE:
            module.__dict__["checkpoint"] = checkpoint
        yield name, module


def holders() -> list[Any]:
    """Those of `HOLDERS` that there are."""
    return [importlib.import_module(name) for name in HOLDERS if importlib.util.find_spec(name) is not None]


def plant() -> None:
    """For a process of its own in which the plugin is installed: Megatron finds TransformerEngine's checkpoint.

    The plugin's check that its layers are there too is taken away: they are not.
    """
    from megatron.core.extensions import transformer_engine as engine

    from megatron_loong.integration import checks

    sys.modules.update(modules())
    original = engine.te_checkpoint.__wrapped__
    original.__globals__.update(HAVE_TE=True, is_te_min_version=lambda *_: True)
    for holder in holders():
        holder.te_checkpoint = engine.te_checkpoint
    checks.refuse_low_precision = lambda holder: None
