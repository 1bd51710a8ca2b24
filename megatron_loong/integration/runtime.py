"""What an installed plugin knows: where options come from, which layout they resolve to, and the groups."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

import megatron_loong.integration.compat as compat
import megatron_loong.integration.placement as placement
from megatron_loong.comm.groups import LoongGroups
from megatron_loong.config import LoongConfig
from megatron_loong.integration.checks import check_heads, check_options
from megatron_loong.integration.groups import GroupCache
from megatron_loong.integration.job import job_of
from megatron_loong.integration.options import (
    LoongOptions,
    Source,
    fields_of_attributes,
    merge,
    ranks_per_node,
    resolve,
    resolve_part,
)
from megatron_loong.integration.recompute import RecomputeState
from megatron_loong.layout.placement import cp_ranks_per_node, permuted_ranks


class Members(NamedTuple):
    """The ranks that share one micro-batch, as one of them sees them."""

    global_ranks: tuple[int, ...]
    rank: int
    """This process's place among them."""

    @property
    def size(self) -> int:
        """Megatron's `local_cp_size`."""
        return len(self.global_ranks)


class Runtime:
    """The state behind the hooks: one object from `install` to `uninstall`."""

    def __init__(self, megatron: compat.Megatron, fields: Mapping[str, Any]) -> None:
        self.megatron = megatron
        self.installed_fields = dict(fields)
        """What `install(options)` set."""
        self.parsed: argparse.Namespace | None = None
        """The last arguments that a Megatron parser returned; used until Megatron has global ones."""
        self.groups = GroupCache()
        self.recompute = RecomputeState()
        self.zero_in_effect: str | None = None
        """What the ZeRO flags were translated to; None where they are not set."""
        self.padded = False
        """Whether a batch had to be padded."""
        self.sliced_packs = False
        """Whether a packed batch was cut by our layout."""
        self.hybrid = False
        """Whether Megatron gives each micro-batch ranks of its own (`--hybrid-context-parallel`)."""
        self.members: Members | None = None
        """The ranks of the micro-batch whose attention runs now, where it brings its own."""
        self.in_packed_model = False
        """Whether the forward of a model on a pack of documents runs now."""
        self.cut_embeddings: Any = WeakTensorKeyDictionary()
        """Rotary embeddings of which a rank's rows were taken as those of one sequence."""
        self.documents_of: Any = WeakTensorKeyDictionary()
        """A batch's tokens on this rank -> the documents in it (cu_seqlens), with `--reset-attention-mask`."""
        self.padding_of: Any = WeakTensorKeyDictionary()
        """A batch's tokens on this rank -> which of them are the plugin's padding."""
        self._part_layouts: dict[Any, LoongConfig | None] = {}
        self._said: set[str] = set()

    # ---- options ----

    def args(self) -> argparse.Namespace | None:
        """Megatron's arguments, as far as they are known."""
        return compat.training_args(self.megatron) or self.parsed

    def options(self, config: object = None, args: object = None) -> LoongOptions:
        """Options from `install()`, the command line and `config` (a TransformerConfig); `ValueError` on conflict."""
        args = self.args() if args is None else args
        sources: list[Source] = [("install()", self.installed_fields)]
        if args is not None:
            sources.append(("Megatron's arguments", fields_of_attributes(args)))
        if config is not None:
            sources.append(("the TransformerConfig", fields_of_attributes(config)))
        return merge(sources)

    # ---- layout and groups ----

    def plan_placement(
        self,
        chosen: LoongOptions,
        *,
        world_size: int,
        tp: int,
        cp: int,
        pp: int,
        num_attention_heads: int | None,
        order: str,
    ) -> tuple[int, LoongConfig] | None:
        """The RANK that this process is to take and its layout; None when every rank keeps its place."""
        if chosen.loong_placement in ("head_first", "head-inner-outer") or world_size % (tp * cp * pp):
            return None  # a world that does not divide is Megatron's to refuse
        if chosen.loong_placement == "auto" and job_of(chosen, self.args()) is None:
            return None  # head_first
        groups = compat.context_parallel_groups(self.megatron, world_size=world_size, tp=tp, cp=cp, pp=pp, order=order)
        heads = None if num_attention_heads is None else num_attention_heads // tp
        configs = [config for group in groups if (config := self._resolve(chosen, group, heads, world_size))]
        if len(configs) < len(groups):
            raise ValueError(
                f"--loong-placement {chosen.loong_placement} is decided before the number of attention heads is known; "
                "give --loong-head-parallel-size as a number, and a placement other than auto"
            )
        if not any(map(placement.needs_permutation, configs)):
            return None
        if dist.is_initialized() and placement.placement_in_effect(os.environ) is None:
            raise ValueError(
                f"--loong-placement {chosen.loong_placement} permutes ranks before torch.distributed is initialized, "
                "but it is initialized already; parse the arguments first, or use --loong-placement head_first"
            )
        mine = placement.launcher_rank(os.environ)
        group, config = next((g, c) for g, c in zip(groups, configs, strict=True) if mine in g)
        return permuted_ranks([group], config)[mine], config

    def _resolve(
        self, chosen: LoongOptions, cp_ranks: Sequence[int], heads: int | None, world_size: int
    ) -> LoongConfig | None:
        per_node = ranks_per_node(os.environ, torch.cuda.device_count(), world_size)
        if self.hybrid:
            return self.layout_of_part(chosen, cp_ranks, heads)
        return resolve(
            chosen,
            context_parallel_size=len(cp_ranks),
            heads=heads,
            cp_ranks_in_node=cp_ranks_per_node(cp_ranks, per_node),
            job=job_of(chosen, self.args()),
        )

    def layout(self, chosen: LoongOptions, cp_ranks: Sequence[int], heads: int | None) -> LoongConfig | None:
        """The layout of this process's group; `ValueError` when its placement was asked for and is not in effect."""
        config = self._resolve(chosen, cp_ranks, heads, dist.get_world_size())
        if config is None:
            return None
        wanted = config.describe() if placement.needs_permutation(config) else None
        if wanted != placement.placement_in_effect(os.environ):
            raise ValueError(
                f"--loong-placement {chosen.loong_placement} is not in effect: for '{wanted}' ranks must be "
                "permuted before torch.distributed is initialized, and they were permuted for "
                f"'{placement.placement_in_effect(os.environ)}'. Megatron's argument parser does it; without it, call "
                "megatron_loong.integration.place_this_process(...) first, or use --loong-placement head_first"
            )
        return config

    def layout_of_part(self, chosen: LoongOptions, ranks: Sequence[int], heads: int | None) -> LoongConfig | None:
        """The layout for micro-batches that `ranks` share, by `options.resolve_part`; None while heads are unknown."""
        key = (chosen, tuple(ranks), heads)
        if key not in self._part_layouts:
            per_node = ranks_per_node(os.environ, torch.cuda.device_count(), dist.get_world_size())
            job, longest = job_of(chosen, self.args()), getattr(self.args(), "max_seqlen_per_dp_cp_rank", None)
            if job is not None and longest:  # Megatron's scheduler gives so many ranks nothing longer
                job = dataclasses.replace(job, seq_len=longest * len(ranks))
            in_node = cp_ranks_per_node(ranks, per_node)
            self._part_layouts[key] = resolve_part(chosen, len(ranks), heads=heads, cp_ranks_in_node=in_node, job=job)
        return self._part_layouts[key]

    def build_with_the_world(self, cp_ranks: Sequence[int], timeout: timedelta | None) -> None:
        """Called by every rank once Megatron has its groups; leaves them to the first layer if heads are unknown.

        Where micro-batches bring ranks of their own, the groups of every size, smallest first: later, ranks would meet
        a size at different times.
        """
        self._part_layouts.clear()
        args = self.args()
        chosen = self.options()
        heads = getattr(args, "num_attention_heads", None)
        tp = getattr(args, "tensor_model_parallel_size", 1)
        config = self.layout(chosen, cp_ranks, heads and heads // tp)
        if config is None:
            return
        self.groups.get(config, cp_ranks, local_synchronization=False, timeout=timeout)
        self.say_layout(config)
        for ranks in compat.hybrid_groups(self.megatron) if self.hybrid else []:
            if len(ranks) != len(cp_ranks):  # else they are the same ranks
                part = self.layout_of_part(chosen, ranks, heads and heads // tp)
                assert part is not None  # heads are known
                self.groups.get(part, ranks, local_synchronization=False, timeout=timeout)
                self.say(f"micro-batches on {len(ranks)} ranks: {part.describe()}")

    def groups_of_layer(self, chosen: LoongOptions, cp_ranks: Sequence[int], *, heads: int, tp: int) -> LoongGroups:
        """Groups for an attention layer with `heads` query heads in all; the same object for all such layers."""
        cp = len(cp_ranks)
        check_options(chosen, cp=cp, tp=tp, num_attention_heads=heads, hybrid=self.hybrid)
        config = self.layout(chosen, cp_ranks, heads // tp)
        assert config is not None  # heads are known
        check_heads(config.head_parallel_size, cp=cp, tp=tp, num_attention_heads=heads)
        groups = self.groups.get(config, cp_ranks, local_synchronization=True)
        self.say_layout(config)
        return groups

    def groups_of_members(self, chosen: LoongOptions, members: Members, *, heads: int, tp: int) -> LoongGroups:
        """Groups of the ranks that share a micro-batch, for a layer with `heads` query heads in all.

        Made when Megatron made its own (`build_with_the_world`), or else now, by those ranks alone.
        """
        config = self.layout_of_part(chosen, members.global_ranks, heads // tp)
        assert config is not None  # heads are known
        return self.groups.get(config, members.global_ranks, local_synchronization=True)

    # ---- the log ----

    def say_layout(self, config: LoongConfig) -> None:
        """The resolved layout, once."""
        self.say(f"2D-Attention: {config.describe()}")

    def say_zero(self) -> None:
        """What the ZeRO flags became, once."""
        if self.zero_in_effect:
            self.say(self.zero_in_effect)

    def say(self, text: str) -> None:
        """Print `text` once, on rank 0. Megatron's loggers drop INFO unless asked; its print_rank_0 is a print too."""
        if text not in self._said:
            self._said.add(text)
            if not dist.is_initialized() or dist.get_rank() == 0:
                print("\n".join(f"megatron_loong: {line}" for line in text.splitlines()), flush=True)

    def release(self) -> None:
        """Give back everything: groups, and the rank that the placement took."""
        self.groups.release(also_local=True)
        if not dist.is_initialized():
            placement.give_back_rank(os.environ)


_active: Runtime | None = None


def active() -> Runtime:
    """The installed runtime; `RuntimeError` after `uninstall`."""
    if _active is None:
        raise RuntimeError("megatron_loong is not installed; call megatron_loong.integration.install() first")
    return _active


def activate(runtime: Runtime | None) -> None:
    """Make `runtime` the one that hooks and layers find."""
    global _active
    _active = runtime
