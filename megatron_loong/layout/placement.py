"""Which ranks share a node, and what follows from it for the layout. Plain arithmetic, free of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_loong.config import LoongConfig, divisors
from megatron_loong.layout.ranks import coordinates_of, group_members, logical_rank_of


def cp_ranks_per_node(cp_global_ranks: Sequence[int], ranks_per_node: int) -> int:
    """How many ranks of a context-parallel group share a node: the smallest number over its nodes.

    Global rank r is taken to run on node r // ranks_per_node, as torchrun and srun number them.

    >>> cp_ranks_per_node([0, 2, 4, 6, 8, 10, 12, 14], ranks_per_node=8)    # TP 2 beside it
    4
    """
    return min(Counter(rank // ranks_per_node for rank in cp_global_ranks).values())


def fitting_head_parallel_sizes(context_parallel_size: int, heads: int) -> list[int]:
    """Head-parallel sizes that divide both the context-parallel size and the query heads of one TP rank.

    >>> fitting_head_parallel_sizes(8, heads=12)
    [1, 2, 4]
    """
    return [size for size in divisors(context_parallel_size) if heads % size == 0]


def largest_head_parallel_size(context_parallel_size: int, heads_per_tp_rank: int, cp_ranks_in_node: int) -> int:
    """`auto`: the largest size that divides the query heads and cp_size and keeps the all-to-all inside a node.

    >>> largest_head_parallel_size(16, heads_per_tp_rank=12, cp_ranks_in_node=8)
    4
    """
    fitting = fitting_head_parallel_sizes(context_parallel_size, heads_per_tp_rank)
    return max(size for size in fitting if size <= cp_ranks_in_node)


def largest_inner_ring_size(
    context_parallel_size: int, head_parallel_size: int, placement: str, cp_ranks_in_node: int
) -> int:
    """`auto`: the largest inner ring whose hops stay inside a node under the placement.

    >>> largest_inner_ring_size(16, 2, "head_first", cp_ranks_in_node=8)
    4
    >>> largest_inner_ring_size(16, 2, "context_first", cp_ranks_in_node=4)
    4
    """
    # A group's ranks are numbered node by node, so two of them share a node if they divide to the same number.
    for w in reversed(divisors(context_parallel_size // head_parallel_size)):
        config = LoongConfig(context_parallel_size, head_parallel_size, w, placement)
        rings = group_members(config, "inner")
        if all(len({rank // cp_ranks_in_node for rank in ring}) == 1 for ring in rings):
            return w
    return 1


def permuted_ranks(cp_groups: Sequence[Sequence[int]], config: LoongConfig) -> dict[int, int]:
    """Launched rank -> the rank that this process takes, so that its cp_rank is also its logical rank.

    Megatron numbers context-parallel ranks itself, and its cp_rank decides which tokens a rank holds. A placement is
    therefore a permutation of ranks: the i-th process of each group has the coordinates of cp_rank i under the
    placement, and takes the rank that holds the tokens for them. `head_first` is the identity; rank 0 stays rank 0.

    >>> permuted_ranks([[0, 1, 2, 3]], LoongConfig(4, 2, placement="context_first"))
    {0: 0, 1: 2, 2: 1, 3: 3}
    """
    taken: dict[int, int] = {}
    for group in cp_groups:
        for i, launched_as in enumerate(sorted(group)):
            taken[launched_as] = sorted(group)[logical_rank_of(config, coordinates_of(config, i))]
    return taken
