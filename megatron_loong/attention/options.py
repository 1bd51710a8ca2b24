"""What was asked of `attention_2d`: what stays the same from call to call, and what may differ."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_loong.attention.heads import head_shares
from megatron_loong.attention.merge import accumulator_dtype
from megatron_loong.config import GRADIENT_WIRES
from megatron_loong.kernels.interface import AttentionKernel, Dropout, KernelRequest, TileRules
from megatron_loong.layout.sharding import Boundaries
from megatron_loong.schedule.tiles import Mask

QKV_FORMATS = ("bshd", "sbhd", "thd")


@dataclass(frozen=True)
class AttentionOptions:
    """The arguments of `attention_2d` that stay the same from call to call; what each means is said there.

    One object goes from the call to the kernel: the ranks compare it, `prepare` makes the kernel's rules and request of
    it, a compiled graph has it in numbers and words. Nothing is checked before `check`, because a rank whose options
    are wrong must be able to tell the other ranks.
    """

    qkv_format: str = "bshd"
    causal: bool = True
    softmax_scale: float | None = None
    window_size: tuple[int, int] | None = None
    dropout_p: float = 0.0
    kernel: str | AttentionKernel = "auto"
    deterministic: bool = False
    softcap: float = 0.0
    gradient_wire: str = "auto"
    head_parts: int | None = None
    varying_lengths: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.window_size, list):
            object.__setattr__(self, "window_size", tuple(self.window_size))  # so that the options have a hash

    def said(self) -> dict[str, Any]:
        """The options by name, as ranks compare them: a kernel object counts as its name."""
        return vars(self) | {"kernel": getattr(self.kernel, "name", self.kernel)}

    def check(self) -> None:
        """Raise `ValueError`, which says what was expected, for a value that no call can have."""
        said = self.said()
        for name, is_right, expected in _RULES:
            if not is_right(said[name]):
                raise ValueError(f"{name}={shown(said[name])} {expected}")

    @property
    def mask(self) -> Mask:
        """Which keys a query sees."""
        return Mask.of(self.causal, self.window_size)

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The communication dtype of gradients of tensors in `dtype`.

        `auto` leaves float16 alone: a sum of parts may overflow where the parts do not.
        """
        if self.gradient_wire == "input" or (self.gradient_wire == "auto" and dtype == torch.bfloat16):
            return dtype
        return accumulator_dtype(dtype)

    def rules(self, head_dim: int, dropout_seed: int | None) -> TileRules:
        """The kernel's rules that hold for every tile of a call."""
        return TileRules(
            softmax_scale=1 / math.sqrt(head_dim) if self.softmax_scale is None else self.softmax_scale,
            softcap=self.softcap,
            dropout=Dropout(self.dropout_p, dropout_seed) if self.dropout_p and dropout_seed is not None else None,
        )

    def request(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head_parallel_size: int, *, packed: bool = False
    ) -> KernelRequest:
        """What a call with local q, k, v asks of a kernel; their heads are in dimension 2.

        Where ranks get different numbers of heads, it is about the first rank, which gets most.
        """
        # A rank whose heads do not follow the kernel's rule gives each query head a copy of its KV head
        # (`expansion.PlainHeads`). All ranks must choose one kernel, so if one does, the request is made for that.
        shares, mask = head_shares(q.shape[2], k.shape[2], head_parallel_size), self.mask
        usual_rule = all(shares.kv_of_query(rank) is None for rank in range(head_parallel_size))
        query_heads = len(shares.query[0])
        return KernelRequest(
            device_type=q.device.type,
            dtype=q.dtype,
            head_dim=q.shape[3],
            value_head_dim=v.shape[3],
            query_heads=query_heads,
            kv_heads=len(shares.kv[0]) if usual_rule else query_heads,
            deterministic=self.deterministic,
            windowed=mask.left is not None or mask.right not in (None, 0),
            softcap=bool(self.softcap),
            dropout=bool(self.dropout_p),
            varying=packed or self.varying_lengths,
        )


class CallArguments(NamedTuple):
    """The arguments of `attention_2d`, apart from q, k and v, that may differ from call to call."""

    cu_seqlens: Boundaries | None = None
    cu_seqlens_kv: Boundaries | None = None
    seq_len: int | None = None
    kv_seq_len: int | None = None
    dropout_seed: int | None = None
    softmax_offset: torch.Tensor | None = None
    max_logits: torch.Tensor | None = None
    kv_up_weight: torch.Tensor | None = None

    def said(self) -> dict[str, Any]:
        """The arguments by name, as ranks compare them: of a tensor per head only whether it is given."""
        tensors = {name: None if getattr(self, name) is None else "given" for name in TENSORS_PER_HEAD}
        return self._asdict() | tensors


TENSORS_PER_HEAD = ("softmax_offset", "max_logits", "kv_up_weight")


def shown(x: object) -> str:
    """A value as an error message shows it."""
    return repr(x) if isinstance(x, (int, float, str, tuple, list, type(None))) else f"a {type(x).__name__}"


def is_whole(x: object) -> bool:
    """Whether x is a whole number, of Python or of another library."""
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _is_number(x: object) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)


def _is_bool(x: object) -> bool:
    return isinstance(x, numbers.Integral) and x in (0, 1)


def _is_window(x: object) -> bool:
    return x is None or (isinstance(x, (tuple, list)) and len(x) == 2 and all(map(is_whole, x)))


_RULES: list[tuple[str, Callable[[Any], bool], str]] = [
    ("qkv_format", lambda x: x in QKV_FORMATS, "is unknown; use 'bshd', 'sbhd' or 'thd'"),
    ("causal", _is_bool, "must be True or False"),
    ("deterministic", _is_bool, "must be True or False"),
    ("varying_lengths", _is_bool, "must be True or False"),
    (
        "window_size",
        _is_window,
        "must be None or (left, right), such as (4, 0) for 4 keys before each query; -1 is unbounded",
    ),
    # A tensor would be taken for a number, and would not be trained.
    (
        "softmax_scale",
        lambda x: x is None or (_is_number(x) and x > 0),
        "must be None, for 1 / sqrt(d), or a number above 0 (to learn a scale, multiply q by it)",
    ),
    ("softcap", lambda x: _is_number(x) and x >= 0, "must be a number of at least 0 (0: no soft cap)"),
    ("dropout_p", lambda x: _is_number(x) and 0 <= x < 1, "must be a number of at least 0 and below 1"),
    ("gradient_wire", lambda x: x in GRADIENT_WIRES, f"is unknown; use {', '.join(GRADIENT_WIRES)}"),
    ("head_parts", lambda x: x is None or is_whole(x), "must be None or a whole number"),
    ("kernel", lambda x: isinstance(x, str), "must be the name of a kernel, such as 'auto', or an AttentionKernel"),
]
"""Option, whether a value is of the right kind, and what the error says where it is not."""
