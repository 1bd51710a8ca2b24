"""Every kernel of the registry that serves this device, against float64, and its speed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_loong.attention.merge import merge_
from megatron_loong.bench.gpu import exact
from megatron_loong.bench.gpu.outcome import CannotRunError, WrongError, main
from megatron_loong.bench.rank_alone import tile_flops
from megatron_loong.config import CAUSAL, FULL
from megatron_loong.kernels.interface import AttentionKernel, KernelRequest, TileRules
from megatron_loong.kernels.registry import KERNELS, describe, in_fp8

#: Largest RMS of the error over RMS of the right answer. The inputs are rounded already; what is left is the kernel.
BOUNDS = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}
#: (query, KV heads), (width of q and k, of v), length, causal.
CASES = [
    ((8, 8), (64, 64), 512, True),
    ((8, 2), (128, 128), 512, True),
    ((8, 1), (128, 128), 384, False),
    ((4, 4), (192, 128), 256, True),
    ((4, 2), (256, 256), 256, True),
    ((4, 2), (96, 96), 200, True),
]


def check(device: torch.device) -> dict[str, Any]:
    """Every kernel of the registry that serves this device, against float64, and its speed.

    Those whose forward is in fp8 have a step of their own (`bench.gpu.fp8`).
    """
    figures = {name: judge(kernel, device) for name, kernel in KERNELS.items() if not in_fp8(name)}
    return verdict(figures, f"no kernel but the reference serves {device.type}")


def verdict(figures: dict[str, dict[str, Any]], nothing: str) -> dict[str, Any]:
    """`figures` of kernels, unless one is wrong or none but the reference is here, which is said as `nothing`."""
    wrong = [f"{name}: {x['wrong']}" for name, x in figures.items() if "wrong" in x]
    if wrong:
        raise WrongError("; ".join(wrong), figures)
    if all("not_here" in x for name, x in figures.items() if name != "reference"):
        raise CannotRunError(f"{nothing}: {figures}")
    return figures


def judge(
    kernel: AttentionKernel, device: torch.device, bounds: Mapping[torch.dtype, float] = BOUNDS
) -> dict[str, Any]:
    """A kernel's worst errors and speed; `not_here` with the reason, or `wrong` with the first thing that is."""
    errors: dict[str, float] = {}
    reason: str | None = None
    for dtype, bound in bounds.items():
        kind = str(dtype).removeprefix("torch.")
        for heads, widths, length, causal in CASES:
            request = KernelRequest(device.type, dtype, *widths, *heads)
            fault = kernel.why_not(request)
            if fault:
                reason = reason or fault
                continue
            try:
                error = compare(kernel, exact.inputs(length, heads, widths, dtype, device), causal)
            except Exception as raised:  # a kernel that raises must not hide the others
                return {"wrong": f"{describe(request)}: {type(raised).__name__}: {raised}"}
            worst = max(error, key=lambda x: error[x])
            if not error[worst] <= bound:
                return {"wrong": f"{describe(request)}: {worst} {error[worst]:.1e} > {bound:g}"}
            errors[kind] = max(errors.get(kind, 0.0), error[worst])
    return {"worst_relative_rms": errors, **speed(kernel, device)} if errors else {"not_here": reason}


def compare(kernel: AttentionKernel, tensors: list[torch.Tensor], causal: bool) -> dict[str, float]:
    """Relative RMS errors of a call over everything, and of one cut into two blocks of keys that are merged."""
    right = exact.float64(tensors, causal)
    found = exact.whole(kernel, tensors, causal)
    errors = {name: exact.relative_rms(found[name], right[name]) for name in found}
    if not causal:
        blocks = in_two_blocks(kernel, tensors)
        errors |= {f"{name} of two blocks": exact.relative_rms(blocks[name], right[name]) for name in blocks}
    return errors


def in_two_blocks(kernel: AttentionKernel, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a ring does it: forward merged by lse, backward of each block from the global out and lse."""
    q, k, v, dout = tensors
    half, rules = k.shape[1] // 2, TileRules(q.shape[-1] ** -0.5, FULL)
    pieces = [(k[:, :half], v[:, :half]), (k[:, half:], v[:, half:])]
    (out, lse), second = (kernel.forward(q, *piece, rules) for piece in pieces)
    wide = torch.promote_types(out.dtype, torch.float32)
    out, lse = out.to(wide), lse.clone()
    merge_(out, lse, *second)
    grads = [kernel.backward(dout, q, *x, out.to(q.dtype), lse, rules, deterministic=False) for x in pieces]
    dk, dv = (torch.cat([grads[0][i], grads[1][i]], 1) for i in (1, 2))
    return {"out": out, "lse": lse, "dq": grads[0][0].to(wide) + grads[1][0].to(wide), "dk": dk, "dv": dv}


def speed(kernel: AttentionKernel, device: torch.device) -> dict[str, float]:
    """TFLOP/s of a causal call in bfloat16, heads 32:4, width 128; nothing for the reference, which is no kernel."""
    request = KernelRequest(device.type, torch.bfloat16, 128, 128, 32, 4)
    if kernel.name == "reference" or kernel.why_not(request):
        return {}
    tensors = exact.inputs(8192 if device.type == "cuda" else 128, (32, 4), (128, 128), torch.bfloat16, device)
    q, k, v, dout = tensors
    rules = TileRules(128**-0.5, CAUSAL)
    out, lse = kernel.forward(q, k, v, rules)
    forward_s = seconds_of(lambda: kernel.forward(q, k, v, rules), device)
    backward_s = seconds_of(
        lambda: kernel.backward(dout, q, k, v, out, lse, rules, deterministic=False), device
    )  # fmt: skip
    return {
        "forward_tflops": round(tile_flops(q, k, True, 2) / forward_s / 1e12, 3),
        "backward_tflops": round(tile_flops(q, k, True, 5) / backward_s / 1e12, 3),
    }


def seconds_of(call: Callable[[], object], device: torch.device, times: int = 10) -> float:
    """Mean of `times` calls after two that do not count."""
    for index in range(times + 2):
        if index == 2:
            _synchronize(device)
            start = time.perf_counter()
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main(check))
