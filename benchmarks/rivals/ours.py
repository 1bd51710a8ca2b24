"""megatron_loong in each of its layouts, and the work of a layer with nobody to talk to."""

from __future__ import annotations

import torch

from benchmarks.rivals.interface import Contestant, GroupCache, Shape, contiguous_positions
from megatron_loong.attention.attention_2d import attention_2d
from megatron_loong.comm.groups import LoongGroups
from megatron_loong.config import LoongConfig
from megatron_loong.kernels.cpu_flash import flash_forward
from megatron_loong.layout.sharding import token_positions

_SHORT = {"head_first": "", "context_first": ", context first"}


class Loong(Contestant):
    """`attention_2d` in one layout."""

    def __init__(self, config: LoongConfig) -> None:
        placement = _SHORT.get(config.placement, f", {config.placement}")
        name = f"loong hp{config.head_parallel_size} ring{config.ring_size} w{config.inner_ring_size}{placement}"
        super().__init__(name, "megatron-loong", config.context_parallel_size)
        self.config = config
        self._groups: LoongGroups | None = None

    def why_not(self, shape: Shape) -> str | None:
        """The reason when the heads or the length do not divide."""
        if shape.heads % self.config.head_parallel_size:
            return f"head_parallel_size {self.config.head_parallel_size} does not divide {shape.heads} heads"
        if shape.seq_len % self.config.sequence_multiple:
            return f"the sequence must be a multiple of {self.config.sequence_multiple}"
        return None

    def set_up(self, groups: GroupCache, shape: Shape) -> None:
        """Its communicators."""
        config = self.config
        self._groups = groups.get(config.head_parallel_size, config.inner_ring_size, config.placement)

    def positions(self, rank: int, seq_len: int) -> torch.Tensor:
        """As `token_positions` says."""
        return torch.as_tensor(token_positions(self.config, rank, seq_len))

    def apply(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """`attention_2d` with the CPU flash operator."""
        assert self._groups is not None
        seq_len = q.shape[1] * self._groups.config.context_parallel_size
        return attention_2d(q, k, v, self._groups, causal=True, kernel="cpu_flash", seq_len=seq_len)


class ComputeAlone(Contestant):
    """An equal share of the layer's attention, all ranks at the same time, nothing sent: the bound of the machine.

    Each rank has a share of the heads over the whole sequence: the largest tiles there are. Its result is not that
    of the layer, so it is not checked.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__("compute alone", "torch", world_size)
        self._share: list[torch.Tensor] = []

    def why_not(self, shape: Shape) -> str | None:
        """It needs whole heads for every rank."""
        if shape.heads % self.world_size:
            return f"{shape.heads} heads are not a multiple of {self.world_size} ranks"
        return None

    def set_up(self, groups: GroupCache, shape: Shape) -> None:
        """Draw q, k and v [b, heads / ranks, S, d]."""
        heads = shape.heads // self.world_size
        kv_heads = max(1, shape.kv_heads // self.world_size)
        sizes = [(shape.batch, count, shape.seq_len, shape.head_dim) for count in (heads, kv_heads, kv_heads)]
        self._share = [torch.randn(size).to(shape.dtype).requires_grad_() for size in sizes]

    def positions(self, rank: int, seq_len: int) -> torch.Tensor:
        """Contiguous; only the length matters."""
        return contiguous_positions(rank, self.world_size, seq_len)

    def apply(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of the share, reshaped to what the harness sends its gradient into."""
        out, _ = flash_forward(*self._share, is_causal=True)
        return out.transpose(1, 2).reshape(q.shape)
