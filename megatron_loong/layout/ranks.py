"""Ranks <-> coordinates, without torch and without processes."""

from __future__ import annotations

from typing import NamedTuple

from megatron_loong.config import LoongConfig


class Coordinates(NamedTuple):
    """Position of a context-parallel rank in its head group, outer ring and inner ring."""

    head: int
    outer: int
    inner: int


def coordinates_of(config: LoongConfig, cp_rank: int) -> Coordinates:
    """Coordinates of `cp_rank` (its index among the ranks given to `build_groups`) under the placement.

    Raises `ValueError` when `cp_rank` is outside `range(context_parallel_size)`.

    >>> coordinates_of(LoongConfig(8, 2, 2, "head_first"), 5)
    Coordinates(head=1, outer=1, inner=0)
    >>> coordinates_of(LoongConfig(8, 2, 2, "context_first"), 5)
    Coordinates(head=1, outer=0, inner=1)
    """
    if not 0 <= cp_rank < config.context_parallel_size:
        raise ValueError(f"cp_rank={cp_rank} is outside range({config.context_parallel_size})")
    # A number with mixed bases: the fastest-varying axis is its last digit.
    assert config.inner_ring_size is not None
    sizes = {"head": config.head_parallel_size, "outer": config.outer_ring_size, "inner": config.inner_ring_size}
    place = {}
    for axis in config.axis_order:
        cp_rank, place[axis] = divmod(cp_rank, sizes[axis])
    return Coordinates(**place)


def ring_rank_of(config: LoongConfig, coordinates: Coordinates) -> int:
    """Position in the whole ring, `outer * inner_ring_size + inner`."""
    assert config.inner_ring_size is not None
    return coordinates.outer * config.inner_ring_size + coordinates.inner


def logical_rank_of(config: LoongConfig, coordinates: Coordinates) -> int:
    """`ring_rank * head_parallel_size + head`, which decides what tokens a rank holds, whatever the placement.

    It equals the cp_rank under `head_first`; inside Megatron it is Megatron's own context-parallel rank.
    """
    return ring_rank_of(config, coordinates) * config.head_parallel_size + coordinates.head


def group_members(config: LoongConfig, axis: str) -> list[list[int]]:
    """The groups along `axis`, as lists of cp_ranks; member i has coordinate i on that axis.

    >>> group_members(LoongConfig(8, 2, 2, "head_first"), "head")
    [[0, 1], [2, 3], [4, 5], [6, 7]]
    >>> group_members(LoongConfig(8, 2, 2, "head_first"), "outer")
    [[0, 4], [1, 5], [2, 6], [3, 7]]
    """
    # Ranks that differ in the coordinate on this axis alone are one group.
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for cp_rank in range(config.context_parallel_size):
        place = coordinates_of(config, cp_rank)
        others = tuple(value for name, value in place._asdict().items() if name != axis)
        groups.setdefault(others, []).append((getattr(place, axis), cp_rank))
    return sorted([rank for _, rank in sorted(members)] for members in groups.values())
