"""Every difference between Megatron versions, found by probing features. Nothing else here asks for a version."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TESTED_VERSIONS = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")


class MissingSeam(RuntimeError):
    """Megatron has no longer, or not yet, what the plugin hooks into."""


@dataclass(frozen=True)
class Seam:
    """An attribute of a module or class of Megatron that the plugin replaces: `getattr(owner, name)`."""

    owner: Any
    name: str

    def get(self) -> Any:
        """What stands there now."""
        return getattr(self.owner, self.name)

    def set(self, value: Any) -> None:
        """Put `value` there."""
        setattr(self.owner, self.name, value)


def _seam(module_name: str, *path: str) -> Seam:
    try:
        owner: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise _missing(module_name, error) from error
    for name in path[:-1]:
        if not hasattr(owner, name):
            raise _missing(f"{module_name}.{name}")
        owner = getattr(owner, name)
    if not callable(getattr(owner, path[-1], None)):
        raise _missing(".".join((module_name, *path)))
    return Seam(owner, path[-1])


def _missing(what: str, cause: Exception | None = None) -> MissingSeam:
    found = importlib.import_module("megatron.core").__version__ if importlib.util.find_spec("megatron") else "none"
    return MissingSeam(
        f"megatron_loong hooks into {what}, which this Megatron-Core ({found}) does not have; "
        f"tested versions: {', '.join(TESTED_VERSIONS)}" + (f". Cause: {cause}" if cause else "")
    )


def core_seams() -> dict[str, Seam]:
    """The seams in megatron.core; `MissingSeam` names the first that is not there."""
    return {
        "initialize_model_parallel": _seam("megatron.core.parallel_state", "initialize_model_parallel"),
        "destroy_model_parallel": _seam("megatron.core.parallel_state", "destroy_model_parallel"),
        "attention": _seam("megatron.core.transformer.attention", "Attention", "__init__"),
        "mla": _seam("megatron.core.transformer.multi_latent_attention", "MultiLatentAttention", "__init__"),
    }


def argument_seam() -> Seam | None:
    """Megatron's argument registration; None where `megatron.training` is not installed (0.16's wheel)."""
    importlib.import_module("megatron.core")
    if "megatron.training" not in sys.modules and importlib.util.find_spec("megatron.training") is None:
        return None
    return _seam("megatron.training.arguments", "add_megatron_arguments")


def stock_core_attentions() -> tuple[Any, ...]:
    """The core attentions that the plugin takes the place of. Compare with `is`: without TransformerEngine the
    second is a mock, of which everything would be a subclass."""
    local = importlib.import_module("megatron.core.transformer.dot_product_attention").DotProductAttention
    try:
        te = importlib.import_module("megatron.core.extensions.transformer_engine").TEDotProductAttention
    except (ImportError, AttributeError):
        return (local,)
    return (local, te)


def cp_groups_before_init(args: Any) -> list[list[int]]:
    """Context-parallel groups that `initialize_model_parallel` will make of these arguments, as global ranks."""
    generator = importlib.import_module("megatron.core.parallel_state").RankGenerator
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    sizes: dict[str, int] = {"tp": tp, "pp": pp, "cp": cp, "ep": 1}
    gtp_remat = getattr(args, "gtp_remat_size", None) or getattr(args, "gtp_remat", None) or 1
    if isinstance(gtp_remat, int) and gtp_remat > 1 and "gtp_remat" in inspect.signature(generator).parameters:
        raise NotImplementedError(
            f"--loong-placement other than head_first is not supported with a gtp_remat size of {gtp_remat}; "
            "use --loong-placement head_first"
        )
    order = "tp-cp-ep-pp-dp" if getattr(args, "use_tp_pp_dp_mapping", False) else "tp-cp-ep-dp-pp"
    world_size = world_size_of_launch()
    return generator(dp=world_size // (tp * pp * cp), order=order, **sizes).get_ranks("cp")


def world_size_of_launch() -> int:
    """WORLD_SIZE of the launcher; 1 without one."""
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_per_node() -> int:
    """LOCAL_WORLD_SIZE of the launcher, else the GPUs of this machine, else the whole world."""
    import os

    import torch

    given = os.environ.get("LOCAL_WORLD_SIZE")
    return int(given) if given else torch.cuda.device_count() or world_size_of_launch()


def device_type() -> str:
    """Where Megatron puts tensors: asks a tensor, because CPU mode answers for `torch.cuda`."""
    import torch

    return torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu").device.type


def argument_of(function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value that a call `function(*args, **kwargs)` gives to parameter `name`, defaults included."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments.get(name)
