"""Double-Ring-Attention over the KV owners: one loop forward, one backward (LoongTrain section 4.3).

A single ring and Ulysses (ring_size 1) are the same loops with other numbers. Tensors are [s, b, h, d] views of
whatever memory they came in; a KV block is one flat buffer so that a hop is one message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from megatron_loong.attention.merge import merge_
from megatron_loong.comm.ring import Ring
from megatron_loong.kernels.interface import AttentionKernel
from megatron_loong.planner.schedule import (
    Run,
    Tile,
    Visit,
    backward_visits,
    forward_visits,
    gradient_sources,
    tiles,
)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What out, dq, dk and dv are summed in: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class KVBlock:
    """k [s, b, g, d] and v [s, b, g, dv] (or their gradients) as two views of one flat buffer."""

    flat: torch.Tensor
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]

    @classmethod
    def empty(cls, k_shape: tuple[int, ...], v_shape: tuple[int, ...], like: torch.Tensor) -> KVBlock:
        """An uninitialised block on the device and in the dtype of `like`."""
        size = torch.Size(k_shape).numel() + torch.Size(v_shape).numel()
        return cls(torch.empty(size, dtype=like.dtype, device=like.device), tuple(k_shape), tuple(v_shape))

    def with_data(self, flat: torch.Tensor) -> KVBlock:
        """The same shapes over another buffer."""
        return KVBlock(flat, self.k_shape, self.v_shape)

    def zeros(self, dtype: torch.dtype) -> KVBlock:
        """A gradient block for this one."""
        return self.with_data(torch.zeros_like(self.flat, dtype=dtype))

    @property
    def k(self) -> torch.Tensor:
        """[s, b, g, d]."""
        return self.flat[: torch.Size(self.k_shape).numel()].view(self.k_shape)

    @property
    def v(self) -> torch.Tensor:
        """[s, b, g, dv]."""
        return self.flat[torch.Size(self.k_shape).numel() :].view(self.v_shape)


@dataclass(frozen=True)
class RingPlan:
    """Everything the loops need that is not a tensor."""

    ring_rank: int
    outer_ring_size: int
    inner_ring_size: int
    runs: tuple[tuple[Run, ...], ...]
    """Runs of the global sequence that each ring rank holds."""
    rings: dict[str, Ring]
    """`inner`, `outer`, `inner_dkv`, `outer_dkv`; none for an axis of size 1."""
    kernel: AttentionKernel
    causal: bool
    softmax_scale: float
    deterministic: bool

    @property
    def ring_size(self) -> int:
        """Number of KV owners."""
        return self.outer_ring_size * self.inner_ring_size

    def tiles_of(self, visit: Visit) -> list[Tile]:
        """Tiles that this rank computes with the block of a visit."""
        owner = visit.owner(self.ring_rank, self.ring_size, self.inner_ring_size)
        return tiles(list(self.runs[self.ring_rank]), list(self.runs[owner]), self.causal)


Arrival = tuple[torch.Tensor, Callable[[], None]]


@dataclass
class Circulation:
    """Brings the KV blocks in the order of `visits`, each hop posted before the tile that hides it.

    Outer hops are posted as soon as the block they carry is here, that is, a whole inner round ahead. Besides the
    rank's own block it holds, on each of the two rings, the block that travels and the one that arrives.
    """

    plan: RingPlan
    own: KVBlock
    visits: list[Visit]
    _blocks: dict[Visit, torch.Tensor] = field(default_factory=dict)
    _under_way: dict[Visit, Arrival] = field(default_factory=dict)
    _posted: set[Visit] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._arrived(Visit(0, 0), self.own.flat)

    def block(self, index: int) -> KVBlock:
        """The block of `visits[index]`; posts what the next visit needs before it returns."""
        flat = self._fetch(self.visits[index])
        if index + 1 < len(self.visits):
            self._post(self.visits[index + 1])
        self._forget(self.visits[: index + 1])
        return self.own.with_data(flat)

    def _fetch(self, visit: Visit) -> torch.Tensor:
        self._post(visit)
        if visit in self._under_way:
            incoming, wait = self._under_way.pop(visit)
            wait()
            self._arrived(visit, incoming)
        return self._blocks[visit]

    def _arrived(self, visit: Visit, flat: torch.Tensor) -> None:
        self._blocks[visit] = flat
        following = Visit(visit.outer_shift + 1, 0)
        if visit.inner_shift == 0 and following.outer_shift < self.plan.outer_ring_size:
            self._post(following)

    def _post(self, visit: Visit) -> None:
        source = visit.source()
        if source is None or visit in self._posted:
            return
        self._posted.add(visit)
        ring = self.plan.rings["inner" if visit.inner_shift else "outer"]
        self._under_way[visit] = ring.pass_on(self._fetch(source), f"KV block {tuple(visit)}")

    def _forget(self, done: list[Visit]) -> None:
        """Drop the blocks that were visited and passed on; a hop under way keeps its own reference."""
        waiting = {visit.source() for visit in self.visits if visit not in self._posted}
        for visit in done:
            if visit not in waiting:
                self._blocks.pop(visit, None)


def ring_forward(q: torch.Tensor, kv: KVBlock, plan: RingPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the local q over every rank's kv.

    q [s, b, h, d], kv of the same s. Returns out [s, b, h, dv] in q's dtype and lse [s, b, h] in float32 (float64).
    """
    visits = forward_visits(plan.outer_ring_size, plan.inner_ring_size)
    circulation = Circulation(plan, kv, visits)
    out = lse = None
    for index, visit in enumerate(visits):
        block = circulation.block(index)
        for tile in plan.tiles_of(visit):
            block_out, block_lse = plan.kernel.forward(
                _bshd(q[tile.q]),
                _bshd(block.k[tile.kv]),
                _bshd(block.v[tile.kv]),
                softmax_scale=plan.softmax_scale,
                causal=tile.causal,
            )
            if out is None or lse is None:  # the rank's own tile: it covers every row
                out, lse = block_out, block_lse
                if plan.ring_size > 1:
                    out, lse = out.to(accumulator_dtype(q.dtype)), lse.clone()
            else:
                merge_(out[:, tile.q], lse[:, tile.q], block_out, block_lse)
    assert out is not None and lse is not None
    return out.to(q.dtype).transpose(0, 1), lse.transpose(0, 1)


def ring_backward(
    dout: torch.Tensor, q: torch.Tensor, kv: KVBlock, out: torch.Tensor, lse: torch.Tensor, plan: RingPlan
) -> tuple[torch.Tensor, KVBlock]:
    """(dq, dkv) from the global out and lse; shapes of q and kv, summed and returned in float32 (float64).

    KV goes round again. The gradient of a block travels with the visits, on communicators of its own, and is at
    home after ring_size - 1 hops (`backward_visits`).
    """
    visits = backward_visits(plan.outer_ring_size, plan.inner_ring_size)
    circulation = Circulation(plan, kv, visits)
    sum_dtype = accumulator_dtype(q.dtype)
    dq = torch.zeros(q.shape, dtype=sum_dtype, device=q.device)
    arriving: dict[Visit, Arrival] = {}
    for index, visit in enumerate(visits):
        block = circulation.block(index)
        grads = [(tile, _tile_backward(dout, q, block, out, lse, tile, plan)) for tile in plan.tiles_of(visit)]
        del block
        dkv = None
        for source in gradient_sources(visit, plan.outer_ring_size, plan.inner_ring_size):
            incoming, wait = arriving.pop(source)
            wait()
            dkv = kv.with_data(incoming if dkv is None else dkv.flat.add_(incoming))
        dkv = dkv or kv.zeros(sum_dtype)
        for tile, (_, tile_dk, tile_dv) in grads:
            dkv.k[tile.kv].add_(tile_dk.transpose(0, 1))
            dkv.v[tile.kv].add_(tile_dv.transpose(0, 1))
        if index + 1 == len(visits):
            return_dkv = dkv
        else:
            ring = plan.rings["outer_dkv" if visit.inner_shift == 0 else "inner_dkv"]
            arriving[visit] = ring.pass_on(dkv.flat, f"dKV of block {tuple(visit)}")
        for tile, (tile_dq, _, _) in grads:
            dq[tile.q].add_(tile_dq.transpose(0, 1))
    return dq, return_dkv


def _tile_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    block: KVBlock,
    out: torch.Tensor,
    lse: torch.Tensor,
    tile: Tile,
    plan: RingPlan,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return plan.kernel.backward(
        _bshd(dout[tile.q]),
        _bshd(q[tile.q]),
        _bshd(block.k[tile.kv]),
        _bshd(block.v[tile.kv]),
        _bshd(out[tile.q]),
        _bshd(lse[tile.q]),
        softmax_scale=plan.softmax_scale,
        causal=tile.causal,
        deterministic=plan.deterministic,
    )


def _bshd(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1)
