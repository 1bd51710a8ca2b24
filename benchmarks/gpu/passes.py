"""The memory-bound passes (merge, adding up, packing) on this device against float64, by Triton where it serves."""

from __future__ import annotations

import sys

import torch

from benchmarks.gpu import exact
from benchmarks.gpu.outcome import Run, main
from megatron_loong.kernels import folds

#: [b, s, h, d]: sizes that no block of a kernel divides among them.
SHAPES = [(1, 256, 8, 128), (2, 77, 3, 64), (1, 33, 5, 80)]
BOUND = 1e-6


def check(run: Run) -> None:
    """The memory-bound passes (merge, adding up, packing) on this device against float64, by Triton where it serves."""
    triton = folds.triton_fault() if run.device.type == "cuda" else "runs on CUDA only"
    run.figures["triton"] = triton or "used"
    worst = run.figures["worst_relative_rms"] = {}
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            what = f"{list(shape)} {dtype}"
            for name, error_of in (("merge", merge_error), ("add", add_error)):
                with run.case(f"{name}, {what}"):
                    error = error_of(shape, dtype, run.device)
                    worst[name] = max(worst.get(name, 0.0), error)
                    assert error <= BOUND, f"{name}: relative RMS error {error:.1e} > {BOUND:g}"
            with run.case(f"copies, {what}"):
                check_copies(shape, dtype, run.device)


def merge_error(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> float:
    """Of out and lse, the worse; the block comes as strided views."""
    b, s, h, d = shape
    out, lse = torch.randn(shape, device=device), torch.randn(b, s, h, device=device)
    block_out = torch.randn(b, h, s, d, device=device).to(dtype).transpose(1, 2)
    block_lse = torch.randn(b, h, s, device=device).transpose(1, 2)
    lse[:, ::3], out[:, ::3] = -torch.inf, 0  # rows that have seen nothing yet
    weight = torch.sigmoid(block_lse.double() - lse.double()).unsqueeze(-1)
    right = out.double() * (1 - weight) + block_out.double() * weight
    right_lse = torch.logaddexp(lse.double(), block_lse.double())
    folds.merge_(out, lse, block_out, block_lse)
    return max(exact.relative_rms(out, right), exact.relative_rms(lse, right_lse))


def add_error(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> float:
    """Of three float32 sums in one launch, the worst; sources in another memory order."""
    targets = [torch.randn(shape, device=device) for _ in range(3)]
    b, s, h, d = shape
    sources = [torch.randn(b, h, s, d, device=device).to(dtype).transpose(1, 2) for _ in range(3)]
    right = [x.double() + y.double() for x, y in zip(targets, sources, strict=True)]
    folds.add_rows_(list(zip(targets, sources, strict=True)))
    return max(exact.relative_rms(x, y) for x, y in zip(targets, right, strict=True))


def check_copies(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Copies plain, gathered and scattered are equal bit for bit, else `AssertionError`."""
    _, s, h, d = shape
    source = torch.randn(s, 1, h, d, device=device).to(dtype)
    order = torch.randperm(s).to(device)
    plain, gathered, scattered = (torch.full_like(source, torch.nan) for _ in range(3))
    folds.copy_rows_([(plain, source)])
    folds.copy_rows_([(gathered, source)], source_rows=order)
    folds.copy_rows_([(scattered, source)], target_rows=order)
    for name, x, y in (
        ("plain", plain, source),
        ("gathered", gathered, source[order]),
        ("scattered", scattered[order], source),
    ):
        assert torch.equal(x, y), f"copy_rows_, {name}, {list(shape)} {dtype}: not equal"


if __name__ == "__main__":
    sys.exit(main(check))
