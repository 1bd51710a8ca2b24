"""What the kernel adapters share: reasons to say no, zero padding of head widths, calls by argument name."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from megatron_loong.kernels.interface import KernelRequest, TileRules

HALF_DTYPES = (torch.bfloat16, torch.float16)

_FP8_FAULT = (
    "takes no tensors in fp8: their scales would have to come with them; give bfloat16, and kernel auto-fp8 for a "
    "forward in fp8"
)


def request_fault(request: KernelRequest) -> str | None:
    """The reason that holds for every kernel: head counts that do not fit; else None."""
    if request.kv_heads < 1 or request.query_heads % request.kv_heads:
        return f"{request.query_heads} query heads are no multiple of {request.kv_heads} KV heads"
    return None


def feature_fault(request: KernelRequest, *features: str) -> str | None:
    """None when the request asks for none of `features` (`windowed`, `softcap`, `dropout`)."""
    names = {
        "windowed": "sliding windows",
        "softcap": "soft caps on scores",
        "dropout": "attention dropout that backward and replay repeat",
    }
    asked = [names[x] for x in features if getattr(request, x)]
    return f"does not do {' and '.join(asked)}" if asked else None


def dtype_fault(request: KernelRequest, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """None when the request's dtype is one of `dtypes`."""
    if request.dtype in dtypes:
        return None
    if request.dtype.itemsize == 1:
        return _FP8_FAULT
    return f"takes {', '.join(dtype_name(x) for x in dtypes)}, not {dtype_name(request.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    """
    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def gpu_capability() -> tuple[int, int] | None:
    """Compute capability of the current NVIDIA GPU, or None where there is none."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability()


def gpu_fault(request: KernelRequest, max_width: int) -> str | None:
    """Reasons common to the GPU kernels: device, half precision, head widths up to `max_width`, Ampere or newer."""
    fault = request_fault(request)
    if fault:
        return fault
    if request.device_type != "cuda":
        return f"needs a CUDA device, the tensors are on {request.device_type}"
    fault = dtype_fault(request, HALF_DTYPES)
    if fault:
        return fault
    width = max(request.head_dim, request.value_head_dim)
    if width > max_width:
        return f"takes head widths up to {max_width}, not {width}"
    capability = gpu_capability()
    if capability is None:
        return "no NVIDIA GPU here (ROCm is not supported)"
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    return None


def flash_backward_fault(request: KernelRequest) -> str | None:
    """FlashAttention 2's backward has no room for widths over 192 in the small shared memory of sm_86, 89 and 12x."""
    capability, width = gpu_capability(), max(request.head_dim, request.value_head_dim)
    if capability is not None and width > 192 and capability not in ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3)):
        return f"no backward for head width {width} on compute capability {capability[0]}.{capability[1]}; up to 192"
    return None


def cudnn_fault(request: KernelRequest) -> str | None:
    """Where cuDNN's attention has forward and backward: Hopper and Blackwell, and which head widths there."""
    fault = gpu_fault(request, max_width=256)
    if fault:
        return fault
    capability, widths = gpu_capability(), (request.head_dim, request.value_head_dim)
    if capability is None or capability[0] not in (9, 10):
        return "made for compute capability 9.x and 10.x"
    if capability != (9, 0) and max(widths) > 128 and widths != (192, 128):
        return f"takes head widths up to 128, or 192 with v 128, on {capability[0]}.{capability[1]}, not {max(widths)}"
    return None


def round_up(n: int, multiple: int) -> int:
    """
    >>> round_up(20, 8)
    24
    """
    return -(-n // multiple) * multiple


def widen(x: torch.Tensor, width: int) -> torch.Tensor:
    """x [..., d] -> [..., width], zeros on the right; x itself when it has the width already.

    Zeros change neither scores nor lse nor any gradient inside the first d columns (softmax_scale is explicit).
    """
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x with contiguous last dimension; a copy only where it has none."""
    return x if x.stride(-1) == 1 else x.contiguous()


def gpu_operand(x: torch.Tensor, width: int) -> torch.Tensor:
    """x [b, s, h, d] -> [b, s, h, width], contiguous in the last dimension and aligned; copied only where it is not.

    The GPU kernels load 16 bytes at a time. A misaligned address is an error that ends the CUDA context.
    """
    x = widen(x, width)
    per_load = 16 // x.element_size()
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    if x.stride(-1) == 1 and not any(n % per_load for n in (x.storage_offset(), *steps)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def operand(x: torch.Tensor, width: int, rules: TileRules) -> torch.Tensor:
    """x [b, s, h, d] -> [b, s, h, width] as flash-attn reads it, [s, h, width] where documents are packed."""
    x = gpu_operand(x, width)
    return x if rules.boundaries is None else x.squeeze(0)


def on_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to a device without blocking the host: from pinned memory, since a pageable copy blocks."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@functools.lru_cache(maxsize=64)
def boundaries_on(device: torch.device, boundaries: tuple[int, ...]) -> torch.Tensor:
    """int32 `cu_seqlens` on a device, remembered: all layers of a step ask for the same."""
    return on_device(torch.tensor(boundaries, dtype=torch.int32), device)


def longest(boundaries: tuple[int, ...]) -> int:
    """Length of the longest document.

    >>> longest((0, 3, 8, 10))
    5
    """
    return max(stop - start for start, stop in itertools.pairwise(boundaries))


def lse_to_bhs(lse: torch.Tensor) -> torch.Tensor:
    """lse [b, s, h] -> contiguous [b, h, s], as the flash kernels read it."""
    return lse.transpose(1, 2).contiguous()


def lse_from_bhs(lse: torch.Tensor, s_q: int) -> torch.Tensor:
    """lse [b, h, s] (some versions pad s) -> view [b, s_q, h]."""
    return lse[:, :, :s_q].transpose(1, 2)


@functools.lru_cache(maxsize=64)
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    # A torch.library.custom_op shows only (*args, **kwargs); the function it wraps has the names.
    return inspect.signature(getattr(function, "_init_fn", function)).parameters


def parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Argument names of a function or of a `torch.library.custom_op`."""
    return tuple(_parameters(function))


def call_by_name(
    function: Callable[..., Any],
    essential: Mapping[str | tuple[str, ...], Any],
    neutral: Mapping[str, Any],
) -> Any:
    """Call `function` whose arguments differ between versions, all by name.

    essential: always passed; a key that is a tuple lists the names the argument has had. `NotImplementedError` when
    the function knows none of them, for to drop `causal` or `deterministic` would be a silent wrong answer.
    neutral: values that switch a feature off; passed only where the function insists on the argument.
    """
    parameters = _parameters(function)
    plain = getattr(function, "_init_fn", function)
    where = f"{plain.__module__}.{plain.__name__}"
    arguments = {}
    for key, value in essential.items():
        names = (key,) if isinstance(key, str) else key
        name = next((x for x in names if x in parameters), None)
        if name is None:
            raise NotImplementedError(f"{where} has no argument {' or '.join(names)}; it has {', '.join(parameters)}")
        arguments[name] = value
    for name, parameter in parameters.items():
        if name in arguments or parameter.default is not inspect.Parameter.empty:
            continue
        if name not in neutral:
            raise NotImplementedError(f"{where} wants an argument {name}, which this adapter does not know")
        arguments[name] = neutral[name]
    return function(**arguments)
