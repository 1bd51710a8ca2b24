"""What the harness asks of a contestant: dispatch, apply, undispatch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_loong.comm.groups import LoongGroups, build_groups
from megatron_loong.config import LoongConfig


@dataclass(frozen=True)
class Shape:
    """One causal attention layer over a sequence that all ranks share."""

    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    batch: int = 1

    def inputs(self, seed: int = 0) -> list[torch.Tensor]:
        """q [b, S, h, d], k, v [b, S, g, d] and dout like q: the same on every rank."""
        generator = torch.Generator().manual_seed(seed)
        counts = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        sizes = [(self.batch, self.seq_len, heads, self.head_dim) for heads in counts]
        return [torch.randn(size, generator=generator).to(self.dtype) for size in sizes]

    def describe(self) -> str:
        """One line, such as 'S 4096, h 8, g 2, d 64, bfloat16'."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"S {self.seq_len}, h {self.heads}, g {self.kv_heads}, d {self.head_dim}, {kind}"


class GroupCache:
    """Groups of one world, made once for each layout and shared by all contestants that run in it.

    gloo gives each group a thread that polls: contestants with groups of their own would slow each other down.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._made: dict[LoongConfig, LoongGroups] = {}

    def get(
        self, head_parallel_size: int, inner_ring_size: int | None = None, placement: str = "head_first"
    ) -> LoongGroups:
        """Collective over the world. Contestants that know no double ring leave `inner_ring_size` out."""
        config = LoongConfig(self.world_size, head_parallel_size, inner_ring_size, placement)
        if config not in self._made:
            self._made[config] = build_groups(config, range(self.world_size))
        return self._made[config]

    def close(self) -> None:
        """Release all of them."""
        for groups in self._made.values():
            groups.destroy()
        self._made.clear()


class Contestant(ABC):
    """One implementation in one layout. Tensors are [b, s, heads, d]."""

    def __init__(self, name: str, package: str, world_size: int) -> None:
        self.name = name
        self.package = package
        """Distribution whose version the record names."""
        self.world_size = world_size

    def why_not(self, shape: Shape) -> str | None:
        """None when it can run this shape here, else the reason."""
        return None

    @abstractmethod
    def set_up(self, groups: GroupCache, shape: Shape) -> None:
        """Make what apply needs. Collective: every rank calls it for the same contestants in the same order."""

    @abstractmethod
    def positions(self, rank: int, seq_len: int) -> torch.Tensor:
        """Global positions of the tokens that a rank holds, in the order in which it holds them."""

    @abstractmethod
    def apply(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Causal attention of the local tensors; differentiable."""

    def dispatch(self, full: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's part of [b, S, heads, d]."""
        return full[:, self.positions(rank, full.shape[1])].contiguous()

    def undispatch(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """[b, S, heads, d] from the parts of all ranks, in the order of ranks."""
        joined = torch.cat(parts, dim=1)
        order = torch.cat([self.positions(rank, joined.shape[1]) for rank in range(self.world_size)])
        full = torch.empty_like(joined)
        full[:, order] = joined
        return full


def zigzag_positions(index: int, count: int, seq_len: int) -> torch.Tensor:
    """Chunks `index` and `2 * count - 1 - index` of a sequence cut into `2 * count`.

    >>> zigzag_positions(0, 2, 8).tolist()
    [0, 1, 6, 7]
    """
    chunk = seq_len // (2 * count)
    starts = (index * chunk, (2 * count - 1 - index) * chunk)
    return torch.cat([torch.arange(start, start + chunk) for start in starts])


def contiguous_positions(index: int, count: int, seq_len: int) -> torch.Tensor:
    """Chunk `index` of a sequence cut into `count`."""
    chunk = seq_len // count
    return torch.arange(index * chunk, (index + 1) * chunk)


Maker = Callable[[int], Contestant]
