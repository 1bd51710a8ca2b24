"""How fast this machine is: one kernel, one product, one copy, one hop of a ring; all ranks at the same time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_loong.attention.attention_2d import attention_2d
from megatron_loong.comm.groups import LoongGroups, build_groups
from megatron_loong.comm.ring import Ring
from megatron_loong.comm.transport import Message
from megatron_loong.config import CAUSAL, FULL, LoongConfig
from megatron_loong.kernels.interface import AttentionKernel, KernelRequest, TileRules
from megatron_loong.kernels.registry import choose_kernel
from megatron_loong.kernels.row_ops import merge_rows

#: Windows of one measurement, of which the fastest counts.
_WINDOWS = 5
#: A hop that takes less is measured again with eight times the bytes, on a CPU; any other with twice as many.
_LONG_HOP_S = 0.02
#: A call that takes less is made three times at least.
_LONG_CALL_S = 0.3


class Link(NamedTuple):
    """One direction, as one rank sees it while its neighbours send too."""

    bytes_per_s: float
    latency_s: float
    busy_s: float = 0.0
    """Computing lost to a message."""
    busy_s_per_byte: float = 0.0
    """Computing lost to a byte."""


class Tile(NamedTuple):
    """Everything of an attention tile but its lengths."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    head_dim: int
    crowding: float = 1.0
    """Time that computing takes while all ranks compute and share the processors, over processor time."""

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
    return flops / computing_s(call, tile, seconds)


def overhead(tile: Tile, seconds: float) -> float:
    """Seconds that a further tile of a ring costs besides its work: launches and, on a CPU, what Python does for it.

    On a CPU: the computing thread's time in an attention so short that it does no work to speak of, over a ring of all
    ranks, less the same over one head group of all ranks, by tile.
    """
    kernel_s = computing_s(_attention_call(tile, 8, False, False), tile, seconds)
    world = dist.get_world_size()
    if tile.device.type == "cuda" or world == 1:
        return kernel_s
    spent = []
    for config in (LoongConfig(world, 1), LoongConfig(world, world)):
        groups = build_groups(config, range(world))
        spent.append(_busy(_short_attention(groups, tile._replace(heads=world)), tile, seconds).main_s)
        groups.destroy()
    return max(kernel_s, (spent[0] - spent[1]) / (2 * (world - 1)))


def _short_attention(groups: LoongGroups, tile: Tile) -> Callable[[], None]:
    q, k, v = (tile.random(16).requires_grad_() for _ in range(3))
    dout = tile.random(16)

    def run() -> None:
        attention_2d(q, k, v, groups, qkv_format="bshd", causal=True).backward(dout)

    return run


def _attention_call(tile: Tile, length: int, causal: bool, backward: bool) -> Callable[[], object]:
    kernel, rules = tile.kernel(), TileRules(tile.head_dim**-0.5, CAUSAL if causal else FULL)
    q, k, v, dout = (tile.random(length) for _ in range(4))
    if not backward:
        return lambda: kernel.forward(q, k, v, rules)
    out, lse = kernel.forward(q, k, v, rules)
    return lambda: kernel.backward(dout, q, k, v, out, lse, rules, deterministic=False)


def matmul(tile: Tile, seconds: float) -> float:
    """FLOP/s of a square matrix product."""
    n = 8192 if tile.device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=tile.device, dtype=tile.dtype) for _ in range(2))
    return 2 * n**3 / computing_s(lambda: a @ b, tile, seconds)


def memory(tile: Tile, seconds: float) -> float:
    """Bytes per second, read plus written, of merging four blocks' outputs into a float32 result in one pass."""
    rows = (1 << 16) if tile.device.type == "cuda" else (1 << 10)
    out = tile.random(rows)
    lse = torch.zeros(out.shape[:-1], device=tile.device)
    result = lse, out.float()
    moved = 2 * result[1].nbytes + 4 * out.nbytes
    return moved / computing_s(lambda: merge_rows(result, [result, *[(lse, out)] * 4]), tile, seconds)


def hop(groups: LoongGroups, ring: str, tile: Tile, seconds: float) -> Link:
    """A hop of the `inner` or `outer` ring, all ranks at once: latency of a small one, rate of the rest of a large.

    On a CPU also the computing that it costs: processor time of the hop, sender's and receiver's part, over the share
    of a processor that a rank gets while all of them compute.
    """
    gpu = tile.device.type == "cuda"
    small, large = 1 << 10, (1 << 28) if gpu else (1 << 20)

    def timed(size: int) -> _Busy:
        return _busy(_hop(groups, ring, size, tile.device), tile, seconds)

    little, much = timed(small), timed(large)
    if not gpu:
        large *= 8 if much.wall_s < _LONG_HOP_S else 2
        much = timed(large)
    rate = (large - small) / max(much.wall_s - little.wall_s, 1e-9)
    if gpu:
        return Link(rate, little.wall_s)
    return Link(rate, little.wall_s, little.others_s, max(0.0, much.others_s - little.others_s) / (large - small))


class _Busy(NamedTuple):
    """One call: until the last rank was through, and computing time lost to it, by the calling thread and by others."""

    wall_s: float
    main_s: float
    others_s: float


def _busy(call: Callable[[], object], tile: Tile, seconds: float) -> _Busy:
    """Processor times count as what they take while all ranks compute and share the processors."""
    wall_s, main_s, all_s = _times(call, tile.device, seconds)
    return _Busy(wall_s, main_s * tile.crowding, (all_s - main_s) * tile.crowding)


def crowded(tile: Tile, seconds: float) -> Tile:
    """The tile with its `crowding`, measured over `seconds` at once; 1 on a GPU, where nothing is shared."""
    if tile.device.type == "cuda":
        return tile
    attend = _attention_call(tile, 512, False, False)
    attend()
    dist.barrier()
    started = time.perf_counter(), time.thread_time()
    while time.perf_counter() - started[0] < seconds:
        attend()
    used = torch.tensor([time.perf_counter() - started[0], time.thread_time() - started[1]])
    dist.all_reduce(used)
    return tile._replace(crowding=max(1.0, float(used[0] / used[1])))


def computing_s(call: Callable[[], object], tile: Tile, seconds: float) -> float:
    """Seconds of a computation while all ranks compute.

    Where ranks share processors, from processor time and `crowding`: time by the clock says who was scheduled when.
    """
    if tile.device.type == "cuda" or torch.get_num_threads() > 1:
        return seconds_of(call, tile.device, seconds)
    return seconds_of(call, tile.device, seconds, clock=time.thread_time) * tile.crowding


def _times(call: Callable[[], object], device: torch.device, seconds: float) -> tuple[float, float, float]:
    """`seconds_of`, the last; processor time as the mean over ranks and calls: of the calling thread, of all."""
    calls = 0

    def counted() -> None:
        nonlocal calls
        calls += 1
        call()

    before = time.thread_time(), time.process_time()
    taken = seconds_of(counted, device, seconds, last=True)
    after = time.thread_time(), time.process_time()
    used = torch.tensor([(b - a) / calls for a, b in zip(before, after, strict=True)], device=device)
    dist.all_reduce(used)
    main_s, all_s = (used / dist.get_world_size()).tolist()
    return taken, main_s, all_s


def _hop(groups: LoongGroups, ring: str, size: int, device: torch.device) -> Callable[[], None]:
    handle = groups.handle(ring)
    neighbours = (handle.rank + 1) % handle.size, (handle.rank - 1) % handle.size
    outgoing = torch.zeros(size, dtype=torch.uint8, device=device)

    def send() -> None:
        nonlocal outgoing
        incoming = torch.empty_like(outgoing)  # as in a ring: new memory for each block, which is then passed on
        ends = ((True, neighbours[0], outgoing), (False, neighbours[1], incoming))
        for wait in Ring(handle).post([Message(*end, "calibration") for end in ends]):
            wait()
        outgoing = incoming

    return send


def seconds_of(
    call: Callable[[], object],
    device: torch.device,
    seconds: float,
    *,
    last: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Time of `call`, which all ranks call equally often for about `seconds` in all: their mean, or that of the last.

    The fastest of several windows counts: whatever else runs on the machine only slows down.
    """
    call()
    # The slowest rank decides how often, so that hops pair up.
    one = _window(call, device, 1, last=True)
    times = max(3 if one < _LONG_CALL_S else 1, min(10_000, int(seconds / _WINDOWS / max(one, 1e-6))))
    return min(_window(call, device, times, last, clock) for _ in range(_WINDOWS))


def _window(
    call: Callable[[], object],
    device: torch.device,
    times: int,
    last: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of one of `times` calls, begun by all ranks together: mean over ranks, or the largest."""
    _synchronize(device)
    dist.barrier()
    start = clock()
    for _ in range(times):
        call()
    _synchronize(device)
    taken = torch.tensor([(clock() - start) / times], device=device, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX if last else dist.ReduceOp.SUM)
    return taken.item() / (1 if last else dist.get_world_size())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
