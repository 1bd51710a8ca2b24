"""Process groups of one context-parallel layout. The only file that calls `torch.distributed.new_group`."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from weakref import WeakValueDictionary

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.distributed.constants import default_pg_timeout

from megatron_loong.comm.errors import collective
from megatron_loong.comm.versions import check_versions, versions
from megatron_loong.config import LoongConfig
from megatron_loong.layout.ranks import (
    Coordinates,
    coordinates_of,
    group_members,
    logical_rank_of,
    ring_rank_of,
)

# Inner and outer rings, and the rings that carry dKV home, need communicators of their own: on one, sends pair up
# wrongly, because the order in which two neighbours post them differs.
COMMUNICATORS = {
    "head": "head",
    "inner": "inner",
    "outer": "outer",
    "inner_dkv": "inner",
    "outer_dkv": "outer",
}
"""Name of each communicator -> the axis along which it runs."""


@dataclass(frozen=True, eq=False)
class GroupHandle:
    """One communicator as one of its members sees it."""

    name: str
    """`head`, `inner`, `outer`, `inner_dkv` or `outer_dkv`."""
    global_ranks: tuple[int, ...]
    """Members in the order of their coordinate, which need not be ascending."""
    rank: int
    """This process's coordinate."""
    process_group: dist.ProcessGroup | None
    """None when the axis has size 1: nothing is ever sent on it."""
    timeout: timedelta = default_pg_timeout
    """How long a member waits for the others."""
    transports: dict[Any, Any] = field(default_factory=dict, repr=False)
    """By device: how its tensors travel here (`comm.transport`)."""

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.global_ranks)

    @functools.cached_property
    def order(self) -> list[int]:
        """The coordinates in the order of `process_group`, for torch sorts the ranks of a group."""
        return sorted(range(self.size), key=self.global_ranks.__getitem__)


_by_number: WeakValueDictionary[int, LoongGroups] = WeakValueDictionary()


def checked_groups(groups: object) -> LoongGroups:
    """`groups` itself. Raises `ValueError` unless it is a `LoongGroups` that this process is a member of."""
    if not isinstance(groups, LoongGroups):
        raise ValueError(
            f"groups={groups!r:.80} must be the LoongGroups of build_groups(LoongConfig(...), cp_global_ranks), which "
            "say which ranks share a sequence, and in which layout"
        )
    groups.require_cp_rank()
    return groups


def groups_by_number(number: int) -> LoongGroups:
    """The `LoongGroups` with this number. Raises `RuntimeError` once they are garbage-collected."""
    if number not in _by_number:
        raise RuntimeError(f"LoongGroups number {number} are gone; keep them as long as a compiled graph uses them")
    return _by_number[number]


@dataclass(eq=False)
class LoongGroups:
    """What one process knows of its context-parallel group: the layout, its place in it and its communicators.

    A process outside `cp_global_ranks` gets one with `cp_rank=None`, which attention and sharding refuse.
    """

    config: LoongConfig
    cp_global_ranks: tuple[int, ...]
    """Global ranks of the group; the index into it is the cp_rank."""
    cp_rank: int | None
    handles: dict[str, GroupHandle] = field(default_factory=dict, repr=False)
    nodes: int = 1
    """How many nodes the ranks of the group are spread over."""
    known_kinds: set[Any] = field(default_factory=set, repr=False)
    """Kinds of attention call whose arguments have been compared over the ranks (`attention.agreement`)."""
    always_compare: bool = field(default_factory=lambda: os.environ.get("LOONG_CHECK") == "1", repr=False)
    """Compare arguments at every call, not only at the first of each kind."""
    number: int = field(default_factory=itertools.count().__next__, repr=False)
    """Key for `groups_by_number`: operators of a compiled graph take numbers, but no objects."""

    def __post_init__(self) -> None:
        _by_number[self.number] = self

    @functools.cached_property
    def coordinates(self) -> Coordinates:
        """(head, outer, inner) of this process."""
        return coordinates_of(self.config, self.require_cp_rank())

    @functools.cached_property
    def ring_rank(self) -> int:
        """Position in the whole ring, `outer * inner_ring_size + inner`."""
        return ring_rank_of(self.config, self.coordinates)

    @functools.cached_property
    def logical_rank(self) -> int:
        """Rank that decides which tokens this process holds (`layout.logical_rank_of`)."""
        return logical_rank_of(self.config, self.coordinates)

    def require_cp_rank(self) -> int:
        """The cp_rank. Raises `ValueError` if this process is not a member."""
        if self.cp_rank is None:
            raise ValueError(
                f"this process is not in cp_global_ranks={list(self.cp_global_ranks)}: "
                "only members of the context-parallel group take part in its attention"
            )
        return self.cp_rank

    def handle(self, name: str) -> GroupHandle:
        """The communicator called `name`. Raises `RuntimeError` after `destroy`."""
        self.require_cp_rank()
        if name not in self.handles:
            raise RuntimeError(f"these LoongGroups were destroyed: there is no {name!r} communicator any more")
        return self.handles[name]

    def destroy(self) -> None:
        """Release every communicator. Calling it twice does nothing."""
        handles, self.handles = self.handles, {}
        for handle in handles.values():
            handle.transports.clear()
            # If the program has destroyed the whole world, our groups went with it.
            if handle.process_group is not None and dist.is_initialized():
                with contextlib.suppress(ValueError, AssertionError):
                    dist.destroy_process_group(handle.process_group)


_builds: Counter[tuple[int, ...]] = Counter()
_names_used_up_to = 0


@contextlib.contextmanager
def _names_that_members_agree_on(ranks: tuple[int, ...]) -> Iterator[None]:
    """Inside, `new_group(use_local_synchronization=True)` gives a group the same, unused name on all its members.

    torch names such a group after its ranks and a count of groups that differs between processes (up to 2.13 the groups
    that a process is in, later those that it asked for). Members with different counts would wait for each other for
    ever, and a name that comes back after a group was destroyed would find the old group's rendezvous. So the members
    agree, over the world's store, on a number that none of them has reached, and count from there. With it each says
    its versions.
    """
    global _names_used_up_to
    world, store, me = c10d._world, c10d._get_default_store(), dist.get_rank()
    known, count = world.pg_names, world.group_count
    key = f"megatron_loong/{ranks}/{_builds[ranks]}/"
    _builds[ranks] += 1
    store.set(f"{key}{me}", f"{max(len(known), count, _names_used_up_to)} {versions()}")
    said = {rank: store.get(f"{key}{rank}").decode().split(" ", 1) for rank in ranks}
    check_versions({rank: " ".join(words[1:]) for rank, words in said.items()})
    agreed = max(int(words[0]) for words in said.values())
    # torch up to 2.13 counts the entries of `known`, later versions have a counter: both are raised to the same number.
    # They are put back afterwards, for groups that the whole world makes are named by them too.
    padding: list[Any] = [object() for _ in range(agreed - len(known))]
    known.update(dict.fromkeys(padding, "padding"))
    world.group_count = agreed
    try:
        yield
    finally:
        _names_used_up_to = agreed + 1 + max(world.group_count - agreed, len(COMMUNICATORS))
        world.group_count = count
        for one in padding:
            known.pop(one)


def build_groups(
    config: LoongConfig,
    cp_global_ranks: Sequence[int],
    *,
    timeout: timedelta | None = None,
    local_synchronization: bool = False,
) -> LoongGroups:
    """Make the communicators of this process's context-parallel group: head, inner and outer ring, dKV rings.

    Collective: every rank of the world calls it, each with the `cp_global_ranks` of its own group (a rank outside
    the ranks that it passes gets groups with `cp_rank=None`). With `local_synchronization=True` only the members of
    the group call it, for programs in which not all ranks come to the same place. `cp_global_ranks[i]` gets the
    coordinates of cp_rank i under `config.placement`.

    `timeout` is that of each communicator (default: torch's, 30 minutes). Raises `ValueError` on every rank alike when
    the ranks do not fit the config, repeat, lie outside the world, or overlap another group, or when the ranks run
    different versions of megatron_loong or torch.
    """
    ranks: tuple[int, ...] = ()
    if not isinstance(config, LoongConfig):
        problem = f"config={config!r:.80} is no LoongConfig; use LoongConfig(context_parallel_size=...)"
    elif not dist.is_initialized() and config.context_parallel_size > 1:
        problem = "call torch.distributed.init_process_group before build_groups"
    elif not (timeout is None or isinstance(timeout, timedelta)):
        problem = f"timeout={timeout!r} must be a datetime.timedelta"
    else:
        try:
            ranks = tuple(map(operator.index, cp_global_ranks))
            problem = _problem_with(config, ranks)
        except TypeError:
            problem = f"cp_global_ranks={cp_global_ranks!r:.80} must be the global ranks of the group, such as range(8)"
    if not dist.is_initialized():
        if problem:
            raise ValueError(problem)
        handles = {name: GroupHandle(name, ranks, 0, None) for name in COMMUNICATORS}
        return LoongGroups(config, ranks, 0, handles)

    requests: list[Any] = [(config, ranks, problem)]
    if not local_synchronization and dist.get_world_size() > 1:
        requests = [None] * dist.get_world_size()
        with collective("build_groups", "world of ranks", range(dist.get_world_size())):
            dist.all_gather_object(requests, (config, ranks, problem, versions()))
        # First, for it may be the cause of what else is wrong. Up to 0.2.0 nobody said a version.
        check_versions({rank: " ".join(request[3:]) for rank, request in enumerate(requests)})
        requests = [request[:3] for request in requests]
    _check_requests(requests)

    timeout = default_pg_timeout if timeout is None else timeout
    me = dist.get_rank()
    cp_rank = ranks.index(me) if me in ranks else None
    groups = LoongGroups(config, ranks, cp_rank)
    if local_synchronization:
        with _names_that_members_agree_on(ranks):
            _make_communicators(groups, [(config, ranks)], timeout, members_alone=True)
    else:
        wanted = dict.fromkeys((c, r) for c, r, _ in sorted(requests, key=lambda request: request[1]))
        _make_communicators(groups, list(wanted), timeout, members_alone=False)
    _wait_until_connected(groups)
    if cp_rank is not None:
        groups.nodes = _count_nodes(groups)
    return groups


def _count_nodes(groups: LoongGroups) -> int:
    """How many nodes the members are on, by the name that each node has for its launcher, or for itself."""
    launched = (os.environ.get(name) for name in ("GROUP_RANK", "SLURM_NODEID"))
    names = {next((name for name in launched if name), socket.gethostname())}
    # No communicator has all members. Gathered along one axis after another, the names reach everyone.
    for axis in ("head", "inner", "outer"):
        handle = groups.handles[axis]
        if handle.process_group is not None:
            gathered: list[Any] = [None] * handle.size
            with collective("the exchange of node names", f"{axis} group", handle.global_ranks):
                dist.all_gather_object(gathered, names, group=handle.process_group)
            names = set().union(*gathered)
    return len(names)


def _wait_until_connected(groups: LoongGroups) -> None:
    """Return once every communicator is connected on all its members, before anyone uses or destroys it.

    gloo connects a group before `new_group` returns, but not at the same moment everywhere: a member that destroys its
    groups at once would cut off one that is still connecting. NCCL connects at the first use, in which all members must
    take part, but a window or a pack of documents needs hops between some of them only.
    """
    for handle in groups.handles.values():
        if handle.process_group is not None:
            with collective("the first meeting", f"{handle.name} group", handle.global_ranks):
                dist.barrier(group=handle.process_group)


def _make_communicators(
    groups: LoongGroups,
    wanted: list[tuple[LoongConfig, tuple[int, ...]]],
    timeout: timedelta,
    *,
    members_alone: bool,
) -> None:
    """Make the communicators of all wanted groups, and keep this process's own in `groups`."""
    me = dist.get_rank()
    # `new_group` is collective, so every rank makes the groups of all ranks, in the same order. Unless
    # `members_alone`: then only members call it, and `wanted` is their own group.
    for request_config, request_ranks in wanted:
        for name, axis in COMMUNICATORS.items():
            for members in group_members(request_config, axis):
                members_global = tuple(request_ranks[i] for i in members)
                process_group: Any = None
                if len(members) > 1:
                    process_group = dist.new_group(
                        sorted(members_global),
                        timeout=timeout,
                        use_local_synchronization=members_alone,
                        group_desc=f"loong_{name}",
                    )
                if me in members_global and request_ranks == groups.cp_global_ranks:
                    rank = members_global.index(me)
                    groups.handles[name] = GroupHandle(name, members_global, rank, process_group, timeout)


def _problem_with(config: LoongConfig, ranks: tuple[int, ...]) -> str | None:
    cp = config.context_parallel_size
    if len(ranks) != cp:
        return f"cp_global_ranks={list(ranks)} has {len(ranks)} ranks but context_parallel_size={cp}"
    if len(set(ranks)) != len(ranks):
        return f"cp_global_ranks={list(ranks)} names a rank twice"
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if not all(0 <= rank < world_size for rank in ranks):
        return f"cp_global_ranks={list(ranks)} leaves the world of {world_size} ranks (0 to {world_size - 1})"
    return None


def _check_requests(requests: Sequence[tuple[LoongConfig, tuple[int, ...], str | None]]) -> None:
    """Raise the same error on every rank if any rank's request is wrong or two requests contradict each other."""
    for global_rank, (_, _, problem) in enumerate(requests):
        if problem:
            raise ValueError(problem if len(requests) == 1 else f"{problem} (asked for by rank {global_rank})")
    owner: dict[int, tuple[LoongConfig, tuple[int, ...]]] = {}
    for config, ranks, _ in requests:
        for rank in ranks:
            if owner.setdefault(rank, (config, ranks)) != (config, ranks):
                raise ValueError(
                    f"rank {rank} is asked for in two context-parallel groups, {list(owner[rank][1])} with "
                    f"{owner[rank][0].describe()}, and {list(ranks)} with {config.describe()}; a rank belongs to one"
                )
