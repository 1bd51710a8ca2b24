"""What is installed: the options in force, the groups that were built, and the one line that says so."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_loong.config import LoongConfig
from megatron_loong.integration import compat
from megatron_loong.integration.arguments import LoongOptions, check_arguments, check_heads, resolve
from megatron_loong.topology.groups import LoongGroups, build_groups
from megatron_loong.topology.placement import permuted_ranks

#: The rank that the launcher gave this process, kept for child processes and a second parse of the arguments.
LAUNCH_RANK = "MEGATRON_LOONG_LAUNCH_RANK"


@dataclass(eq=False)
class Plugin:
    """State of one `install`. Hooks hold a reference to it; nothing else is global."""

    given: LoongOptions | None = None
    """Options given to `install`."""
    parsed: LoongOptions | None = None
    """Options read from Megatron's command line."""
    heads_per_tp_rank: int | None = None
    groups: dict[tuple[int, ...], LoongGroups] = field(default_factory=dict)
    """By the global ranks of the context-parallel group."""
    timeout: timedelta | None = None
    _announced: set[str] = field(default_factory=set)

    def options_for(self, config: Any = None) -> LoongOptions:
        """The options in force for a model with this TransformerConfig.

        From `install(options)`, the command line, or attributes on the config; `ValueError` when two sources that
        both speak contradict each other.
        """
        native = LoongOptions()
        from_config = LoongOptions.from_attributes(config) if config is not None else native
        spoken = {"install(options=...)": self.given, "the command line": self.parsed, "the config": from_config}
        spoken = {source: options for source, options in spoken.items() if options not in (None, native)}
        if len(set(spoken.values())) > 1:
            raise ValueError(
                "megatron_loong was given options that contradict each other; give them in one place: "
                + "; ".join(f"{source}: {options}" for source, options in spoken.items())
            )
        return next((options for options in spoken.values() if options is not None), native)

    def on_arguments(self, args: Any) -> None:
        """Megatron's command line was parsed: check it, and take the rank that the placement gives this process."""
        self.parsed = LoongOptions.from_attributes(args)
        options = self.options_for()
        if not options.enabled:
            return
        check_arguments(options, args)
        heads = getattr(args, "num_attention_heads", None)
        tp = args.tensor_model_parallel_size
        self.heads_per_tp_rank = heads // tp if heads else None
        cp, pp, world_size = (
            args.context_parallel_size,
            args.pipeline_model_parallel_size,
            compat.world_size_of_launch(),
        )
        if world_size % (tp * pp * cp):
            return  # Megatron says so itself, better
        groups = compat.cp_groups_before_init(args)
        config = resolve(options, groups[0], self.heads_per_tp_rank, compat.ranks_per_node())
        taken = permuted_ranks(groups, config)
        launched_as = int(os.environ.setdefault(LAUNCH_RANK, os.environ.get("RANK", "0")))
        # LOCAL_RANK, the device, stays; the process on it takes the rank whose coordinate belongs there.
        os.environ["RANK"] = str(taken[launched_as])

    def on_model_parallel(self, cp_global_ranks: list[int], timeout: timedelta | None) -> None:
        """Megatron made its groups; every rank of the world is here, so ours are made collectively."""
        options = self.options_for()
        self.timeout = timeout
        if not options.enabled:
            return
        if len(cp_global_ranks) == 1:
            raise ValueError(
                "--context-parallel-impl loong needs a context-parallel size of at least 2; "
                "leave it out to train without context parallelism"
            )
        if options.loong_head_parallel_size == "auto" and self.heads_per_tp_rank is None:
            return  # built with the first attention layer, which knows the heads
        config = self._resolve(options, cp_global_ranks, self.heads_per_tp_rank)
        self.groups[tuple(cp_global_ranks)] = build_groups(config, cp_global_ranks, timeout=timeout)

    def groups_for(self, cp_group: dist.ProcessGroup, heads_per_tp_rank: int, model_config: Any) -> LoongGroups:
        """Groups for an attention layer over `cp_group`; made now, by its members alone, when nobody made them yet.

        Users who bring their own process groups never call `initialize_model_parallel`.
        """
        ranks = tuple(dist.get_process_group_ranks(cp_group))
        if ranks not in self.groups:
            options = self.options_for(model_config)
            config = self._resolve(options, list(ranks), heads_per_tp_rank)
            self.groups[ranks] = build_groups(config, ranks, timeout=self.timeout, local_synchronization=True)
        groups = self.groups[ranks]
        check_heads(heads_per_tp_rank, groups.config.head_parallel_size, len(ranks))
        return groups

    def release_groups(self) -> None:
        """Give all communicators back."""
        groups, self.groups = self.groups, {}
        for one in groups.values():
            one.destroy()

    def announce_once(self, groups: LoongGroups, options: LoongOptions, kernel: str) -> None:
        """One line in the training log; printed, because Megatron's logging filters INFO."""
        placed = replace(groups.config, placement=options.loong_placement)
        line = f"megatron_loong: {placed.describe()}; kernel {kernel}"
        if line not in self._announced and dist.get_rank() == 0:
            print(line, flush=True)
        self._announced.add(line)

    def _resolve(self, options: LoongOptions, ranks: list[int], heads: int | None) -> LoongConfig:
        config = resolve(options, ranks, heads, compat.ranks_per_node())
        # Ranks were renamed before Megatron saw them (`on_arguments`): here the logical rank is the cp_rank.
        return replace(config, placement="head_first")
