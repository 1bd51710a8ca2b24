"""What `attention_2d` refuses, told from what every rank has alike, before the first message."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_loong.config import divisors
from megatron_loong.sequence.sharding import checked_whole
from megatron_loong.topology.groups import LoongGroups, checked_groups


def check_types(groups: object, tensors: Mapping[str, object], asked: Mapping[str, Any]) -> None:
    """Raise `ValueError`, which says what was expected, for arguments of the wrong type."""
    checked_groups(groups)
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a tensor; got {_said(x)}")
    for name, is_right, expected in _RULES:
        if not is_right(asked[name]):
            raise ValueError(f"{name}={_said(asked[name])} must be {expected}")


def check_changing(changing: Mapping[str, Any], optional_tensors: Mapping[str, object]) -> None:
    """The same for arguments that may differ from call to call, in every one of which this runs."""
    for name, x in optional_tensors.items():
        if x is not None and not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a tensor; got {_said(x)}")
    for name in ("seq_len", "kv_seq_len"):
        if changing[name] is not None:
            checked_whole(name, changing[name])
    seed = changing["dropout_seed"]
    if seed is not None and not _is_whole(seed):
        raise ValueError(f"dropout_seed={_said(seed)} must be None or a whole number, the same on every rank")


def _said(x: object) -> str:
    return repr(x) if isinstance(x, (int, float, str, tuple, list, type(None))) else f"a {type(x).__name__}"


def _is_number(x: object) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)


def _is_whole(x: object) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _is_bool(x: object) -> bool:
    return isinstance(x, numbers.Integral) and x in (0, 1)


def _is_window(x: object) -> bool:
    return x is None or (isinstance(x, (tuple, list)) and len(x) == 2 and all(map(_is_whole, x)))


_RULES: list[tuple[str, Callable[[Any], bool], str]] = [
    ("causal", _is_bool, "True or False"),
    ("deterministic", _is_bool, "True or False"),
    ("window_size", _is_window, "None or (left, right), such as (4, 0) for 4 keys before each query; -1 is unbounded"),
    # A tensor would be read as a number, and would learn nothing.
    (
        "softmax_scale",
        lambda x: x is None or (_is_number(x) and x > 0),
        "None, for 1 / sqrt(d), or a number above 0 (to learn a scale, multiply q by it)",
    ),
    ("softcap", lambda x: _is_number(x) and x >= 0, "a number of at least 0 (0: no soft cap)"),
    ("dropout_p", _is_number, "a number of at least 0 and below 1"),
    ("head_parts", lambda x: x is None or _is_whole(x), "None or a whole number"),
    (
        "kernel",
        lambda x: isinstance(x, str),  # that of an object
        "the name of a kernel, such as 'auto', or an AttentionKernel",
    ),
]
"""Argument, whether a value is of the right kind, and what is."""


def check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: LoongGroups,
    qkv_format: str,
    cu_seqlens: object,
    softmax_offset: torch.Tensor | None,
    dropout_p: float,
    max_logits: torch.Tensor | None,
) -> None:
    """Raise `ValueError` for tensors (sequence first) and options that do not fit each other or the layout."""
    if qkv_format not in ("bshd", "sbhd", "thd"):
        raise ValueError(f"qkv_format={qkv_format!r} is unknown; use 'bshd', 'sbhd' or 'thd'")
    if qkv_format == "thd" and cu_seqlens is None:
        raise ValueError("qkv_format='thd' needs cu_seqlens: the global boundaries of the packed documents")
    _check_shapes(q, k, v, qkv_format)
    heads, hp = q.shape[2], groups.config.head_parallel_size
    if heads < hp:
        fitting = [n for n in divisors(groups.config.context_parallel_size) if n <= heads]
        raise ValueError(f"head_parallel_size={hp} is more than the {heads} query heads; try one of {fitting}")
    for name, x in (
        ("softmax_offset", softmax_offset),
        ("max_logits", max_logits),
    ):
        if x is not None and tuple(x.shape) != (heads,):
            raise ValueError(f"{name} has shape {list(x.shape)}; it needs one number per query head: [{heads}]")
    if max_logits is not None and max_logits.dtype != torch.float32:
        raise ValueError(f"max_logits is {max_logits.dtype}; it must be float32")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p={dropout_p} must be at least 0 and below 1")


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qkv_format: str) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} (sequence first)"
    if not q.dim() == k.dim() == v.dim() == 4:
        dimensions = "three dimensions [t, heads, d]" if qkv_format == "thd" else "four dimensions"
        raise ValueError(f"q, k and v must have {dimensions}; got {shapes}")
    if q.shape[1] != k.shape[1] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"q, k and v must agree in batch, and k and v in length and KV heads too; got {shapes}")
    if 0 in (q.shape[1], q.shape[2], q.shape[3], v.shape[3]):
        raise ValueError(f"q, k and v must have no dimension of size 0 but the length; got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must share one dtype and device; got {q.dtype}, {k.dtype}, {v.dtype} "
            f"on {q.device}, {k.device}, {v.device}"
        )


def check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise `ValueError` unless every query head has a KV head of its width."""
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have heads of one width; got {q.shape[3]} and {k.shape[3]}")
    heads, kv_heads = q.shape[2], k.shape[2]
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"the number of query heads, {heads}, is not a multiple of the number of KV heads, {kv_heads}")


def check_latent(q: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor, weight: torch.Tensor) -> int:
    """Width of the values that `weight` makes of the latent; `ValueError` when the four do not fit each other."""
    nope = q.shape[3] - rope.shape[3]
    if (
        latent.shape[2] != 1
        or weight.dim() != 3
        or weight.shape[0] != q.shape[2]
        or weight.shape[2] != latent.shape[3]
        or not 0 < nope < weight.shape[1]
        or weight.dtype != q.dtype
    ):
        raise ValueError(
            f"multi-latent attention takes k [.., 1, r], v [.., 1, d_rope] and kv_up_weight [h, d_nope + dv, r] for q "
            f"[.., h, d_nope + d_rope], of one dtype; got q {list(q.shape)}, k {list(latent.shape)}, v "
            f"{list(rope.shape)} (sequence first), kv_up_weight {list(weight.shape)} {weight.dtype}"
        )
    return weight.shape[1] - nope
