"""The right answer on one device, and how far another is from it."""

from __future__ import annotations

import torch

from megatron_loong.config import CAUSAL, FULL
from megatron_loong.kernels.interface import AttentionKernel, TileRules
from megatron_loong.kernels.reference import ReferenceKernel

NAMES = ("out", "dq", "dk", "dv")


def inputs(
    seq_len: int, heads: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """q [1, S, h, d], k [1, S, g, d], v [1, S, g, dv], dout [1, S, h, dv]: normal, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    (h, g), (d, dv) = heads, widths
    sizes = [(1, seq_len, *x) for x in ((h, d), (g, d), (g, dv), (h, dv))]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype) for size in sizes]


def whole(kernel: AttentionKernel, tensors: list[torch.Tensor], causal: bool) -> dict[str, torch.Tensor]:
    """out, dq, dk, dv of one call of a kernel over everything, and its lse."""
    q, k, v, dout = tensors
    rules = TileRules(q.shape[-1] ** -0.5, CAUSAL if causal else FULL)
    out, lse = kernel.forward(q, k, v, rules)
    grads = kernel.backward(dout, q, k, v, out, lse, rules, deterministic=False)
    return dict(zip((*NAMES, "lse"), (out, *grads, lse), strict=True))


def float64(tensors: list[torch.Tensor], causal: bool) -> dict[str, torch.Tensor]:
    """The same of the reference kernel in float64, from the same numbers."""
    return whole(ReferenceKernel(), [x.double() for x in tensors], causal)


def relative_rms(found: torch.Tensor, right: torch.Tensor) -> float:
    """RMS of the error over RMS of the right answer; `AssertionError` for a wrong shape or numbers not finite."""
    assert found.shape == right.shape, f"shape {list(found.shape)}, not {list(right.shape)}"
    assert found.isfinite().all(), "numbers that are not finite"
    return ((found.double() - right).square().mean() / right.square().mean()).sqrt().item()


def max_error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Largest absolute error; `AssertionError` for a wrong shape. NaN is an error of inf."""
    assert found.shape == right.shape, f"shape {list(found.shape)}, not {list(right.shape)}"
    error = (found.double() - right).abs().max().item()
    return float("inf") if error != error else error
