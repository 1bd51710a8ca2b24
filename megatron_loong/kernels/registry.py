"""Which attention kernel serves a request, in order of preference, and why the others do not."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

from megatron_loong.kernels.common import dtype_name
from megatron_loong.kernels.cpu_flash import CpuFlashKernel
from megatron_loong.kernels.flash_attn import FlashAttn2Kernel, FlashAttn3Kernel
from megatron_loong.kernels.flash_attn_4 import FlashAttn4Kernel
from megatron_loong.kernels.fp8 import FlashAttn3Fp8Kernel, FlashAttn4Fp8Kernel
from megatron_loong.kernels.interface import AttentionKernel, KernelRequest
from megatron_loong.kernels.reference import ReferenceKernel
from megatron_loong.kernels.te_fused import TransformerEngineKernel
from megatron_loong.kernels.torch_cuda import TorchCudnnKernel, TorchFlashKernel

#: Every kernel by name, the preferred first: flash-attn 3 is made for Hopper and runs nowhere else, 4 is then first on
#: Blackwell; torch_cudnn comes before te_fused, which calls the same cuDNN and needs one package more.
KERNELS: dict[str, AttentionKernel] = {
    kernel.name: kernel
    for kernel in (
        FlashAttn3Kernel(),
        FlashAttn4Kernel(),
        FlashAttn2Kernel(),
        TorchCudnnKernel(),
        TransformerEngineKernel(),
        TorchFlashKernel(),
        FlashAttn3Fp8Kernel(),
        FlashAttn4Fp8Kernel(),
        CpuFlashKernel(),
        ReferenceKernel(),
    )
}

#: The environment's word for what "auto" takes.
KERNEL_VARIABLE = "LOONG_KERNEL"

#: What may stand for a name: the first kernel that computes in the inputs' dtype, or the first whose forward is in fp8.
CHOICES = AUTO, AUTO_FP8 = "auto", "auto-fp8"


def in_fp8(name: str) -> bool:
    """Whether a name of `KERNELS`, or a choice, is for a forward in fp8.

    >>> in_fp8("auto-fp8"), in_fp8("flash_attn_3_fp8"), in_fp8("flash_attn_3")
    (True, True, False)
    """
    return name == AUTO_FP8 or getattr(KERNELS.get(name), "fp8_forward", False)


@dataclass(frozen=True)
class SupportRow:
    """One line of the table of kernels in README and docs, in words."""

    name: str
    devices: str
    dtypes: str
    head_widths: str
    proven_on: str


def support_table() -> list[SupportRow]:
    """What each kernel takes and where this repository's tests have run it, in order of preference."""
    return [
        SupportRow(x.name, x.devices, x.dtypes, x.head_widths, x.proven_on)  # type: ignore[attr-defined]
        for x in KERNELS.values()
    ]


def choose_kernel(request: KernelRequest, name: str | AttentionKernel = "auto") -> AttentionKernel:
    """The kernel for a request: the first in `KERNELS` that can serve it, or the one that is named.

    "auto" computes in the inputs' dtype; "auto-fp8" is the first whose forward is in fp8, and no other. `name` may be a
    kernel object, of one's own or for tests; it is asked `why_not` like the others. Raises `ValueError` with every
    reason when the name is unknown, when the named kernel cannot serve the request, or when a choice finds none.
    "auto" takes `reference` on a CPU only: on a GPU it would train, slowly, unnoticed. Where lengths vary it takes a
    kernel that builds a plan for every new shape only if no other serves. `LOONG_KERNEL` in the environment is the name
    in the place of "auto".
    Choices are remembered for the process; `forget_choices()` after installing or unloading a package.
    """
    if not isinstance(name, str):
        reason = name.why_not(request)
        if reason:
            raise ValueError(f"kernel={name.name}: {reason}, for {describe(request)}")
        return name
    return _choose(request, *_asked(name))


def forget_choices() -> None:
    """Ask the kernels anew at the next `choose_kernel`."""
    _choose.cache_clear()


def explain(request: KernelRequest, name: str = "auto") -> str:
    """One line per kernel: taken, not needed, or why not.

    >>> import torch
    >>> cpu = KernelRequest("cpu", torch.float32, head_dim=64, value_head_dim=64, query_heads=8, kv_heads=2)
    >>> print(explain(cpu).splitlines()[-2])
    cpu_flash: taken
    """
    lines, taken, name = [], None, _asked(name)[0]
    chosen = name in CHOICES
    for kernel_name, reason in _reasons(request, name).items():
        if reason is None and taken is None and (chosen or name == kernel_name):
            taken, reason = kernel_name, "taken"
        elif reason is None:
            reason = f"could serve, but {taken} comes first" if chosen else f"could serve, but {name} was named"
        lines.append(f"{kernel_name}: {reason}")
    return "\n".join(lines)


def describe(request: KernelRequest) -> str:
    """A request in a few words."""
    widths = f"{request.head_dim}"
    if request.value_head_dim != request.head_dim:
        widths += f" (v {request.value_head_dim})"
    return (
        f"{dtype_name(request.dtype)} on {request.device_type}, heads {request.query_heads}:{request.kv_heads}, "
        f"width {widths}"
        + (", deterministic" if request.deterministic else "")
        + (", in lengths that vary" if request.varying else "")
    )


def _asked(name: str) -> tuple[str, str]:
    """The name to go by, and who gave it, in words."""
    variable = os.environ.get(KERNEL_VARIABLE)
    if name == AUTO and variable:
        return variable, f"{KERNEL_VARIABLE}={variable}"
    return name, f"--loong-kernel {name} / kernel={name!r}"


@functools.lru_cache(maxsize=256)
def _choose(request: KernelRequest, name: str, asked: str) -> AttentionKernel:
    if name not in (*CHOICES, *KERNELS):
        raise ValueError(f"{asked} is unknown; use {', '.join(CHOICES)} or one of {', '.join(KERNELS)}")
    reasons = _reasons(request, name)
    serving = [x for x, reason in reasons.items() if reason is None]
    if name in CHOICES:
        if serving:
            return KERNELS[serving[0]]
        lines = "".join(f"\n  {x}: {reason}" for x, reason in reasons.items())
        instead = "" if name == AUTO else f"\n(or {AUTO}: forward in {dtype_name(request.dtype)} too)"
        raise ValueError(f"{asked}: no kernel serves {describe(request)}{lines}{instead}")
    if reasons[name] is None:
        return KERNELS[name]
    would_work = f"what would work: {', '.join(serving)}" if serving else "nor would any other kernel"
    raise ValueError(f"{asked} cannot serve {describe(request)}: {reasons[name]}; {would_work}")


def _reasons(request: KernelRequest, name: str) -> dict[str, str | None]:
    """Why each kernel is not to be taken, None where it may be, when `name` is asked for."""
    reasons = {x: kernel.why_not(request) for x, kernel in KERNELS.items()}
    if name == AUTO and reasons["reference"] is None and request.device_type != "cpu":
        reasons["reference"] = (
            f"slow, and holds whole score matrices, on {request.device_type}; ask for it by name if that is wanted"
        )
    for x, kernel in KERNELS.items():
        if name == AUTO and in_fp8(x):
            reasons[x] = reasons[x] or f"forward in fp8; ask for {AUTO_FP8} or for it by name if that is wanted"
        elif name == AUTO_FP8 and not in_fp8(x):
            reasons[x] = getattr(kernel, "why_not_fp8", "no forward in fp8")
    if name == AUTO and request.varying:
        ready = [x for x, kernel in KERNELS.items() if reasons[x] is None and not getattr(kernel, "plans", False)]
        for x, reason in reasons.items():
            if ready and reason is None and x not in ready:
                reasons[x] = (
                    f"builds a plan of about a second for every new length, and here lengths vary, so that {ready[0]} "
                    "comes first; ask for it by name if it is wanted"
                )
    return reasons
