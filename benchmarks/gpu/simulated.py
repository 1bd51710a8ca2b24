"""Attention of all ranks of a layout on one device, threads for ranks: exact, and as accurate as one call."""

from __future__ import annotations

import os
import sys

import torch

from benchmarks.gpu import exact
from benchmarks.gpu.outcome import Run, main
from benchmarks.simulate import simulate
from megatron_loong.attention.attention_2d import attention_2d
from megatron_loong.comm.groups import LoongGroups
from megatron_loong.comm.sequence import shard_sequence
from megatron_loong.config import LoongConfig
from megatron_loong.kernels.interface import AttentionKernel, KernelRequest
from megatron_loong.kernels.registry import KERNELS, choose_kernel
from megatron_loong.layout.sharding import token_positions

LAYOUTS = [LoongConfig(8), LoongConfig(8, 1, 4), LoongConfig(8, 2, 2), LoongConfig(8, 4, 2, "context_first")]
#: Errors in half precision over those of one call of the same kernel on the same numbers.
MULTIPLE = 2.5


def check(run: Run) -> None:
    """Attention of all ranks of a layout on one device, threads for ranks: exact, and as accurate as one call."""
    device, cuda = run.device, run.device.type == "cuda"
    tensors = exact.inputs(128, (8, 4), (16, 16), torch.float64, device)
    worst = run.figures["max_error_float64"] = {}
    for config in LAYOUTS:
        for causal in (True, False):
            with run.case(f"float64, {config.describe()}, {causal=}"):
                error = largest_error(config, tensors, causal)
                worst[config.describe()] = max(worst.get(config.describe(), 0.0), error)
                assert error <= 1e-12, f"{config.describe()}, {causal=}: max abs error {error:.1e} > 1e-12"
    half_len, width = (2048, 128) if cuda else (256, 32)
    halves = exact.inputs(half_len, (8, 4), (width, width), torch.bfloat16, device)
    kernel = half_kernel(KernelRequest(device.type, torch.bfloat16, width, width, 8, 4))
    run.figures["kernel"] = kernel.name
    right, one_call = exact.float64(halves, True), exact.whole(kernel, halves, True)
    ratios = run.figures["rms_over_one_call"] = {}
    for config in LAYOUTS:
        with run.case(f"bfloat16, {config.describe()}"):
            found = run_all_ranks(config, halves, True, kernel.name)
            for name in exact.NAMES:
                ratio = exact.relative_rms(found[name], right[name]) / exact.relative_rms(one_call[name], right[name])
                ratios[config.describe()] = max(ratios.get(config.describe(), 0.0), ratio)
                assert ratio <= MULTIPLE, f"{config.describe()}: {name} {ratio:.2f} times the error of one call"


def half_kernel(request: KernelRequest) -> AttentionKernel:
    """What the ring would take, but torch_flash rather than torch_cudnn: cuDNN makes plans for each thread and shape,
    0.5 s each, and every rank is a new thread here."""
    chosen = choose_kernel(request)
    flash = KERNELS["torch_flash"]
    prefers_flash = chosen.name == "torch_cudnn" and "LOONG_KERNEL" not in os.environ
    return flash if prefers_flash and flash.why_not(request) is None else chosen


def largest_error(config: LoongConfig, tensors: list[torch.Tensor], causal: bool) -> float:
    """Over out, dq, dk and dv of all ranks, in float64 with the reference kernel."""
    right, found = exact.float64(tensors, causal), run_all_ranks(config, tensors, causal, "reference")
    return max(exact.max_error(found[name], right[name]) for name in exact.NAMES)


def run_all_ranks(
    config: LoongConfig, tensors: list[torch.Tensor], causal: bool, kernel: str
) -> dict[str, torch.Tensor]:
    """out, dq, dk, dv of the whole sequence, put together from all ranks."""
    seq_len = tensors[0].shape[1]
    parts = simulate(config, lambda groups: one_rank(groups, tensors, causal, kernel))
    order = torch.cat([token_positions(config, rank, seq_len) for rank in range(config.context_parallel_size)])
    result = {}
    for name, pieces in zip(exact.NAMES, zip(*parts, strict=True), strict=True):
        joined = torch.cat(pieces, 1)
        result[name] = torch.empty_like(joined)
        result[name][:, order.to(joined.device)] = joined
    return result


def one_rank(groups: LoongGroups, tensors: list[torch.Tensor], causal: bool, kernel: str) -> list[torch.Tensor]:
    """out, dq, dk, dv of a rank's tokens from the full tensors."""
    seq_len = tensors[0].shape[1]
    q, k, v, dout = (shard_sequence(x, groups).detach() for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention_2d(q, k, v, groups, causal=causal, seq_len=seq_len, kernel=kernel)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


if __name__ == "__main__":
    sys.exit(main(check))
