"""`parallelize`: a loaded transformers model, so changed that each rank runs it on its own part of the sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

import megatron_loong.hf.compat as compat
import megatron_loong.hf.memory as memory
from megatron_loong.comm.groups import LoongGroups, build_groups
from megatron_loong.config import LoongConfig
from megatron_loong.hf.attention import register
from megatron_loong.hf.checks import check_model
from megatron_loong.hf.loss import causal_loss


def parallelize(
    model: Any,
    sizes: LoongConfig | LoongGroups | Sequence[int],
    *,
    tiled_loss: int = 0,
    tiled_mlp: int = 0,
    selective_checkpoint: bool = False,
    offload: bool = False,
    kernel: str = "auto",
) -> LoongGroups:
    """Make a causal language model of transformers run on parts of a sequence, one part on each rank of a group.

        groups = parallelize(model, LoongConfig(4, 2))
        loss = model(**shard_batch(batch, groups)).loss    # this rank's share of the mean: sum it over the ranks
        loss.backward()                                    # sum the gradients over the ranks too

    `sizes`: a config, or its numbers (context_parallel_size, head_parallel_size, inner_ring_size); then every rank of
    the world calls this (collective), and each run of context_parallel_size consecutive ranks is a group. Or groups
    that exist. The model is changed in place, before DDP or FSDP wraps it: its attention, and its loss, which wants
    labels as `shard_batch` makes them. `model.generate` goes on as before, on each rank by itself, with whole prompts.

    tiled_loss: tokens whose logits exist at a time (0: all). tiled_mlp: parts in which each MLP goes through (0: one).
    selective_checkpoint: every layer is run again in the backward, all but its attention. offload: what those
    checkpoints keep waits in host memory. See docs/memory.md. kernel: as in `attention_2d`.

    Raises `NotImplementedError` for a model that could not be right, by the name of what it has, and `ValueError` for
    sizes that do not fit the world: before anything is changed, on every rank alike.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_model(model, base)
    memory.check(base, tiled_loss=tiled_loss, tiled_mlp=tiled_mlp, offload=offload, selective=selective_checkpoint)
    groups = sizes if isinstance(sizes, LoongGroups) else build_groups_of_world(sizes)
    restore(base)
    _change(base, register(groups, kernel), tiled_loss, tiled_mlp, selective_checkpoint, offload)
    return groups


def _change(base: Any, name: str, tiled_loss: int, tiled_mlp: int, selective: bool, offload: bool) -> None:
    config = base.config.get_text_config()
    undo = [
        compat.quiet_masks(base),
        _set(config, "_attn_implementation", name),
        _set(config, "use_cache", False),  # nothing is generated, and with a cache transformers looks for no packs
        _set(base, "_loss_function", causal_loss),
        _set(base, "generate", functools.partial(_generate_as_before, base)),
    ]
    base._loong = undo, (name, tiled_loss, tiled_mlp, selective, offload)
    if tiled_mlp:
        undo += memory.tile_mlps(base, tiled_mlp)
    if tiled_loss:
        undo += memory.tile_loss(base, tiled_loss)
    if selective:
        undo += memory.checkpoint_layers(base, offload)


def _generate_as_before(base: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` sees whole prompts and a cache: with the model as it was, which is changed again afterwards."""
    options = base._loong[1]
    restore(base)
    try:
        return base.generate(*args, **kwargs)
    finally:
        _change(base, *options)


def restore(model: Any) -> None:
    """Take back all that `parallelize` changed."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    undo, _ = base.__dict__.pop("_loong", ([], None))
    for step in reversed(undo):
        step()


def build_groups_of_world(sizes: LoongConfig | Sequence[int]) -> LoongGroups:
    """The group of this rank, where each run of context_parallel_size consecutive ranks is one. Collective."""
    names = ("context_parallel_size", "head_parallel_size", "inner_ring_size")
    config = sizes if isinstance(sizes, LoongConfig) else LoongConfig.from_dict(dict(zip(names, sizes, strict=False)))
    cp = config.context_parallel_size
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if world % cp:
        fitting = [n for n in range(1, world + 1) if world % n == 0]
        raise ValueError(
            f"context_parallel_size={cp} does not divide the {world} ranks of the world; try one of {fitting}"
            + ("" if dist.is_initialized() else " (torch.distributed is not initialized: start with torchrun)")
        )
    first = rank // cp * cp
    return build_groups(config, range(first, first + cp))


def _set(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """An attribute of this object alone, and how to take it back."""
    known, before = name in vars(owner) or isinstance(getattr(type(owner), name, None), property), None
    if known:
        before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before) if known else delattr(owner, name)
