"""Attention never makes the host wait for the GPU, and a layer of it can be captured in a CUDA graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.gpu import exact
from benchmarks.gpu.outcome import CannotRunError, Run, main
from benchmarks.local_copies import LocalCopies
from benchmarks.rank_alone import chosen_kernel, our_rank, rank_inputs
from benchmarks.rivals.interface import Shape
from benchmarks.simulate import groups_without_processes
from megatron_loong.config import LoongConfig

LAYOUTS = [LoongConfig(1), LoongConfig(8), LoongConfig(8, 1, 4), LoongConfig(8, 2, 2)]
#: Of bfloat16 gradients that are added up in another order each time.
TOLERANCE = 1e-2
SHAPE = Shape(4096, 16, 8, 128, torch.bfloat16)


def check(run: Run) -> None:
    """Attention never makes the host wait for the GPU, and a layer of it can be captured in a CUDA graph."""
    if run.device.type != "cuda":
        raise CannotRunError("a CPU has no synchronisation to find; tests/one_process/test_no_syncs.py is its part")
    without = run.figures["layouts without a synchronisation"] = []
    errors = run.figures["graph_relative_rms"] = {}
    for config in LAYOUTS:
        step, layout = one_step(config, run.device), config.describe()
        with run.case(f"no synchronisation, {layout}"):
            for _ in range(2):  # what is made once per layout is made here
                step()
            with no_synchronisation():
                step()
            without.append(layout)
        with run.case(f"graph, {layout}"):
            error = errors[layout] = graph_difference(step, step())
            assert error <= TOLERANCE, f"{layout}: results of the graph are {error:.1e} from those before"


def one_step(config: LoongConfig, device: torch.device) -> Callable[[], list[torch.Tensor]]:
    """out, dq, dk, dv of one rank, its peers replaced by copies on other streams."""
    kernel = chosen_kernel(SHAPE, config.head_parallel_size, device, "auto")
    inputs = rank_inputs(SHAPE, config.context_parallel_size, device)
    apply = our_rank(config, 0, SHAPE, kernel, groups_without_processes(config, 0, LocalCopies))

    def step() -> list[torch.Tensor]:
        q, k, v, dout = inputs
        out = apply(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    return step


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """An operator that synchronises raises. Waits for events and streams by the host are not seen by it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def graph_difference(step: Callable[[], list[torch.Tensor]], expected: list[torch.Tensor]) -> float:
    """Relative RMS between `expected` and what a captured graph of `step` computes when it is replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as PyTorch asks for: a warm-up on the stream of the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        results = step()
    for x in results:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return max(exact.relative_rms(x, y.double()) for x, y in zip(results, expected, strict=True))


if __name__ == "__main__":
    sys.exit(main(check))
