"""Communicators of a context-parallel group: built once, shared by all layers, released with Megatron's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_loong.comm.groups import LoongGroups, build_groups
from megatron_loong.config import LoongConfig


@dataclass(frozen=True)
class _Entry:
    groups: LoongGroups
    world: object
    """The world they belong to; after `destroy_process_group` and a new start it is another one."""
    local: bool


class GroupCache:
    """The `LoongGroups` of this process, by global ranks and layout."""

    def __init__(self) -> None:
        self._entries: dict[tuple[tuple[int, ...], LoongConfig], _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(
        self,
        config: LoongConfig,
        cp_global_ranks: Sequence[int],
        *,
        local_synchronization: bool,
        timeout: timedelta | None = None,
    ) -> LoongGroups:
        """Groups for the layout, built when there are none yet; see `build_groups` for who has to call it.

        Inside Megatron the ranks are in the order of their coordinates already (placement has permuted them), so
        the groups are made head_first whatever `config.placement` says.
        """
        config = dataclasses.replace(config, placement="head_first")
        key = (tuple(cp_global_ranks), config)
        world = dist.group.WORLD if dist.is_initialized() else None
        entry = self._entries.get(key)
        if entry is None or entry.world is not world:
            groups = build_groups(config, key[0], timeout=timeout, local_synchronization=local_synchronization)
            entry = self._entries[key] = _Entry(groups, world, local_synchronization)
        return entry.groups

    def configs(self) -> list[LoongConfig]:
        """The layouts that groups of the present world have."""
        world = dist.group.WORLD if dist.is_initialized() else None
        return [entry.groups.config for entry in self._entries.values() if entry.world is world]

    def release(self, *, also_local: bool = False) -> None:
        """Destroy what was built by the whole world together; groups that only members built stay for reuse.

        torch names the latter after their ranks: made anew under the same name in one job, they would meet the old
        ones' rendezvous.
        """
        for key, entry in list(self._entries.items()):
            if also_local or not entry.local:
                del self._entries[key]
                entry.groups.destroy()
