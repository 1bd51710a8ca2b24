"""Attention on tensors that claim to be on a GPU, and what in it would make the host wait for that GPU."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.simulate import groups_without_processes
from megatron_loong import LoongConfig, attention_2d
from megatron_loong.attention import attention_2d as attention_2d_module
from megatron_loong.attention import plan
from megatron_loong.attention.call import Attention2D
from megatron_loong.comm.transport import Message, Pending, Transport
from megatron_loong.kernels import common, row_ops

#: Operators that hand a device's data to the host, or whose result has a shape that depends on it.
READS = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::equal",
    "aten::masked_select",
    "aten::_unique2",
}


#: One for all: what attention remembers of a layout (indices) belongs to the mode that it was made in.
FAKE = FakeTensorMode()


def forget_indices() -> None:
    """Empty the caches that hold tensors of `FAKE`."""
    common.boundaries_on.cache_clear()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron_loong.attention."):
            for x in vars(module).values():
                if hasattr(x, "cache_clear"):
                    x.cache_clear()
    plan.forget_places()


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """`FAKE`, in which the host has memory that it can pin: what is pinned says so."""

    def pin_memory(x: torch.Tensor) -> torch.Tensor:
        pinned: Any = x.clone()
        pinned.pinned_here = True
        return pinned

    with FAKE, mock.patch.object(torch.Tensor, "pin_memory", pin_memory):
        yield


class HostReads(TorchDispatchMode):
    """Writes down every operator that would synchronise host and device: `.item()` and its like, copies between
    the two that are not said to be non-blocking (`torch.tensor([...], device=...)`, an index given as a list), and
    those to the device from memory that is not pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in READS:
            self.found.append(func._schema.name)
        result = func(*args, **kwargs)
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()}
        made = {x.device.type for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        waits = not kwargs.get("non_blocking") or (devices == {"cpu"} and not hasattr(args[0], "pinned_here"))
        crosses = len(devices | made) > 1 and bool(devices) and waits
        if crosses:
            self.found.append(func._schema.name)
        return result


class Silent(Transport):
    """Sends nothing."""

    batched = True

    def __init__(self, *_: Any) -> None: ...

    def post(self, messages: Sequence[Message]) -> Pending[None]:
        return lambda: None

    def all_to_all(self, *_: Any) -> Pending[None]:
        return lambda: None


class _WithoutEngine:
    """`Attention2D` whose forward and backward are called by hand: autograd's engine asks a GPU for its streams."""

    def __init__(self) -> None:
        self.context: Any = SimpleNamespace()
        self.context.maybe_clear_saved_tensors = lambda: None
        self.context.save_for_backward = lambda *tensors: setattr(self.context, "saved_tensors", tensors)

    def apply(self, *args: Any) -> Any:
        return Attention2D.forward(self.context, *args)


def host_reads(
    config: LoongConfig, heads: int, kv_heads: int, make_options: Callable[[torch.device], dict[str, Any]]
) -> list[str]:
    """What a first forward and backward would wait for on rank 0, with all that is made once per layout.

    `make_options(device)` gives further arguments of `attention_2d`.
    """
    with fake_gpu(), row_ops.without_triton():  # a Triton kernel cannot run on tensors without data
        device = torch.device("cuda", 0)
        seq_len = 16 * config.context_parallel_size
        groups = groups_without_processes(config, 0, Silent, timedelta(seconds=1))
        q, k, v, dout = (torch.empty(1, 16, n, 8, device=device) for n in (heads, kv_heads, kv_heads, heads))
        options = make_options(device)
        without_engine = _WithoutEngine()
        with mock.patch.object(attention_2d_module, "Attention2D", without_engine), HostReads() as reads:
            attention_2d(q, k, v, groups, seq_len=seq_len, kernel="reference", **options)
            Attention2D.backward(without_engine.context, dout.transpose(0, 1))
        return reads.found
