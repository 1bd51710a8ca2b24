"""How fast this machine is: one kernel, one product, one copy, one hop of a ring; all ranks at the same time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_loong.comm.ring import Message, Ring
from megatron_loong.config import CAUSAL, FULL
from megatron_loong.kernels.interface import AttentionKernel, KernelRequest, TileRules
from megatron_loong.kernels.registry import choose_kernel
from megatron_loong.topology.groups import LoongGroups


class Link(NamedTuple):
    """One direction, as one rank sees it while its neighbours send too."""

    bytes_per_s: float
    latency_s: float


class Tile(NamedTuple):
    """Everything of an attention tile but its lengths."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    head_dim: int

    def kernel(self) -> AttentionKernel:
        """The kernel that training would take."""
        request = KernelRequest(self.device.type, self.dtype, self.head_dim, self.head_dim, self.heads, self.heads)
        return choose_kernel(request)

    def random(self, length: int) -> torch.Tensor:
        """[1, length, heads, head_dim]."""
        return torch.randn(1, length, self.heads, self.head_dim, device=self.device, dtype=self.dtype)


def attention(tile: Tile, length: int, causal: bool, backward: bool, seconds: float) -> float:
    """FLOP/s of one tile of `length` by `length`; a causal one counts half of the square."""
    call = _attention_call(tile, length, causal, backward)
    flops = 4 * length**2 * tile.heads * tile.head_dim / (2 if causal else 1) * (2.5 if backward else 1)
    return flops / seconds_of(call, tile.device, seconds)


def overhead(tile: Tile, seconds: float) -> float:
    """Seconds of a tile so small that it does no work to speak of."""
    return seconds_of(_attention_call(tile, 8, False, False), tile.device, seconds)


def _attention_call(tile: Tile, length: int, causal: bool, backward: bool) -> Callable[[], object]:
    kernel, rules = tile.kernel(), TileRules(tile.head_dim**-0.5, CAUSAL if causal else FULL)
    q, k, v, dout = (tile.random(length) for _ in range(4))
    if not backward:
        return lambda: kernel.forward(q, k, v, rules)
    out, lse = kernel.forward(q, k, v, rules)
    return lambda: kernel.backward(dout, q, k, v, out, lse, rules, deterministic=False)


def matmul(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of a square matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds_of(lambda: a @ b, device, seconds)


def memory(device: torch.device, seconds: float) -> float:
    """Bytes per second, read plus written, of adding one large float32 tensor to another."""
    n = (1 << 28) if device.type == "cuda" else (1 << 22)
    a, b = (torch.zeros(n, device=device) for _ in range(2))
    return 12 * n / seconds_of(lambda: a.add_(b), device, seconds)


def hop(groups: LoongGroups, ring: str, device: torch.device, seconds: float) -> Link:
    """A hop of the `inner` or `outer` ring, all ranks at once: latency of a small one, rate of the rest of a large."""
    small, large = 1 << 10, (1 << 28) if device.type == "cuda" else (1 << 22)
    handle = groups.handle(ring)
    neighbours = (handle.rank + 1) % handle.size, (handle.rank - 1) % handle.size

    def once(size: int) -> Callable[[], None]:
        outgoing, incoming = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

        def send() -> None:
            ends = ((True, neighbours[0], outgoing), (False, neighbours[1], incoming))
            for wait in Ring(handle).post([Message(*end, "calibration") for end in ends]):
                wait()

        return send

    latency_s = seconds_of(once(small), device, seconds)
    large_s = seconds_of(once(large), device, seconds)
    return Link((large - small) / max(large_s - latency_s, 1e-9), latency_s)


def seconds_of(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Mean time of `call` over all ranks, each of which calls it equally often for about `seconds`."""
    call()
    _synchronize(device)
    dist.barrier()
    start = time.perf_counter()
    call()
    _synchronize(device)
    # The slowest rank decides how often, so that hops pair up.
    one = torch.tensor([time.perf_counter() - start], device=device)
    dist.all_reduce(one, dist.ReduceOp.MAX)
    times = max(3, min(10_000, int(seconds / max(one.item(), 1e-6))))
    dist.barrier()
    start = time.perf_counter()
    for _ in range(times):
        call()
    _synchronize(device)
    mean = torch.tensor([(time.perf_counter() - start) / times], device=device, dtype=torch.float64)
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
