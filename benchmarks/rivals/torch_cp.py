"""PyTorch's context parallelism on the CPU flash operator.

`context_parallel` reaches its ring through DTensor, for which no sharding strategy of the CPU operator is registered.
So the ring is called as DTensor's handler would call it, which also spares it DTensor's overhead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from benchmarks.rivals.interface import Contestant, GroupCache, Shape, zigzag_positions
from megatron_loong.kernels.cpu_flash import flash_backward, flash_forward


class TorchContextParallel(Contestant):
    """One ring over all ranks, head-tail balanced, KV rotated by all-gather or by all-to-all."""

    def __init__(self, world_size: int, rotation: str) -> None:
        super().__init__(f"PyTorch CP {rotation}", "torch", world_size)
        self.rotation = rotation
        self._group: Any = None

    def why_not(self, shape: Shape) -> str | None:
        """A PyTorch that keeps its ring elsewhere."""
        try:
            _ring()
        except (ImportError, AttributeError) as error:
            return f"torch {torch.__version__} does not have its ring where this adapter looks: {error}"
        return None

    def set_up(self, groups: GroupCache, shape: Shape) -> None:
        """The inner ring of our single ring."""
        self._group = groups.get(1).handle("inner").process_group

    def positions(self, rank: int, seq_len: int) -> torch.Tensor:
        """Head and tail."""
        return zigzag_positions(rank, self.world_size, seq_len)

    def apply(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Through PyTorch's ring, forward and backward."""
        bhsd = [x.transpose(1, 2) for x in (q, k, v)]
        return _Ring.apply(*bhsd, self._group, self.rotation).transpose(1, 2)


def _ring() -> Any:
    from torch.distributed.tensor.experimental._context_parallel import _attention

    _ = _attention._templated_ring_attention, _attention._templated_ring_attention_backward, _attention._cp_options
    return _attention


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: dist.ProcessGroup, rotation: str
    ) -> torch.Tensor:
        ring = _ring()
        ring.set_rotate_method(rotation.replace("-", ""))
        out, lse = ring._templated_ring_attention(group, 2, _forward, q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.rotation = group, rotation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        ring = _ring()
        ring.set_rotate_method(ctx.rotation.replace("-", ""))
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = ring._templated_ring_attention_backward(
            ctx.group, 2, _backward, dout, "grad_out", q, k, v, out, lse, is_causal=True
        )
        return dq, dk, dv, None, None


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> tuple[torch.Tensor, ...]:
    return flash_forward(q, k, v, is_causal=is_causal)


def _backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    is_causal: bool,
) -> tuple[torch.Tensor, ...]:
    return flash_backward(grad_out, query, key, value, out, lse=logsumexp, is_causal=is_causal)
