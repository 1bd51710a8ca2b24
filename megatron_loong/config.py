"""LoongConfig: every default and every cross-field check of the layout, free of torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: The three coordinates of a context-parallel rank (design: `cp_rank <-> (head, outer, inner)`).
AXES = ("head", "inner", "outer")

#: Named placements and the axis orders they stand for, fastest-varying axis first.
NAMED_PLACEMENTS = {
    "head_first": ("head", "inner", "outer"),
    "context_first": ("inner", "outer", "head"),
}

SEQUENCE_LAYOUTS = ("zigzag", "contiguous")
PACK_LAYOUTS = ("dealt", "per_document", "contiguous")

#: What gradients travel round the ring in: as they are summed, in the dtype of q, or as is best for that dtype.
GRADIENT_WIRES = ("auto", "float32", "input")

#: Windows as FlashAttention reads them: (keys to the left, keys to the right), -1 unbounded, counted from the bottom
#: right: the last row stands at the last key.
UNBOUNDED = -1
FULL = (UNBOUNDED, UNBOUNDED)
CAUSAL = (UNBOUNDED, 0)


def divisors(n: int) -> list[int]:
    """All positive divisors of `n`, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [i for i in range(1, n + 1) if n % i == 0]


def placement_axes(placement: str) -> tuple[str, str, str]:
    """The axis order of a placement, fastest-varying axis first.

    Raises `ValueError` for anything that is neither a named placement nor an order of the three axes.

    >>> placement_axes("context_first")
    ('inner', 'outer', 'head')
    >>> placement_axes("inner-head-outer")
    ('inner', 'head', 'outer')
    """
    if isinstance(placement, str) and placement in NAMED_PLACEMENTS:
        return NAMED_PLACEMENTS[placement]
    axes = tuple(placement.split("-")) if isinstance(placement, str) else ()
    if len(axes) == 3 and sorted(axes) == sorted(AXES):
        return axes  # type: ignore[return-value]
    raise ValueError(
        f"placement={placement!r} is unknown; use {' or '.join(NAMED_PLACEMENTS)}, or an order of "
        f"head, inner and outer with the fastest-varying first, such as 'inner-head-outer'"
    )


@dataclass(frozen=True)
class LoongConfig:
    """One context-parallel layout: how the ranks that share a sequence divide heads and tokens.

    Raises `ValueError` from the constructor when the numbers do not fit together, naming the field and what
    would fit. LoongTrain (arXiv 2406.18485) sections 4.2 (2D-Attention), 4.3 (Double-Ring-Attention) and
    4.4 (placement). The trap: the paper's d_cp is `ring_size` here, Megatron's CP is `context_parallel_size`.
    """

    context_parallel_size: int = 1
    """Ranks that share one sequence: `head_parallel_size * ring_size`. Megatron's `--context-parallel-size`."""

    head_parallel_size: int = 1
    """Degree of the all-to-all: attention heads are split over this many ranks. The paper's d_hp."""

    inner_ring_size: int | None = None
    """Ranks of one inner ring, the paper's window size w. None: the whole ring, that is, a single ring."""

    placement: str = "head_first"
    """Which coordinate varies fastest over adjacent ranks: `head_first`, `context_first`, or any order such as
    `inner-head-outer`, fastest first."""

    sequence_layout: str = "zigzag"
    """`zigzag`: rank l holds chunks l and 2*cp_size-1-l, so that causal work is balanced. `contiguous`: chunk l."""

    least_rows_to_cut: int = 2048
    """A rank's own block of at least so many rows is attended to in two parts in the backward pass, and the first part
    hides the first hops. For shorter blocks two smaller calls would cost more than the hops take."""

    pack_layout: str = "dealt"
    """Of packed documents. `dealt`: short documents whole, long ones in zigzag, nothing padded. `per_document`: each
    document in zigzag over all ranks, as Megatron and TransformerEngine cut it; lengths are multiples of 2*cp_size.
    `contiguous`: rank l holds the l-th part of the pack."""

    def __post_init__(self) -> None:
        for name in ("context_parallel_size", "head_parallel_size", "inner_ring_size", "least_rows_to_cut"):
            value = getattr(self, name)
            if name == "inner_ring_size" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        cp, hp = self.context_parallel_size, self.head_parallel_size
        if cp % hp:
            raise ValueError(
                f"head_parallel_size={hp} does not divide context_parallel_size={cp}; try one of {divisors(cp)}"
            )
        # The fields say what is in force, not what was asked for, so that equal layouts compare equal. (Frozen, hence
        # the detour; `dataclasses.replace` keeps the number.)
        if self.inner_ring_size is None:
            object.__setattr__(self, "inner_ring_size", cp // hp)
        w, n = self.inner_ring_size, cp // hp
        assert w is not None  # filled in just above
        if n % w:
            raise ValueError(
                f"inner_ring_size={w} does not divide ring_size={n} "
                f"(= context_parallel_size / head_parallel_size); try one of {divisors(n)}"
            )
        placement_axes(self.placement)
        for name, known in (("sequence_layout", SEQUENCE_LAYOUTS), ("pack_layout", PACK_LAYOUTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use {' or '.join(known)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoongConfig:
        """Build from a mapping (YAML, JSON); an unknown key is a `ValueError`, never ignored."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"LoongConfig has no field {', '.join(unknown)}; its fields are {', '.join(known)}")
        return cls(**values)

    @property
    def ring_size(self) -> int:
        """Ranks that pass KV blocks round: `context_parallel_size / head_parallel_size`. The paper's d_cp."""
        return self.context_parallel_size // self.head_parallel_size

    @property
    def outer_ring_size(self) -> int:
        """`ring_size / inner_ring_size`: rounds of the double ring."""
        assert self.inner_ring_size is not None  # __post_init__ filled it in
        return self.ring_size // self.inner_ring_size

    @property
    def axis_order(self) -> tuple[str, str, str]:
        """The placement as an order of axes, fastest-varying first."""
        return placement_axes(self.placement)

    @property
    def chunks_per_rank(self) -> int:
        """Contiguous pieces of the sequence that one rank holds."""
        return 2 if self.sequence_layout == "zigzag" else 1

    @property
    def sequence_multiple(self) -> int:
        """Multiples of this many tokens are shared out evenly; with any other length ranks differ by a token or two."""
        return self.chunks_per_rank * self.context_parallel_size

    def describe(self) -> str:
        """One line with every factor.

        >>> LoongConfig(8, 2, 2).describe()
        'cp 8 = head 2 x ring 4 (outer 2 x inner 2), placement head_first, zigzag'
        """
        packs = "" if self.pack_layout == "dealt" else f", packs {self.pack_layout}"
        return (
            f"cp {self.context_parallel_size} = head {self.head_parallel_size} x ring {self.ring_size} "
            f"(outer {self.outer_ring_size} x inner {self.inner_ring_size}), "
            f"placement {self.placement}, {self.sequence_layout}{packs}"
        )
