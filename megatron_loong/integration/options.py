"""What a user asked for, before ranks and nodes are known: `LoongOptions`, where they come from, how they resolve.

Free of torch and Megatron: everything here is arithmetic on names and numbers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_loong.config import LoongConfig, divisors, placement_axes

IMPLEMENTATIONS = ("native", "loong")

#: A source of options: where it is written, and only the fields that were set there.
Source = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class LoongOptions:
    """The unresolved options. `ValueError` from the constructor names the flag and what it takes."""

    context_parallel_impl: str = "native"
    """`--context-parallel-impl`: `native` leaves Megatron as it is, `loong` is 2D-Attention."""

    head_parallel_size: int | str = "auto"
    """`--loong-head-parallel-size`: a divisor of the context-parallel size, or `auto`."""

    inner_ring_size: int | str = "auto"
    """`--loong-inner-ring-size`: a divisor of the ring size, or `auto`: the ring ranks inside a node."""

    placement: str = "head_first"
    """`--loong-placement`: `head_first`, `context_first` or an order of head, inner and outer, fastest first."""

    kernel: str = "auto"
    """`--loong-kernel`: a name of `kernels.registry`, or `auto`."""

    def __post_init__(self) -> None:
        if self.context_parallel_impl not in IMPLEMENTATIONS:
            raise ValueError(
                f"--context-parallel-impl {self.context_parallel_impl!r} is unknown; use {' or '.join(IMPLEMENTATIONS)}"
            )
        for name in ("head_parallel_size", "inner_ring_size"):
            value = getattr(self, name)
            if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{flag_of(name)} {value!r} must be a whole number of at least 1, or auto")
        try:
            placement_axes(self.placement)
        except ValueError as error:
            raise ValueError(f"{flag_of('placement')}: {error}") from None
        if not isinstance(self.kernel, str):
            raise ValueError(f"{flag_of('kernel')} {self.kernel!r} must be the name of a kernel, or auto")

    @property
    def loong(self) -> bool:
        """Whether 2D-Attention was asked for."""
        return self.context_parallel_impl == "loong"


FIELDS = tuple(field.name for field in dataclasses.fields(LoongOptions))
_DEFAULTS = LoongOptions()


def attribute_of(field: str) -> str:
    """The field's name on Megatron's args and on a TransformerConfig.

    >>> attribute_of("kernel"), attribute_of("context_parallel_impl")
    ('loong_kernel', 'context_parallel_impl')
    """
    return field if field == "context_parallel_impl" else f"loong_{field}"


def flag_of(field: str) -> str:
    """The field's command-line flag.

    >>> flag_of("head_parallel_size")
    '--loong-head-parallel-size'
    """
    return "--" + attribute_of(field).replace("_", "-")


def fields_of_mapping(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields from a mapping (YAML, JSON) whose keys are field names, with or without the flags' `loong_`.

    A misspelt key is a `ValueError` that lists the known ones, and so is a key given under both names.

    >>> fields_of_mapping({"context_parallel_impl": "loong", "loong_head_parallel_size": 2})
    {'context_parallel_impl': 'loong', 'head_parallel_size': 2}
    """
    known = {name: field for field in FIELDS for name in (field, attribute_of(field))}
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise ValueError(f"megatron_loong has no option {', '.join(unknown)}; its options are {', '.join(FIELDS)}")
    fields: dict[str, Any] = {}
    for key, value in values.items():
        if known[key] in fields:
            raise ValueError(f"option {known[key]} is given twice, as {known[key]} and as {attribute_of(known[key])}")
        fields[known[key]] = value
    LoongOptions(**fields)
    return fields


def fields_of_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Fields from a YAML file that holds one mapping; `ValueError` for anything else in it."""
    import yaml

    with open(path, encoding="utf-8") as file:
        values = yaml.safe_load(file)
    if not isinstance(values, Mapping):
        raise ValueError(f"{os.fspath(path)} must hold a mapping of options; they are {', '.join(FIELDS)}")
    return fields_of_mapping(values)


def fields_of_attributes(holder: object) -> dict[str, Any]:
    """Fields that differ from their default on Megatron's args or a TransformerConfig; absent ones are not set."""
    fields = {name: getattr(holder, attribute_of(name), getattr(_DEFAULTS, name)) for name in FIELDS}
    return {name: value for name, value in fields.items() if value != getattr(_DEFAULTS, name)}


def fields_of(options: object) -> dict[str, Any]:
    """Fields that `install(options)` sets: a `LoongOptions` (those off their default), a mapping or a YAML path."""
    if options is None:
        return {}
    if isinstance(options, LoongOptions):
        return {n: getattr(options, n) for n in FIELDS if getattr(options, n) != getattr(_DEFAULTS, n)}
    if isinstance(options, Mapping):
        return fields_of_mapping(options)
    if isinstance(options, (str, os.PathLike)):
        return fields_of_file(options)
    raise ValueError(f"options must be LoongOptions, a mapping or the path of a YAML file, not {options!r}")


def merge(sources: list[Source]) -> LoongOptions:
    """One set of options; a field that two sources set differently is a `ValueError` naming both.

    >>> merge([("install()", {"context_parallel_impl": "loong"}), ("the command line", {"kernel": "reference"})])
    ... # doctest: +ELLIPSIS
    LoongOptions(context_parallel_impl='loong', ..., kernel='reference')
    """
    merged: dict[str, tuple[str, Any]] = {}
    for where, fields in sources:
        for name, value in fields.items():
            other, first = merged.setdefault(name, (where, value))
            if first != value:
                raise ValueError(f"{name} is {first!r} in {other} but {value!r} in {where}; give it in one place")
    return LoongOptions(**{name: value for name, (_, value) in merged.items()})


def fitting_head_parallel_sizes(context_parallel_size: int, heads: int) -> list[int]:
    """Head-parallel sizes that divide both the context-parallel size and the query heads of one TP rank.

    >>> fitting_head_parallel_sizes(8, heads=12)
    [1, 2, 4]
    """
    return [size for size in divisors(context_parallel_size) if heads % size == 0]


def resolve(
    options: LoongOptions, *, context_parallel_size: int, heads: int | None, ranks_of_node: int
) -> LoongConfig | None:
    """The layout: `auto` replaced by numbers. None when `auto` needs `heads` and they are not known yet.

    `heads`: query heads of one TP rank. `ranks_of_node`: ranks of this context-parallel group inside one node.
    head_parallel_size `auto`: the largest that divides `heads` and the group and is at most `ranks_of_node`.
    inner_ring_size `auto`: the ring ranks inside a node, which is the whole ring when there is one node.

    >>> resolve(LoongOptions("loong"), context_parallel_size=16, heads=12, ranks_of_node=8).describe()
    'cp 16 = head 4 x ring 4 (outer 2 x inner 2), placement head_first, zigzag'
    """
    cp, hp, inner = context_parallel_size, options.head_parallel_size, options.inner_ring_size
    if isinstance(hp, str):
        if heads is None:
            return None
        hp = max(size for size in fitting_head_parallel_sizes(cp, heads) if size <= ranks_of_node)
    if isinstance(inner, str):
        axes = placement_axes(options.placement)
        # Under head_first a node's ranks are whole head groups first; otherwise the ring comes to the node first.
        ring_ranks_of_node = ranks_of_node // hp if axes.index("head") < axes.index("inner") else ranks_of_node
        inner = max((size for size in divisors(cp // hp) if size <= ring_ranks_of_node), default=1) if cp >= hp else 1
    return LoongConfig(cp, hp, inner, options.placement)


def ranks_per_node(environment: Mapping[str, str], device_count: int, world_size: int) -> int:
    """Processes on one node, as torchrun, Slurm or MPI say; else one per device; else the whole world on one node.

    >>> ranks_per_node({"SLURM_NTASKS_PER_NODE": "8"}, device_count=1, world_size=16)
    8
    """
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if environment.get(name, "").isdigit():
            return max(1, int(environment[name]))
    return device_count or world_size


def ranks_of_node_in_group(cp_global_ranks: list[int], per_node: int) -> int:
    """How many ranks of the group share a node; the fewest, where nodes hold different numbers of them.

    >>> ranks_of_node_in_group([0, 2, 4, 6, 8, 10, 12, 14], per_node=8)
    4
    """
    nodes = [rank // per_node for rank in cp_global_ranks]
    return min(nodes.count(node) for node in nodes)
