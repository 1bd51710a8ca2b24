"""What a user asked for, before ranks and nodes are known: `LoongOptions`, where they come from, how they resolve.

Free of torch and Megatron: everything here is arithmetic on names and numbers.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import megatron_loong.integration.memory_options as memory_options
from megatron_loong.config import GRADIENT_WIRES, PACK_LAYOUTS, SEQUENCE_LAYOUTS, LoongConfig, placement_axes
from megatron_loong.layout.placement import largest_head_parallel_size, largest_inner_ring_size
from megatron_loong.planner.choose import Job, choose_layout

IMPLEMENTATIONS = ("native", "loong")

#: Options that say where tokens live, and their values.
LAYOUTS = {"loong_sequence_layout": SEQUENCE_LAYOUTS, "loong_pack_layout": PACK_LAYOUTS}

#: A source of options: where it is written, and only the fields that were set there.
Source = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class LoongOptions:
    """The unresolved options; each field is a flag. `ValueError` from the constructor names the flag."""

    context_parallel_impl: str = "native"
    """`native` leaves Megatron as it is, `loong` is 2D-Attention."""

    loong_head_parallel_size: int | str = "auto"
    """A divisor of the context-parallel size, or `auto`: the planner's answer where the hardware is known, else the
    largest that divides the query heads of one TP rank and the context-parallel size and keeps the all-to-all inside
    a node."""

    loong_inner_ring_size: int | str = "auto"
    """A divisor of the ring size, or `auto`: the largest inner ring that stays inside a node."""

    loong_hardware: str = "auto"
    """A profile of the planner or a file of `megatron-loong calibrate`; `auto`: the profile of this GPU, if any."""

    loong_placement: str = "head_first"
    """`head_first`, `context_first`, an order of head, inner and outer such as `inner-head-outer`, or `auto`: the
    planner's answer where the hardware is known, else `head_first`."""

    loong_sequence_layout: str = "zigzag"
    """`zigzag`, or `contiguous` for data whose tokens cannot be permuted: each rank holds one piece of the sequence."""

    loong_pack_layout: str = "dealt"
    """Packed documents. `dealt`: the plugin's own layout; `per_document`: as Megatron, TransformerEngine, verl, slime
    and NeMo-RL cut them; `contiguous`: each rank holds one piece of the pack."""

    loong_kernel: str = "auto"
    """A name of `kernels.registry`, `auto`, or `auto-fp8`: the first whose forward is in fp8 (backward in bfloat16)."""

    loong_gradient_wire: str = "auto"
    """What gradients travel round the ring in: `float32`, `input` (q's dtype) or `auto` (bfloat16 for bfloat16)."""

    loong_mla_latent: bool = False
    """Multi-latent attention sends the latent round the ring where that is fewer bytes than keys and values."""

    loong_selective_checkpoint: str = "off"
    """Layers (`all`, `off`, or numbers such as `1-4,9`) whose recomputation does not run the ring again."""

    loong_keep_exchange: str = "off"
    """Layers of these whose recomputation does not run the all-to-alls again either."""

    loong_offload_attention: bool = False
    """What Selective Checkpoint++ keeps waits in host memory."""

    loong_offload_activations: bool = False
    """The inputs of recomputed layers wait in host memory."""

    loong_tiled_loss: int = 0
    """Tokens of one tile of the language-model head and its loss; 0: all at once."""

    loong_tiled_mlp: int = 0
    """Tiles in which a recomputed MLP runs over its tokens; 0: all at once."""

    loong_zero_param_size: int | str = 1
    """Ranks of data x context parallel over which parameters are spread, or `all`; 1: every rank has a copy."""

    loong_zero_grad_size: int | str = 1
    """The same for gradients."""

    loong_zero_optimizer_size: int | str = 1
    """The same for master weights and optimizer states."""

    def __post_init__(self) -> None:
        if self.context_parallel_impl not in IMPLEMENTATIONS:
            raise ValueError(
                f"--context-parallel-impl {self.context_parallel_impl!r} is unknown; use {' or '.join(IMPLEMENTATIONS)}"
            )
        for name in ("loong_head_parallel_size", "loong_inner_ring_size"):
            value = getattr(self, name)
            if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{flag_of(name)} {value!r} must be a whole number of at least 1, or auto")
        try:
            placement_axes("head_first" if self.loong_placement == "auto" else self.loong_placement)
        except ValueError as error:
            raise ValueError(f"--loong-placement: {error}") from None
        for name, known in LAYOUTS.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{flag_of(name)} {getattr(self, name)!r} is unknown; use {', '.join(known)}")
        if not isinstance(self.loong_kernel, str):
            raise ValueError(f"--loong-kernel {self.loong_kernel!r} must be the name of a kernel, or auto")
        if self.loong_gradient_wire not in GRADIENT_WIRES:
            raise ValueError(
                f"--loong-gradient-wire {self.loong_gradient_wire!r} is unknown; use {', '.join(GRADIENT_WIRES)}"
            )
        memory_options.check_values(self)

    @property
    def loong(self) -> bool:
        """Whether 2D-Attention was asked for."""
        return self.context_parallel_impl == "loong"


FIELDS = tuple(field.name for field in dataclasses.fields(LoongOptions))

#: Options of earlier versions, and what to do instead.
REMOVED = {
    "loong_all_to_all": "leave it out: the process group's backend does the all-to-all, and NCCL has collectives "
    "by copy engines of its own",
}
_DEFAULTS = LoongOptions()


def flag_of(field: str) -> str:
    """The command-line flag of a field.

    >>> flag_of("loong_head_parallel_size")
    '--loong-head-parallel-size'
    """
    return "--" + field.replace("_", "-")


def removed(field: str) -> str:
    """What is said to whoever gives an option of an earlier version."""
    return f"{flag_of(field)} ({field}) is not part of megatron_loong any more; {REMOVED[field]}"


def fields_of_mapping(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields from a mapping (YAML, JSON). Dashes and underscores are alike, and `loong_` may be left out.

    A misspelt key is a `ValueError` that lists the known ones, and so is a key given twice.

    >>> fields_of_mapping({"context_parallel_impl": "loong", "head-parallel-size": 2})
    {'context_parallel_impl': 'loong', 'loong_head_parallel_size': 2}
    """
    known = {name: field for field in FIELDS for name in (field, field.removeprefix("loong_"))}
    fields: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).lstrip("-").replace("-", "_")
        field = known.get(name)
        if field is None and (old := next((x for x in REMOVED if name in (x, x.removeprefix("loong_"))), None)):
            raise ValueError(removed(old))
        if field is None:
            raise ValueError(f"megatron_loong has no option {key!r}; its options are {', '.join(FIELDS)}")
        if field in fields:
            raise ValueError(f"option {field} is given twice")
        fields[field] = value
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
    """Fields that differ from their default on Megatron's args or a TransformerConfig; absent ones are not set.

    `ValueError` for an option of an earlier version.
    """
    for name in REMOVED:
        if getattr(holder, name, None) is not None:
            raise ValueError(removed(name))
    fields = {name: getattr(holder, name, getattr(_DEFAULTS, name)) for name in FIELDS}
    return {name: value for name, value in fields.items() if value != getattr(_DEFAULTS, name)}


def fields_of(options: object) -> dict[str, Any]:
    """Fields that `install(options)` sets: a `LoongOptions` (those off their default), a mapping or a YAML path."""
    if options is None:
        return {}
    if isinstance(options, LoongOptions):
        return fields_of_attributes(options)
    if isinstance(options, Mapping):
        return fields_of_mapping(options)
    if isinstance(options, (str, os.PathLike)):
        return fields_of_file(options)
    raise ValueError(f"options must be LoongOptions, a mapping or the path of a YAML file, not {options!r}")


def merge(sources: Sequence[Source]) -> LoongOptions:
    """One set of options; a field that two sources set differently is a `ValueError` naming both.

    >>> merge([("install()", {"loong_kernel": "reference"}), ("the config", {"loong_placement": "context_first"})])
    ... # doctest: +ELLIPSIS
    LoongOptions(..., loong_placement='context_first', ..., loong_kernel='reference', ...)
    """
    merged: dict[str, tuple[str, Any]] = {}
    for where, fields in sources:
        for name, value in fields.items():
            other, first = merged.setdefault(name, (where, value))
            if first != value:
                raise ValueError(f"{name} is {first!r} in {other} but {value!r} in {where}; give it in one place")
    return LoongOptions(**{name: value for name, (_, value) in merged.items()})


def resolve(
    options: LoongOptions,
    *,
    context_parallel_size: int,
    heads: int | None,
    cp_ranks_in_node: int,
    job: Job | None = None,
) -> LoongConfig | None:
    """The layout: `auto` replaced by numbers. None when `auto` needs `heads` and they are not known yet.

    `heads`: query heads of one TP rank. `cp_ranks_in_node`: ranks of this context-parallel group inside one node.
    `job`: what the planner needs to answer for `auto`; None: the rules of the fields' descriptions.

    >>> options = LoongOptions("loong")
    >>> resolve(options, context_parallel_size=16, heads=12, cp_ranks_in_node=8).describe()
    'cp 16 = head 4 x ring 4 (outer 2 x inner 2), placement head_first, zigzag'
    """
    cp, hp, inner = context_parallel_size, options.loong_head_parallel_size, options.loong_inner_ring_size
    placement = options.loong_placement
    if heads is None and "auto" in (hp, placement if job else None):
        return None
    layouts: dict[str, Any] = {
        "sequence_layout": options.loong_sequence_layout,
        "pack_layout": options.loong_pack_layout,
    }
    if job is not None and heads is not None and "auto" in (hp, placement):
        chosen = choose_layout(
            cp,
            heads,
            cp_ranks_in_node,
            job,
            head_parallel_size=hp if isinstance(hp, int) else None,
            inner_ring_size=inner if isinstance(inner, int) else None,
            placement=None if placement == "auto" else placement,
        )
        return dataclasses.replace(chosen, **layouts)
    placement = "head_first" if placement == "auto" else placement
    if isinstance(hp, str):
        assert heads is not None  # returned above
        hp = largest_head_parallel_size(cp, heads, cp_ranks_in_node)
    if isinstance(inner, str) and cp % hp == 0:
        inner = largest_inner_ring_size(cp, hp, placement, cp_ranks_in_node)
    return LoongConfig(cp, hp, inner if isinstance(inner, int) else None, placement, **layouts)


def resolve_part(
    options: LoongOptions,
    size: int,
    *,
    heads: int | None,
    cp_ranks_in_node: int,
    job: Job | None = None,
) -> LoongConfig | None:
    """The layout for a micro-batch on `size` ranks, a part of those that the flags were written for.

    A number in a flag becomes its greatest common divisor with what there is; `auto` is answered for `size` ranks. The
    other arguments as for `resolve`. Placement is head_first: the ranks of a part are neighbours as they come.

    >>> resolve_part(LoongOptions("loong", 4), 2, heads=8, cp_ranks_in_node=2).describe()
    'cp 2 = head 2 x ring 1 (outer 1 x inner 1), placement head_first, zigzag'
    """
    hp, inner = options.loong_head_parallel_size, options.loong_inner_ring_size
    fitted = dataclasses.replace(
        options,
        loong_head_parallel_size=math.gcd(hp, size) if isinstance(hp, int) else hp,
        loong_inner_ring_size="auto",
        loong_placement="head_first",
    )
    config = resolve(fitted, context_parallel_size=size, heads=heads, cp_ranks_in_node=cp_ranks_in_node, job=job)
    if config is None or isinstance(inner, str):
        return config
    return dataclasses.replace(config, inner_ring_size=math.gcd(inner, config.ring_size))


def ranks_per_node(environment: Mapping[str, str], device_count: int, world_size: int) -> int:
    """Processes on one node, as torchrun, Slurm or MPI say; else one per device; else the whole world on one node.

    >>> ranks_per_node({"SLURM_NTASKS_PER_NODE": "8"}, device_count=1, world_size=16)
    8
    """
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if environment.get(name, "").isdigit():
            return max(1, int(environment[name]))
    return device_count or world_size
