"""The memory-bound passes (merge, adding up, packing) on this device against float64, by Triton where it serves."""

from __future__ import annotations

import sys

import torch

from benchmarks.gpu import exact
from benchmarks.gpu.outcome import Run, main
from megatron_loong.kernels import row_ops

#: [b, s, h, d]: sizes that no block of a kernel divides among them.
SHAPES = [(1, 256, 8, 128), (2, 77, 3, 64), (1, 33, 5, 80)]
BOUND = 1e-6


def check(run: Run) -> None:
    """The memory-bound passes (merge, adding up, packing) on this device against float64, by Triton where it serves."""
    triton = row_ops.triton_fault() if run.device.type == "cuda" else "runs on CUDA only"
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
    """Of out and lse, the worse; a float32 sum and four parts, which come as strided views."""
    b, s, h, d = shape
    parts = [
        (
            torch.randn(b, h, s, device=device).permute(2, 0, 1),
            torch.randn(b, h, s, d, device=device).to(dtype if i else torch.float32).permute(2, 0, 1, 3),
        )
        for i in range(5)
    ]
    parts[0][0][::3], parts[0][1][::3] = -torch.inf, 0  # rows that have seen nothing yet
    lses, outs = (torch.stack([x.double() for x in same]) for same in zip(*parts, strict=True))
    right_lse = lses.logsumexp(0)
    right = ((lses - right_lse).exp().unsqueeze(-1) * outs).sum(0)
    lse, out = (torch.empty_like(x) for x in parts[0])
    row_ops.merge_rows((lse, out), parts)
    return max(exact.relative_rms(out, right), exact.relative_rms(lse, right_lse))


def add_error(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> float:
    """Of two float32 sums to each of which four parts are added, the worse; parts in another memory order."""
    b, s, h, d = shape
    sums = tuple(torch.randn(s, b, h, d, device=device) for _ in range(2))
    parts = [
        tuple(torch.randn(b, h, s, d, device=device).to(dtype).permute(2, 0, 1, 3) for _ in sums) for _ in range(4)
    ]
    right = [torch.stack([x.double() for x in same]).sum(0) for same in zip(sums, *parts, strict=True)]
    row_ops.add_rows(sums, [sums, *parts])
    return max(exact.relative_rms(x, y) for x, y in zip(sums, right, strict=True))


def check_copies(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Copies plain, gathered and scattered are equal bit for bit, else `AssertionError`."""
    _, s, h, d = shape
    source = torch.randn(s, 1, h, d, device=device).to(dtype)
    order = torch.randperm(s).to(device)
    plain, gathered, scattered = (torch.full_like(source, torch.nan) for _ in range(3))
    row_ops.copy_rows_([(plain, source)])
    row_ops.copy_rows_([(gathered, source)], source_rows=order)
    row_ops.copy_rows_([(scattered, source)], target_rows=order)
    for name, x, y in (
        ("plain", plain, source),
        ("gathered", gathered, source[order]),
        ("scattered", scattered[order], source),
    ):
        assert torch.equal(x, y), f"copy_rows_, {name}, {list(shape)} {dtype}: not equal"


if __name__ == "__main__":
    sys.exit(main(check))
