"""Which kernel serves a request, and in one line each why the others do not."""

from __future__ import annotations

from functools import lru_cache

from megatron_loong.kernels.cpu_flash import CpuFlashKernel
from megatron_loong.kernels.flash_attn import FlashAttn2Kernel, FlashAttn3Kernel
from megatron_loong.kernels.interface import AttentionKernel, KernelRequest
from megatron_loong.kernels.reference import ReferenceKernel
from megatron_loong.kernels.torch_cuda import TorchCudnnKernel, TorchFlashKernel

#: In the order of preference.
KERNELS: tuple[AttentionKernel, ...] = (
    FlashAttn3Kernel(),
    FlashAttn2Kernel(),
    TorchCudnnKernel(),
    TorchFlashKernel(),
    CpuFlashKernel(),
    ReferenceKernel(),
)


def kernel_names() -> list[str]:
    """Names that `kernel=` and `--loong-kernel` take besides "auto"."""
    return [kernel.name for kernel in KERNELS]


def choose_kernel(request: KernelRequest, kernel: str | AttentionKernel = "auto") -> AttentionKernel:
    """The kernel for a request: the named one, or the first in `KERNELS` that can serve it.

    An `AttentionKernel` object is taken as it is, if it can serve the request. Raises `ValueError` with each
    kernel's reason when the name is unknown, the named kernel cannot serve, or none can.
    """
    if not isinstance(kernel, str):
        reason = kernel.why_not(request)
        if reason:
            raise ValueError(f"kernel {kernel.name!r} {reason}")
        return kernel
    return _choose_by_name(request, kernel)


@lru_cache(maxsize=256)
def _choose_by_name(request: KernelRequest, name: str) -> AttentionKernel:
    if name != "auto" and name not in kernel_names():
        raise ValueError(f"kernel={name!r} (--loong-kernel) is unknown; use auto or one of {kernel_names()}")
    serving = [kernel for kernel in KERNELS if kernel.why_not(request) is None]
    for kernel in serving:
        if name == kernel.name or (name == "auto" and not _too_slow(kernel, request)):
            return kernel
    able = [kernel.name for kernel in serving]
    raise ValueError(
        f"kernel={name!r} (--loong-kernel) cannot serve {_describe(request)}; "
        f"by name these can: {able or 'none'}.\n{explain(request)}"
    )


def explain(request: KernelRequest) -> str:
    """One line per kernel: taken by "auto", able, or why not.

    The first line that says `taken` is what "auto" chooses.
    """
    lines, taken = [], False
    for kernel in KERNELS:
        reason = kernel.why_not(request)
        if reason is None and _too_slow(kernel, request):
            reason = "holds the whole score matrix: on a GPU only when asked for by name"
        if reason is None:
            reason, taken = ("able, but one before it was taken" if taken else "taken"), True
        lines.append(f"{kernel.name}: {reason}")
    return "\n".join(lines)


def support_table() -> list[tuple[str, str]]:
    """(kernel, where this repository's tests have run it), for the README and `doctor`."""
    return [(kernel.name, kernel.proven_on) for kernel in KERNELS]


def _too_slow(kernel: AttentionKernel, request: KernelRequest) -> bool:
    # A silent fall to the dense kernel on a GPU would look like a slow plugin.
    return kernel.name == "reference" and request.device_type != "cpu"


def _describe(request: KernelRequest) -> str:
    return (
        f"{request.dtype} on {request.device_type}, {request.query_heads} query and {request.kv_heads} KV heads of "
        f"width {request.head_dim} (v {request.value_head_dim}), dropout {request.dropout_p}, "
        f"deterministic {request.deterministic}"
    )
