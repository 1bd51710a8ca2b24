"""Every kernel of the registry that serves this device, against float64, and its speed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_loong.attention.merge import merge_
from megatron_loong.bench.gpu import exact
from megatron_loong.bench.gpu.outcome import CannotRunError, main
from megatron_loong.bench.rank_alone import tile_flops
from megatron_loong.config import CAUSAL, FULL
from megatron_loong.kernels.interface import AttentionKernel, KernelRequest, TileRules
from megatron_loong.kernels.registry import KERNELS, describe

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
    """Every kernel of the registry that serves this device, against float64, and its speed."""
    figures: dict[str, Any] = {}
    for name, kernel in KERNELS.items():
        errors, reasons = {}, []
        for dtype, bound in BOUNDS.items():
            for heads, widths, length, causal in CASES:
                request = KernelRequest(device.type, dtype, *widths, *heads)
                reason = kernel.why_not(request)
                if reason:
                    reasons.append(reason)
                    continue
                error = compare(kernel, exact.inputs(length, heads, widths, dtype, device), causal)
                worst = max(error, key=lambda x: error[x])
                assert error[worst] <= bound, f"{name}, {describe(request)}: {worst} {error[worst]:.1e} > {bound:g}"
                kind = str(dtype).removeprefix("torch.")
                errors[kind] = max(errors.get(kind, 0.0), error[worst])
        if errors:
            figures[name] = {"worst_relative_rms": errors, **speed(kernel, device)}
        else:
            figures[name] = {"not_here": reasons[0]}
    if all("not_here" in x for name, x in figures.items() if name != "reference"):
        raise CannotRunError(f"no kernel but the reference serves {device.type}: {figures}")
    return figures


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
