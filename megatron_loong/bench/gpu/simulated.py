"""Attention of all ranks of a layout on one device, threads for ranks: exact, and as accurate as one call."""

from __future__ import annotations

import sys
from typing import Any

import torch

from megatron_loong.attention.attention_2d import attention_2d
from megatron_loong.bench.gpu import exact
from megatron_loong.bench.gpu.outcome import main
from megatron_loong.bench.simulate import simulate
from megatron_loong.config import LoongConfig
from megatron_loong.kernels.interface import KernelRequest
from megatron_loong.kernels.registry import choose_kernel
from megatron_loong.sequence.sharding import shard_sequence, token_positions
from megatron_loong.topology.groups import LoongGroups

LAYOUTS = [LoongConfig(8), LoongConfig(8, 1, 4), LoongConfig(8, 2, 2), LoongConfig(8, 4, 2, "context_first")]
#: Errors in half precision over those of one call of the same kernel on the same numbers.
MULTIPLE = 2.5


def check(device: torch.device) -> dict[str, Any]:
    """Attention of all ranks of a layout on one device, threads for ranks: exact, and as accurate as one call."""
    half_len, width = (2048, 128) if device.type == "cuda" else (256, 32)
    figures: dict[str, Any] = {"max_error_float64": 0.0, "rms_over_one_call": 0.0}
    tensors = exact.inputs(128, (8, 4), (16, 16), torch.float64, device)
    halves = exact.inputs(half_len, (8, 4), (width, width), torch.bfloat16, device)
    kernel = choose_kernel(KernelRequest(device.type, torch.bfloat16, width, width, 8, 4))
    right, one_call = exact.float64(halves, True), exact.whole(kernel, halves, True)
    for config in LAYOUTS:
        for causal in (True, False):
            error = largest_error(config, tensors, causal)
            assert error <= 1e-12, f"{config.describe()}, {causal=}: max abs error {error:.1e} > 1e-12"
            figures["max_error_float64"] = max(figures["max_error_float64"], error)
        found = run(config, halves, True, "auto")
        for name in exact.NAMES:
            ratio = exact.relative_rms(found[name], right[name]) / exact.relative_rms(one_call[name], right[name])
            assert ratio <= MULTIPLE, f"{config.describe()}: {name} {ratio:.2f} times the error of one call"
            figures["rms_over_one_call"] = max(figures["rms_over_one_call"], ratio)
    return {**figures, "kernel": kernel.name, "layouts": [config.describe() for config in LAYOUTS]}


def largest_error(config: LoongConfig, tensors: list[torch.Tensor], causal: bool) -> float:
    """Over out, dq, dk and dv of all ranks, in float64 with the reference kernel."""
    right, found = exact.float64(tensors, causal), run(config, tensors, causal, "reference")
    return max(exact.max_error(found[name], right[name]) for name in exact.NAMES)


def run(config: LoongConfig, tensors: list[torch.Tensor], causal: bool, kernel: str) -> dict[str, torch.Tensor]:
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
