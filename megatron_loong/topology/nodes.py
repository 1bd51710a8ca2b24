"""Which members of a context-parallel group are on one node, and what they share there."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import socket
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch.distributed as dist

from megatron_loong.topology import shared_memory
from megatron_loong.topology.errors import collective
from megatron_loong.topology.shared_memory import Address, Inbox, Neighbours, Outbox, Region, Slots
from megatron_loong.topology.tokens import starts_of

if TYPE_CHECKING:
    from megatron_loong.topology.groups import LoongGroups


class _Member(NamedTuple):
    node: str
    """As the launcher calls it."""
    memory: Address | None


def introduce(groups: LoongGroups, me: int) -> None:
    """Let the members know their nodes, and those of one node reach each other's memory."""
    launched = (os.environ.get(name) for name in ("GROUP_RANK", "SLURM_NODEID"))
    node = next((one for one in launched if one), socket.gethostname())
    boxes = starts_of(handle.size for handle in groups.handles.values())
    own = None
    if _shares_memory(groups):
        with contextlib.suppress(OSError):  # a limit on memory files or on addresses
            own = Region.make(boxes[-1])
    members = _told(groups, me, _Member(node, own.address if own else None))
    nodes = {rank: member.node for rank, member in members.items()}
    groups.nodes = len(set(nodes.values()))
    nobody = len(set(nodes.values())) == len(nodes)
    if own is None or nobody or not all(member.memory for member in members.values()):
        return
    reached: dict[int, Region] = {}
    for rank, member in members.items():
        if member.memory and member.node == node and rank != me and (region := Region.of(member.memory)):
            reached[rank] = region
    told = _told(groups, me, frozenset(reached))
    slots = Slots(own, boxes[-1])
    for (name, handle), first in zip(list(groups.handles.items()), boxes, strict=False):
        ranks = [groups.cp_global_ranks.index(x) for x in handle.global_ranks]
        # All members must take the same way, and all know this of each other.
        if len(ranks) == 1 or any(x not in told[y] for x, y in itertools.permutations(ranks, 2)):
            continue
        pairs = {
            handle.global_ranks[peer]: (
                Outbox(reached[rank], first + handle.rank, slots),
                Inbox(own, first + peer, reached[rank]),
            )
            for peer, rank in enumerate(ranks)
            if rank != me
        }
        groups.handles[name] = dataclasses.replace(handle, neighbours=Neighbours(slots, pairs))


def _shares_memory(groups: LoongGroups) -> bool:
    """Whether messages of these groups are those of CPUs, or of GPUs by way of their hosts, and can be shared."""
    made = [x.process_group for x in groups.handles.values() if x.process_group is not None]
    return bool(made) and "gloo" in dist.get_backend_config(made[0]) and shared_memory.why_not() is None


_Told = TypeVar("_Told")


def _told(groups: LoongGroups, me: int, mine: _Told) -> dict[int, _Told]:
    """By cp_rank: what each member says. Along one axis after another, everyone hears of everyone."""
    known = {me: mine}
    for axis in ("head", "inner", "outer"):
        handle = groups.handles[axis]
        if handle.process_group is not None:
            theirs: list[Any] = [None] * handle.size
            with collective("getting to know the others", f"{axis} group", handle.global_ranks):
                dist.all_gather_object(theirs, known, group=handle.process_group)
            known = {cp_rank: said for one in theirs for cp_rank, said in one.items()}
    return known
