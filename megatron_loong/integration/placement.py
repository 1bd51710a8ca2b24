"""Placement inside Megatron: the process on a given GPU takes the RANK whose coordinates belong there.

Megatron's rank decides what a process computes, and inside a context-parallel group it is `head_first` for ever
(`cp_rank = ring_rank * head_parallel_size + head`). So another placement is a permutation of ranks inside each
context-parallel group, done before `init_process_group`; everything in Megatron then follows by itself.

    launcher's rank (where the GPU is)   0 1 2 3      4 ranks, head 2 x ring 2, context_first:
    coordinates there: ring              0 1 0 1      neighbours pass KV round, heads are exchanged with the
                       head              0 0 1 1      rank two further on
    RANK = ring * 2 + head               0 2 1 3

Rank 0 always keeps its place, so MASTER_ADDR stays right. LOCAL_RANK, which picks the GPU, is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from megatron_loong.config import LoongConfig
from megatron_loong.layout.ranks import coordinates_of, logical_rank_of

#: `<launcher's rank>:<RANK taken>:<layout>`, so that a second parser in the same process does not permute again, and
#: so that the layout that is built can be compared with the one that ranks were taken for.
MARK = "MEGATRON_LOONG_PLACED"


def needs_permutation(config: LoongConfig) -> bool:
    """False when the placement comes to Megatron's own order of ranks.

    >>> needs_permutation(LoongConfig(4, 2)), needs_permutation(LoongConfig(4, 1, placement="inner-outer-head"))
    (False, False)
    """
    everywhere = range(config.context_parallel_size)
    return any(logical_rank_of(config, coordinates_of(config, position)) != position for position in everywhere)


def launcher_rank(environment: Mapping[str, str]) -> int:
    """The rank that the launcher gave, whatever RANK says after `take_rank`."""
    taken = environment.get("RANK", "0")
    first, _, rest = environment.get(MARK, "").partition(":")
    # A mark that does not fit was inherited by a process that was given a rank of its own.
    return int(first) if rest.partition(":")[0] == taken else int(taken)


def placement_in_effect(environment: Mapping[str, str]) -> str | None:
    """`LoongConfig.describe()` of the layout for which this process took its RANK, or None."""
    _, _, rest = environment.get(MARK, "").partition(":")
    taken, _, layout = rest.partition(":")
    return layout if layout and taken == environment.get("RANK", "0") else None


def take_rank(environment: MutableMapping[str, str], rank: int, config: LoongConfig) -> None:
    """Set RANK to what `layout.placement.permuted_ranks` gives this process. Calling it twice changes nothing."""
    launched_as = launcher_rank(environment)
    environment["RANK"] = str(rank)
    environment[MARK] = f"{launched_as}:{rank}:{config.describe()}"


def give_back_rank(environment: MutableMapping[str, str]) -> None:
    """Undo `take_rank`."""
    if MARK in environment:
        environment["RANK"] = str(launcher_rank(environment))
        del environment[MARK]
