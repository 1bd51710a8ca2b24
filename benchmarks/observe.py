"""What a piece of code does besides taking time: operations of attention, bytes to each peer, live tensor bytes.

All three are read off the dispatcher, where every implementation passes, so that no one's own bookkeeping is needed.
Observed runs are slow; times are taken in other ones.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.flops import attention_flops

_FORWARD = "aten::_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
# Namespaces that never talk to anyone; an operator of any other is looked into, or refused.
_LOCAL = ("aten::", "prim::", "prims::", "profiler::")
# Collectives without a payload, and those that only wait.
_SILENT = ("barrier", "monitored_barrier", "recv", "recv_any_source", "wait_tensor", "_wrap_tensor_autograd")


class Observer(TorchDispatchMode):
    """Counts inside its `with` block, in this thread, forward and backward alike.

    Raises `NotImplementedError` for an operator that may send what it cannot count, rather than count too little.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        """Of the CPU flash operator."""
        self.attention_calls = 0
        self.attention_cpu_s = 0.0
        """CPU time inside the operator, of the calling thread."""
        self.sent_bytes: Counter[int] = Counter()
        """To each global rank, without what a rank sends itself. A gather counts as what its ring carries."""
        self.peak_live_bytes = 0
        """Largest sum over storages made in the block and not yet released."""
        self._live_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        started = time.thread_time()
        if name in (_FORWARD, _BACKWARD):
            self._count_flops(name == _BACKWARD, args, kwargs)
        elif not name.startswith(_LOCAL):
            self._count_bytes(name.split("::")[1].rstrip("_"), args)
        result = func(*args, **kwargs)
        if name in (_FORWARD, _BACKWARD):
            self.attention_cpu_s += time.thread_time() - started
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._watch(leaf)
        return result

    def _count_flops(self, backward: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query, key = args[1:3] if backward else args[:2]
        causal = args[7] if backward and len(args) > 7 else args[4] if not backward and len(args) > 4 else None
        causal = bool(kwargs.get("is_causal", causal))
        batch, heads, query_len, head_dim = query.shape
        self.attention_calls += 1
        self.flops += attention_flops(batch, heads, head_dim, query_len, key.shape[2], causal=causal, backward=backward)

    def _count_bytes(self, name: str, args: tuple[Any, ...]) -> None:
        if name in _SILENT:
            return
        if name not in _SENDERS:
            raise NotImplementedError(f"the observer does not know whether {name} sends anything, and how much")
        for peer, sent in _SENDERS[name](args):
            self.sent_bytes[peer] += sent

    def _watch(self, tensor: torch.Tensor) -> None:
        if type(tensor) is not torch.Tensor and not isinstance(tensor, torch.nn.Parameter):
            return  # a wrapper; what it wraps was seen when it was made
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._live_bytes += size
        self.peak_live_bytes = max(self.peak_live_bytes, self._live_bytes)
        weakref.finalize(storage, self._released, key, size)

    def _released(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live_bytes -= size


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _group(where: Any) -> dist.ProcessGroup:
    if isinstance(where, str):
        return c10d._resolve_process_group(c10d.GroupName(where))
    return where if isinstance(where, dist.ProcessGroup) else dist.ProcessGroup.unbox(where)


def _send(args: tuple[Any, ...]) -> list[tuple[int, int]]:
    tensors, where, destination = args[:3]
    return [(dist.get_global_rank(_group(where), destination), sum(map(_bytes, tensors)))]


def _scatter(payload: torch.Tensor, splits: list[int], where: Any) -> list[tuple[int, int]]:
    group = _group(where)
    size, me = group.size(), group.rank()
    rows = splits or [payload.shape[0] // size] * size
    row_bytes = _bytes(payload) // max(payload.shape[0], 1)
    return [(dist.get_global_rank(group, i), rows[i] * row_bytes) for i in range(size) if i != me and rows[i]]


def _all_to_all_base(args: tuple[Any, ...]) -> list[tuple[int, int]]:
    _, payload, where, _, input_splits = args[:5]
    return _scatter(payload, list(input_splits), where)


def _functional_all_to_all(args: tuple[Any, ...]) -> list[tuple[int, int]]:
    payload, _, input_splits, where = args[:4]
    return _scatter(payload, list(input_splits), where)


def _ring_gather(payload: torch.Tensor, where: Any) -> list[tuple[int, int]]:
    group = _group(where)
    following = dist.get_global_rank(group, (group.rank() + 1) % group.size())
    return [(following, _bytes(payload) * (group.size() - 1))]


_SENDERS: dict[str, Callable[[tuple[Any, ...]], list[tuple[int, int]]]] = {
    "send": _send,
    "alltoall_base": _all_to_all_base,
    "all_to_all_single": _functional_all_to_all,
    "_allgather_base": lambda args: _ring_gather(args[1], args[2]),
    "allgather": lambda args: _ring_gather(args[1][0], args[2]),
    "all_gather_into_tensor": lambda args: _ring_gather(args[0], args[2]),
    # DeepSpeed's own operator: (payload, name of the group), nothing of it shows outside.
    "dim_zero_all_to_all": lambda args: _scatter(args[0], [], args[1]),
}
