"""How close one rank of a ring comes to the kernel that it runs: its whole schedule, with `local_copies` for a network.

    efficiency = (seconds per FLOP of the kernel on one device) / (seconds per FLOP of the rank's forward and backward)

The kernel's own time is taken for a rank's share of the layer in the largest tile there is: h / ranks heads over the
whole sequence, causal. What a rank loses to that are small tiles, merges, packing copies, launches and Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.flops import BACKWARD_PRODUCTS, FORWARD_PRODUCTS
from benchmarks.local_copies import LocalCopies
from benchmarks.rivals.interface import Shape
from benchmarks.simulate import groups_without_processes
from benchmarks.timing import Phases, Timing, interleaved, summarise
from megatron_loong.attention.attention_2d import attention_2d
from megatron_loong.attention.options import AttentionOptions
from megatron_loong.comm.groups import LoongGroups
from megatron_loong.config import CAUSAL, LoongConfig
from megatron_loong.kernels.interface import AttentionKernel, TileRules
from megatron_loong.kernels.registry import choose_kernel

Apply = Callable[..., torch.Tensor]
"""(q, k, v) of one rank -> its output, differentiable."""
Contestant = Callable[[], tuple[float, float]]
"""Runs a forward and a backward; returns the clock (`time.perf_counter`) at the end of each."""


@dataclass(frozen=True)
class Efficiency:
    """One contestant beside the kernel of one device."""

    name: str
    timing: Timing
    flops: int
    """Forward and backward; multiply and add count as two."""
    efficiency: float
    forward_efficiency: float


class CountingKernel:
    """A kernel that notes what it is asked for."""

    def __init__(self, kernel: AttentionKernel) -> None:
        self._kernel = kernel
        self.forward_calls = self.backward_calls = self.flops = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: TileRules) -> Any:
        """As the kernel's."""
        self.forward_calls += 1
        self.flops += tile_flops(q, k, rules.window == CAUSAL, FORWARD_PRODUCTS)
        return self._kernel.forward(q, k, v, rules)

    def backward(self, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *rest: Any, deterministic: bool) -> Any:
        """As the kernel's."""
        self.backward_calls += 1
        self.flops += tile_flops(q, k, rest[-1].window == CAUSAL, BACKWARD_PRODUCTS)
        return self._kernel.backward(dout, q, k, *rest, deterministic=deterministic)


def tile_flops(q: torch.Tensor, k: torch.Tensor, causal: bool, products: int) -> int:
    """FLOPs of one tile, q [b, s_q, h, d] and k [b, s_kv, g, d]; causal: the last row stands at the last key."""
    batch, rows, heads, width = q.shape
    keys = k.shape[1]
    pairs = rows * keys - (rows * (rows - 1) // 2 if causal else 0)
    return 2 * products * batch * heads * width * pairs


def rank_inputs(shape: Shape, ranks: int, device: torch.device) -> list[torch.Tensor]:
    """q, k, v and dout of one rank, [S / ranks, b, heads, d] as Megatron has them; q, k and v want gradients."""
    counts = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    sizes = [(shape.seq_len // ranks, shape.batch, heads, shape.head_dim) for heads in counts]
    tensors = [torch.randn(size, device=device, dtype=torch.float32).to(shape.dtype) for size in sizes]
    return [x.requires_grad_() for x in tensors[:3]] + tensors[3:]


def our_rank(
    config: LoongConfig, cp_rank: int, shape: Shape, kernel: AttentionKernel, groups: LoongGroups | None = None
) -> Apply:
    """Attention of one rank on `rank_inputs`; its peers are replaced unless groups are given."""
    groups = groups or groups_without_processes(config, cp_rank, LocalCopies)

    def apply(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention_2d(q, k, v, groups, qkv_format="sbhd", seq_len=shape.seq_len, kernel=kernel)

    return apply


def count(config: LoongConfig, cp_rank: int, shape: Shape, device: torch.device, kernel: str) -> CountingKernel:
    """What one forward and backward of a rank asks of the kernel; `ArithmeticError` when its result is not finite."""
    counting = CountingKernel(chosen_kernel(shape, config.head_parallel_size, device, kernel))
    q, k, v, dout = rank_inputs(shape, config.context_parallel_size, device)
    out = our_rank(config, cp_rank, shape, counting)(q, k, v)  # type: ignore[arg-type]
    for x in (out, *torch.autograd.grad(out, (q, k, v), dout)):
        if not x.isfinite().all():
            raise ArithmeticError(f"rank {cp_rank} of {config.describe()} gave numbers that are not finite")
    return counting


def chosen_kernel(shape: Shape, head_parallel_size: int, device: torch.device, name: str) -> AttentionKernel:
    """The kernel that the ring would take."""
    q, kv = (
        torch.empty(1, 1, n, shape.head_dim, dtype=shape.dtype, device=device) for n in (shape.heads, shape.kv_heads)
    )
    return choose_kernel(AttentionOptions().request(q, kv, kv, head_parallel_size), name)


def timed(apply: Apply, inputs: Sequence[torch.Tensor]) -> Contestant:
    """A forward and a backward of `apply` on (q, k, v, dout)."""
    *leaves, dout = inputs

    def run() -> tuple[float, float]:
        out = apply(*leaves)
        forward_end = clock(dout.device)
        torch.autograd.grad(out, leaves, dout)
        return forward_end, clock(dout.device)

    return run


def kernel_alone(shape: Shape, ranks: int, device: torch.device, kernel: AttentionKernel) -> tuple[Contestant, int]:
    """The kernel on h / ranks heads over the whole sequence, and its FLOPs. `ValueError` where heads do not divide."""
    if shape.heads % ranks or (shape.kv_heads % ranks and ranks % shape.kv_heads):
        raise ValueError(
            f"--ranks {ranks}: a rank's share of the kernel needs {shape.heads} heads to be a multiple of the ranks, "
            f"and {shape.kv_heads} KV heads to divide or be divided by them"
        )
    one = Shape(shape.seq_len, shape.heads // ranks, max(1, shape.kv_heads // ranks), shape.head_dim, shape.dtype)
    q, k, v, dout = (x.detach().transpose(0, 1).contiguous() for x in rank_inputs(one, 1, device))
    rules = TileRules(shape.head_dim**-0.5, CAUSAL)

    def run() -> tuple[float, float]:
        out, lse = kernel.forward(q, k, v, rules)
        forward_end = clock(device)
        kernel.backward(dout, q, k, v, out, lse, rules, deterministic=False)
        return forward_end, clock(device)

    return run, sum(tile_flops(q, k, True, products) for products in (FORWARD_PRODUCTS, BACKWARD_PRODUCTS))


def copy_s(moved_bytes: int, device: torch.device) -> float:
    """How long the device takes to read and write so many bytes in all, by copies of 128 MiB; the best of three."""
    source = torch.zeros(2**27, dtype=torch.uint8, device=device)
    target, taken = source.clone(), []
    for _ in range(3):
        start = clock(device)
        target.copy_(source)
        taken.append(clock(device) - start)
    return min(taken) * moved_bytes / (2 * source.numel())


def clock(device: torch.device) -> float:
    """`time.perf_counter` when the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def efficiencies(
    contestants: dict[str, tuple[Contestant, int]], reference: tuple[Contestant, int], rounds: int, warmups: int
) -> tuple[Timing, list[Efficiency]]:
    """Timing of the reference and each contestant's efficiency, (run, FLOPs) each; all of them once a round."""
    runs = {"": reference[0], **{name: run for name, (run, _) in contestants.items()}}
    taken = interleaved(runs, rounds, warmups, lambda: None)
    alone = summarise(_one_rank(taken[""]))
    rows = []
    for name, (_, flops) in contestants.items():
        timing = summarise(_one_rank(taken[name]))
        work = flops / reference[1]
        rows.append(
            Efficiency(
                name,
                timing,
                flops,
                efficiency=work * alone.forward_backward_s / timing.forward_backward_s,
                forward_efficiency=work * alone.forward_s / timing.forward_s,
            )
        )
    return alone, rows


def _one_rank(rounds: Sequence[Phases]) -> list[list[Phases]]:
    return [[one] for one in rounds]
