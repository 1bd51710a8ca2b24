"""What the user asks for: flags, a mapping, a YAML file or attributes of a config; and what contradicts it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_loong.config import LoongConfig, divisors, placement_axes
from megatron_loong.topology.placement import cp_ranks_per_node, largest_head_parallel_size, largest_inner_ring_size

IMPLEMENTATIONS = ("native", "loong")


def _number_or_auto(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from None


@dataclass(frozen=True)
class LoongOptions:
    """The plugin's options before they meet a model and a cluster. Field names are the flags' (`--loong-...`)."""

    context_parallel_impl: str = "native"
    """`loong` replaces Megatron's context parallelism by 2D-Attention; `native` changes nothing at all."""

    loong_head_parallel_size: int | str = "auto"
    """All-to-all degree. `auto`: the largest that divides the query heads of one TP rank and the context-parallel
    size and keeps the all-to-all inside a node."""

    loong_inner_ring_size: int | str = "auto"
    """Ranks of one inner ring. `auto`: the largest inner ring that stays inside a node."""

    loong_placement: str = "head_first"
    """`head_first`, `context_first`, or an order of head, inner and outer such as `inner-head-outer`."""

    loong_kernel: str = "auto"
    """Attention kernel by name, or `auto`."""

    def __post_init__(self) -> None:
        if self.context_parallel_impl not in IMPLEMENTATIONS:
            raise ValueError(
                f"--context-parallel-impl {self.context_parallel_impl!r} is unknown; use {' or '.join(IMPLEMENTATIONS)}"
            )
        for name in ("loong_head_parallel_size", "loong_inner_ring_size"):
            value = getattr(self, name)
            if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{_flag(name)} {value!r} must be a whole number of at least 1, or auto")
        try:
            placement_axes(self.loong_placement)
        except ValueError as error:
            raise ValueError(f"--loong-placement: {error}") from None

    @property
    def enabled(self) -> bool:
        """Whether the plugin is asked to do anything."""
        return self.context_parallel_impl == "loong"

    @classmethod
    def names(cls) -> list[str]:
        """Every option's name."""
        return [f.name for f in fields(cls)]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> LoongOptions:
        """From a mapping; dashes and underscores are alike. `ValueError` for a name that is no option."""
        plain = {key.lstrip("-").replace("-", "_"): value for key, value in values.items()}
        unknown = sorted(set(plain) - set(cls.names()))
        if unknown:
            raise ValueError(f"megatron_loong has no option {', '.join(unknown)}; it has {', '.join(cls.names())}")
        return cls(**plain)

    @classmethod
    def from_yaml(cls, path: str | Path) -> LoongOptions:
        """From a YAML file that holds such a mapping. Needs PyYAML, which Megatron's training loop needs too."""
        import yaml

        values = yaml.safe_load(Path(path).read_text())
        if not isinstance(values, Mapping):
            raise ValueError(f"{path} must hold a mapping of options to values; the options: {', '.join(cls.names())}")
        return cls.from_mapping(values)

    @classmethod
    def from_attributes(cls, holder: Any) -> LoongOptions:
        """From the attributes that an argparse namespace or a TransformerConfig happens to have."""
        found = {name: getattr(holder, name, None) for name in cls.names()}
        return cls(**{name: value for name, value in found.items() if value is not None})


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Register the plugin's flags."""
    default = LoongOptions()
    group = parser.add_argument_group("megatron_loong", "2D-Attention for long sequences (LoongTrain)")
    group.add_argument(
        "--context-parallel-impl", choices=IMPLEMENTATIONS, default=default.context_parallel_impl,
        help="loong: 2D-Attention over the context-parallel group; native: Megatron's own, nothing is changed",
    )  # fmt: skip
    group.add_argument(
        "--loong-head-parallel-size", type=_number_or_auto, default=default.loong_head_parallel_size, metavar="N|auto",
        help="ranks that share the heads by all-to-all; the others form the ring. auto: the largest that divides "
        "heads and context-parallel size and stays inside a node",
    )  # fmt: skip
    group.add_argument(
        "--loong-inner-ring-size", type=_number_or_auto, default=default.loong_inner_ring_size, metavar="N|auto",
        help="ranks of one inner ring of the double ring. auto: the largest that stays inside a node",
    )  # fmt: skip
    group.add_argument(
        "--loong-placement", default=default.loong_placement,
        help="head_first, context_first, or an order of head, inner, outer, fastest first (inner-head-outer)",
    )  # fmt: skip
    group.add_argument("--loong-kernel", default=default.loong_kernel, help="attention kernel by name, or auto")


def check_arguments(options: LoongOptions, args: Any) -> None:
    """Refuse what contradicts `--context-parallel-impl loong`, from Megatron's parsed arguments.

    Runs before any process group exists, on every rank with the same arguments, so every rank says the same.
    Raises `ValueError`.
    """
    cp = args.context_parallel_size
    if cp <= 1:
        raise ValueError(
            f"--context-parallel-impl loong needs --context-parallel-size of at least 2, not {cp}; "
            "leave --context-parallel-impl out to train without context parallelism"
        )
    comm_types = getattr(args, "cp_comm_type", None) or ["p2p"]
    comm_types = [comm_types] if isinstance(comm_types, str) else comm_types
    if any(kind != "p2p" for kind in comm_types):
        raise ValueError(
            f"--cp-comm-type {' '.join(comm_types)} chooses between Megatron's native implementations and contradicts "
            "--context-parallel-impl loong; leave it out and use --loong-head-parallel-size"
        )
    sizes = getattr(args, "hierarchical_context_parallel_sizes", None)
    if sizes:
        raise ValueError(
            f"--hierarchical-context-parallel-sizes {' '.join(map(str, sizes))} belongs to native context parallelism "
            "and contradicts --context-parallel-impl loong; leave it out and use --loong-head-parallel-size"
        )
    seq_length = getattr(args, "seq_length", None)
    if seq_length and seq_length % (2 * cp):
        nearest = max(1, round(seq_length / (2 * cp))) * 2 * cp
        raise ValueError(
            f"--seq-length {seq_length} is not a multiple of 2 * context_parallel_size = {2 * cp}; "
            f"the nearest that is: {nearest}"
        )


def resolve(
    options: LoongOptions, cp_global_ranks: list[int], heads_per_tp_rank: int | None, ranks_per_node: int
) -> LoongConfig:
    """Turn options into a layout for one context-parallel group.

    Raises `ValueError` when head parallelism does not divide the heads or the sizes do not divide each other.
    """
    cp = len(cp_global_ranks)
    in_node = cp_ranks_per_node(cp_global_ranks, ranks_per_node)
    hp = options.loong_head_parallel_size
    if not isinstance(hp, int):
        if heads_per_tp_rank is None:
            raise ValueError("--loong-head-parallel-size auto needs --num-attention-heads; give a number")
        hp = largest_head_parallel_size(cp, heads_per_tp_rank, in_node)
    if cp % hp:
        raise ValueError(
            f"--loong-head-parallel-size {hp} does not divide --context-parallel-size {cp}; try one of {divisors(cp)}"
        )
    check_heads(heads_per_tp_rank, hp, cp)
    w = options.loong_inner_ring_size
    if not isinstance(w, int):
        w = largest_inner_ring_size(cp, hp, options.loong_placement, in_node)
    try:
        return LoongConfig(cp, hp, w, options.loong_placement)
    except ValueError as error:
        raise ValueError(f"--loong-inner-ring-size: {error}") from None


def check_heads(heads_per_tp_rank: int | None, head_parallel_size: int, context_parallel_size: int) -> None:
    """`ValueError` when the head group cannot share the query heads of one TP rank evenly."""
    if heads_per_tp_rank is not None and heads_per_tp_rank % head_parallel_size:
        fitting = [n for n in divisors(context_parallel_size) if heads_per_tp_rank % n == 0]
        raise ValueError(
            f"--loong-head-parallel-size {head_parallel_size} does not divide the {heads_per_tp_rank} query heads of "
            f"one tensor-parallel rank; try one of {fitting}"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
