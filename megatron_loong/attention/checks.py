"""What `attention_2d` refuses apart from its options, told from what every rank has alike, before the first message."""

from __future__ import annotations

import torch

from megatron_loong.attention.options import TENSORS_PER_HEAD, CallArguments, is_whole, shown
from megatron_loong.comm.groups import LoongGroups
from megatron_loong.config import divisors
from megatron_loong.layout.sharding import checked_whole


def check_arguments(arguments: CallArguments) -> None:
    """Raise `ValueError`, which says what was expected, for arguments of the wrong type."""
    for name in TENSORS_PER_HEAD:
        check_tensor(name, getattr(arguments, name), optional=True)
    for name in ("seq_len", "kv_seq_len"):
        if getattr(arguments, name) is not None:
            checked_whole(name, getattr(arguments, name))
    seed = arguments.dropout_seed
    if seed is not None and not is_whole(seed):
        raise ValueError(f"dropout_seed={shown(seed)} must be None or a whole number, the same on every rank")


def check_tensor(name: str, x: object, optional: bool = False) -> None:
    """Raise `ValueError` for what is no tensor."""
    if not (isinstance(x, torch.Tensor) or (optional and x is None)):
        raise ValueError(f"{name} must be a tensor; got {shown(x)}")


def check_shapes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: LoongGroups, qkv_format: str, arguments: CallArguments
) -> None:
    """Raise `ValueError` for tensors (sequence first) that do not fit each other or the layout."""
    if qkv_format == "thd" and arguments.cu_seqlens is None:
        raise ValueError("qkv_format='thd' needs cu_seqlens: the global boundaries of the packed documents")
    _check_qkv(q, k, v, qkv_format)
    heads, hp = q.shape[2], groups.config.head_parallel_size
    if heads < hp:
        fitting = [n for n in divisors(groups.config.context_parallel_size) if n <= heads]
        raise ValueError(f"head_parallel_size={hp} is more than the {heads} query heads; try one of {fitting}")
    for name in ("softmax_offset", "max_logits"):
        x = getattr(arguments, name)
        if x is not None and tuple(x.shape) != (heads,):
            raise ValueError(f"{name} has shape {list(x.shape)}; it needs one number per query head: [{heads}]")
    if arguments.max_logits is not None and arguments.max_logits.dtype != torch.float32:
        raise ValueError(f"max_logits is {arguments.max_logits.dtype}; it must be float32")


def _check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qkv_format: str) -> None:
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


def check_heads(q: torch.Tensor, k: torch.Tensor) -> None:
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
