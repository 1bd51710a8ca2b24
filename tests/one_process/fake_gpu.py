"""All of attention on tensors that claim to be on a GPU, by the GPU's own kernels: what they are given, what is moved.

Nothing is computed. PyTorch's attention operators and the Triton passes are asked with tensors that have shapes,
strides and devices but no data; what a GPU would read wrongly, or answer with an illegal address, is a fault here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.rank_alone import rank_inputs
from benchmarks.rivals.interface import Shape
from benchmarks.simulate import groups_without_processes
from megatron_loong import LoongConfig
from megatron_loong.attention import call as attention_call
from megatron_loong.attention.options import AttentionOptions, CallArguments
from megatron_loong.attention.prepare import prepare
from megatron_loong.kernels import common, row_ops, torch_cuda, triton_row_ops
from tests.one_process.host_reads import Silent, fake_gpu

CUDA = torch.device("cuda", 0)
ATTENTION = {"_flash_attention", "_scaled_dot_product_cudnn_attention"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WRITE_ONLY = {"copy_", "fill_", "zero_"}
"""What they write they do not read."""


class Faults(AssertionError):
    """What a kernel was given and must not be."""


def must(condition: Any, message: str) -> None:
    if not condition:
        raise Faults(message)


def touched(x: torch.Tensor) -> int:
    """Bytes of memory behind a tensor; of what is expanded, once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


class Watch(TorchDispatchMode):
    """Holds kernels' operands to what they read, and counts every other pass: launches and bytes read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[tuple[str, int]] = []
        self.attention: list[str] = []
        self.operands = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name.removesuffix("_backward").removesuffix("_forward") in ATTENTION:
            check_attention(name, {x.name: y for x, y in zip(func._schema.arguments, args, strict=False)} | kwargs)
            self.attention.append(name)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if func.namespace == "aten" and name not in ALLOCATIONS and not all(_is_view(x) for x in func._schema.returns):
            self._count(name, func, args, kwargs, result)
        return result

    def _count(self, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        results = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if not any(x.is_cuda for x in (*given, *results)):
            return
        read = given[1:] if name in WRITE_ONLY else given[:-1] if "out" in kwargs else given
        if name == "index_copy_":
            read, results = given[2:], given[2:]
        self.passes.append((name, sum(map(touched, (*read, *results)))))

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: list[Any], **constants: Any) -> None:
        """In the place of `triton_row_ops._launch`."""
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        must(all(x.device == CUDA for x in tensors), f"{kernel.__name__}: {[str(x.device) for x in tensors]}")
        must(all(0 < n < 2**16 for n in grid[1:]) and 0 < grid[0] < 2**31, f"{kernel.__name__}: grid {grid}")
        if "SLOTS" in constants:
            self._combine(arguments, constants)
            return
        moved = 0
        for pair in (arguments[i : i + 13] for i in range(0, 13 * triton_row_ops.PAIRS, 13)):
            tiles, target, source, rows, _, _, width, *_ = pair
            if tiles:
                must(constants["INDEX"] or target.shape == source.shape, f"move: {target.shape} from {source.shape}")
                moved += rows * width * (target.element_size() + source.element_size())
        if constants["INDEX"]:
            must(arguments[-1].dtype == torch.int64 and arguments[-1].is_contiguous(), "move: index")
        self.passes.append(("move", moved))

    def _combine(self, arguments: list[Any], constants: dict[str, Any]) -> None:
        """Results and parts, (rows, lse) each, of which a sum of gradients has no lse."""
        *operands, count, s, d = arguments
        operands = [operands[i : i + 8] for i in range(0, len(operands), 8)][: count + 1]
        name = "merge" if constants["MERGE"] else "add"
        must(0 < count <= constants["SLOTS"], f"{name}: {count} parts in {constants['SLOTS']} slots")
        result, moved = operands[0][0], 0
        for x, *strides, lse, _, _, _ in operands:
            must(x.shape == result.shape and (x.shape[0], x.shape[3]) == (s, d), f"{name}: shapes differ")
            must(x.stride() == (*strides, 1), f"{name}: strides {x.stride()}")
            moved += touched(x)
            if constants["MERGE"]:
                must(lse.shape == x.shape[:3], f"{name}: shapes differ")
                must(lse.dtype == torch.float32, f"{name}: lse is {lse.dtype}")
                moved += touched(lse)
        self.passes.append((name, moved))

    def operand(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """In the place of `common.gpu_operand`: none is to be copied."""
        self.operands += 1
        found = gpu_operand(x, width)
        must(found is x, f"an operand is copied: {tuple(x.shape)} of strides {x.stride()}, offset {x.storage_offset()}")
        return found


def _is_view(returned: Any) -> bool:
    return returned.alias_info is not None and not returned.alias_info.is_write


gpu_operand = common.gpu_operand


def check_attention(name: str, given: dict[str, Any]) -> None:
    """What FlashAttention 2 and cuDNN read: by 16 bytes, on one device, lse as they gave it."""
    flash, backward = name.startswith("_flash"), "grad_out" in given
    documents = [given.get("cum_seq_q"), given.get("cum_seq_k")]
    q, k, v, *rest = operands = [
        given[x] for x in ("query", "key", "value", *(("grad_out", "out") if backward else ())) if x in given
    ]
    for x in operands:
        must(x.device == CUDA, f"{name}: an operand on {x.device}")
        must(x.dtype == q.dtype and x.dtype in (torch.bfloat16, torch.float16), f"{name}: an operand in {x.dtype}")
        steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
        aligned = x.stride(-1) == 1 and not any(n % 8 for n in (x.storage_offset(), *steps))
        must(aligned and x.shape[-1] % 8 == 0, f"{name}: strides {x.stride()}, offset {x.storage_offset()}")
    heads, length = (q.dim() - 2, q.dim() - 3) if flash else (1, 2)
    must(k.shape[:-1] == v.shape[:-1] and q.shape[heads] % k.shape[heads] == 0, f"{name}: {q.shape} with {k.shape}")
    must(k.numel() and q.numel(), f"{name}: an empty tile")
    for x in rest:
        must(x.shape == (*q.shape[:-1], v.shape[-1]), f"{name}: {x.shape} for q {q.shape}")
        must(flash or x.transpose(1, 2).is_contiguous(), f"{name}: dout or out with strides {x.stride()}")
    if documents[0] is not None:
        must(flash and q.dim() == 3, f"{name}: documents in {q.dim()} dimensions")
        for cu in documents:
            must(cu.device == CUDA and cu.dtype == torch.int32 and cu.is_contiguous(), f"{name}: boundaries {cu}")
    elif given.get("is_causal"):
        must(flash or q.shape[length] == k.shape[length], f"{name}: a causal tile of {q.shape} and {k.shape}")
    if backward:
        lse = given["logsumexp"]
        rows = (q.shape[heads], q.shape[length]) if q.dim() == 3 else (q.shape[0], q.shape[heads], q.shape[length])
        must(tuple(lse.shape) == rows + (() if flash else (1,)), f"{name}: lse {lse.shape} for q {q.shape}")
        must(lse.device == CUDA and lse.dtype == torch.float32 and lse.is_contiguous(), f"{name}: lse is {lse.dtype}")


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Triton's passes are asked, not launched; every operator is looked at."""
    watch = Watch()
    patches = [
        mock.patch.object(row_ops, "_by_triton", lambda x: x.is_cuda),
        mock.patch.object(triton_row_ops, "_launch", watch.launch),
        *(mock.patch.object(module, "gpu_operand", watch.operand) for module in (common, torch_cuda)),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(watch)
        yield watch


def layer(kernel: Any, config: LoongConfig, shape: Shape, cp_rank: int, **options: Any) -> tuple[Watch, Watch]:
    """Forward and backward of one rank; what `attention_2d` does without the autograd engine, which wants a device."""
    with fake_gpu(), torch.no_grad(), mock.patch.object(type(kernel), "why_not", lambda self, request: None):
        groups = groups_without_processes(config, cp_rank, Silent, timedelta(seconds=1))
        q, k, v, dout = (x.detach() for x in rank_inputs(shape, config.context_parallel_size, CUDA))
        torch_cuda._cudnn_lse_dims(CUDA, shape.dtype)  # asks cuDNN once in a process
        with watching() as forward:
            arguments = CallArguments(options.pop("cu_seqlens", None), seq_len=shape.seq_len)
            asked = AttentionOptions("sbhd", kernel=kernel, **options)
            (q, k, v), call = prepare((q, k, v), groups, asked, arguments)
            out, shares = attention_call.forward_pass(q, k, v, None, None, call)
        with watching() as backward:
            grads = attention_call.backward_pass(dout, shares, None, None, call)[:3]
        for name, got, like in zip(("out", "dq", "dk", "dv"), (out, *grads), (q, q, k, v), strict=True):
            assert got is not None
            must((got.shape, got.dtype, got.device) == (like.shape, like.dtype, CUDA), f"{name} is {got}")
    return forward, backward
