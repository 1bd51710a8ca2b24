"""Kernels whose forward is in fp8 (e4m3), against float64: heads of unequal size, many keys."""

from __future__ import annotations

import torch

from benchmarks.gpu import exact
from benchmarks.gpu.outcome import Run
from megatron_loong.config import FULL
from megatron_loong.kernels.interface import AttentionKernel, TileRules
from megatron_loong.kernels.registry import KERNELS

#: Largest RMS of the error over RMS of the right answer. e4m3 keeps 3 bits behind the leading one, so that rounding has
#: an RMS of 2.5%: q and k bring 3.6% into scores of RMS 1, probabilities and v 2.5% each, 5% in all.
BOUND = 8e-2
#: Powers of ten by which one group of heads differs from the next.
SPREAD = 3
KEYS = {"cuda": (1024, 16384, 131072), "cpu": (64, 256)}


def look_at(run: Run, kernel: AttentionKernel) -> None:
    """The errors of out with heads of unequal size, and by the number of keys."""
    with run.case("heads of unequal size"):
        error = run.figures["worst_of_unequal_heads"] = worst_of_unequal_heads(kernel, run.device)
        assert error <= BOUND, f"out {error:.1e} > {BOUND:g}"
    by_keys = run.figures["by_keys"] = {}
    for keys in KEYS[run.device.type]:
        with run.case(f"{keys} keys"):
            error = by_keys[keys] = error_of_out(kernel, keys, run.device)
            assert error <= BOUND, f"out {error:.1e} > {BOUND:g}"


def worst_of_unequal_heads(kernel: AttentionKernel, device: torch.device) -> float:
    """Relative RMS error of out of the worst KV head's queries, each KV head's v `10**SPREAD` of the one before.

    With one scale for all heads, the smaller ones would be rounded to nothing.
    """
    tensors = exact.inputs(256, (8, 4), (64, 64), torch.bfloat16, device)
    tensors[2] *= 10.0 ** (SPREAD * torch.arange(-2, 2, device=device)).view(-1, 1)
    found, right = exact.whole(kernel, tensors, True)["out"], exact.float64(tensors, True)["out"]
    pairs = zip(found.unflatten(2, (4, 2)).unbind(2), right.unflatten(2, (4, 2)).unbind(2), strict=True)
    return max(exact.relative_rms(mine, theirs) for mine, theirs in pairs)


def error_of_out(kernel: AttentionKernel, keys: int, device: torch.device) -> float:
    """Relative RMS error of out of 64 queries that see so many keys."""
    q, k, v, _ = exact.inputs(keys, (4, 1), (128, 128), torch.bfloat16, device)
    q, rules = q[:, :64], TileRules(128**-0.5, FULL)
    (found, _), (right, _) = (
        x.forward(*tensors, rules)
        for x, tensors in ((kernel, (q, k, v)), (KERNELS["reference"], (q.double(), k.double(), v.double())))
    )
    return exact.relative_rms(found, right)
