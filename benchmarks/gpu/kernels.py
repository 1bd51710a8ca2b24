"""One kernel of the registry against float64, and its speed: `python -m benchmarks.gpu.kernels NAME`."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import child, exact, fp8, outcome
from benchmarks.gpu.outcome import CannotRunError, Run
from benchmarks.rank_alone import tile_flops
from megatron_loong.config import CAUSAL, FULL
from megatron_loong.kernels.interface import AttentionKernel, KernelRequest, TileRules
from megatron_loong.kernels.registry import KERNELS, describe, in_fp8
from megatron_loong.kernels.row_ops import merge_rows

#: Largest RMS of the error over RMS of the right answer. The inputs are rounded already; what is left is the kernel.
BOUNDS = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}
#: (query, KV heads), (width of q and k, of v), length, causal.
SHAPES = [
    ((8, 8), (64, 64), 512, True),
    ((8, 2), (128, 128), 512, True),
    ((8, 1), (128, 128), 384, False),
    ((4, 4), (192, 128), 256, True),
    ((4, 2), (256, 256), 256, True),
    ((4, 2), (96, 96), 200, True),
]
#: A CPU gets a quarter of the length: it shows that the check runs.
CPU_SHARE = 4
#: Of the second run of a failed case, and of the cases behind one that left the device unusable.
AGAIN_LIMIT_S = 30.0


class Case(NamedTuple):
    """One shape and dtype."""

    dtype: torch.dtype
    heads: tuple[int, int]
    widths: tuple[int, int]
    length: int
    causal: bool

    def request(self, device_type: str) -> KernelRequest:
        """What is asked of the kernel."""
        return KernelRequest(device_type, self.dtype, *self.widths, *self.heads)


def cases_of(name: str, device_type: str) -> list[Case]:
    """Every shape in every dtype; bfloat16 alone for a kernel whose forward is in fp8."""
    share = CPU_SHARE if device_type == "cpu" else 1
    return [
        Case(dtype, heads, widths, length // share, causal)
        for dtype in ([torch.bfloat16] if in_fp8(name) else BOUNDS)
        for heads, widths, length, causal in SHAPES
    ]


def fault(name: str, device_type: str) -> str | None:
    """Why a kernel serves no case on this device; None where it does."""
    reasons = [KERNELS[name].why_not(case.request(device_type)) for case in cases_of(name, device_type)]
    return None if None in reasons else reasons[0]


def check(run: Run, name: str, only: Sequence[int] | None = None) -> None:
    """A kernel's worst errors and its speed. `only`: numbers of cases, of which then nothing is run again."""
    kernel, cases = KERNELS[name], cases_of(name, run.device.type)
    reason = fault(name, run.device.type)
    if reason is not None:
        raise CannotRunError(reason)
    worst = run.figures["worst_relative_rms"] = {}
    for index in range(len(cases)) if only is None else only:
        case = cases[index]
        request = case.request(run.device.type)
        if kernel.why_not(request):
            continue
        label = f"{name}, {describe(request)}, {case.length} tokens, {'causal' if case.causal else 'full'}"
        with run.case(label):
            dtype = str(case.dtype).removeprefix("torch.")
            error = worst_error(kernel, case, run.device)
            worst[dtype] = max(worst.get(dtype, 0.0), error)
        if label not in run.failures:
            continue
        if only is None and "again" not in run.figures and run.device.type == "cuda":
            # Launches that block have the error raised by the call that made it.
            run.figures["again"] = in_another_process(run, name, [index], CUDA_LAUNCH_BLOCKING="1")
        if _is_lost(run.device):
            rest = [x for x in (range(len(cases)) if only is None else only) if x > index]
            run.figures["rest"] = in_another_process(run, name, rest) if rest else {}
            return
    if only is None and in_fp8(name):
        fp8.look_at(run, kernel)
    if only is None:
        with run.case(f"{name}, speed"):
            run.figures |= speed(kernel, run.device)


def worst_error(kernel: AttentionKernel, case: Case, device: torch.device) -> float:
    """The greatest of `compare`; `AssertionError` where it is above the bound."""
    tensors = exact.inputs(case.length, case.heads, case.widths, case.dtype, device)
    errors = compare(kernel, tensors, case.causal)
    worst, bound = max(errors, key=lambda x: errors[x]), fp8.BOUND if in_fp8(kernel.name) else BOUNDS[case.dtype]
    assert errors[worst] <= bound, f"{worst} {errors[worst]:.1e} > {bound:g}"
    return errors[worst]


def in_another_process(run: Run, name: str, cases: Sequence[int], **environment: str) -> dict[str, Any]:
    """Figures of some cases in a process of their own."""
    print(f"in another process, {environment}:", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        arguments = ["-m", __spec__.name, name, "--json", str(file), "--cases", *map(str, cases)]
        command = child.command(AGAIN_LIMIT_S, [*arguments, *(["--cpu"] if run.device.type == "cpu" else [])])
        try:
            subprocess.run(command, env={**os.environ, **environment}, timeout=AGAIN_LIMIT_S)
        except subprocess.TimeoutExpired:
            print(f"no end after {AGAIN_LIMIT_S:g} s", flush=True)
        return json.loads(file.read_text()) if file.exists() else {}


def _is_lost(device: torch.device) -> bool:
    """Whether the device refuses all further work of this process, as after an illegal access."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except Exception:
        return True
    return False


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
    parts = [(lse, out) for out, lse in (kernel.forward(q, *piece, rules) for piece in pieces)]
    wide = torch.promote_types(q.dtype, torch.float32)
    lse, out = (torch.empty_like(x, dtype=wide) for x in parts[0])
    merge_rows((lse, out), parts)
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


def main() -> int:
    """One kernel, all of it or some cases."""
    parser = outcome.parser(__doc__)
    parser.add_argument("name", choices=list(KERNELS))
    parser.add_argument("--cases", type=int, nargs="+")
    args = parser.parse_args()
    return outcome.run(functools.partial(check, name=args.name, only=args.cases), args)


if __name__ == "__main__":
    sys.exit(main())
