"""The attention function that transformers' models call, `attn_implementation=` the name that `register` returns.

Everything in such a model but attention works token by token, so nothing else has to know that the sequence is cut.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

import megatron_loong.hf.compat as compat
from megatron_loong.attention.attention_2d import attention_2d
from megatron_loong.comm.groups import LoongGroups
from megatron_loong.hf.batch import batch_of
from megatron_loong.hf.masks import Pattern, pattern_of

#: What transformers hands to an attention function and changes no result here.
_IRRELEVANT = set(
    "is_causal use_cache output_attentions output_hidden_states return_dict position_ids cache_position "
    "num_items_in_batch shift_labels".split()
)
#: What `loong_attention` reads besides.
_READ = {"sliding_window", "softcap", "s_aux", "loong_digest"}


def register(groups: LoongGroups, kernel: str = "auto") -> str:
    """Make 2D-Attention over `groups` known to transformers; returns its name as an attention implementation."""
    name = f"loong_{groups.number}"
    compat.register_attention(name, functools.partial(loong_attention, groups=groups, kernel=kernel), pattern_of)
    return name


def loong_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Pattern | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    groups: LoongGroups,
    kernel: str = "auto",
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention contract: query [b, h, s, d], key and value [b, g, s, d]; returns [b, s, h, d].

    s is this rank's part of the sequence, and `attention_mask` what `pattern_of` made of the model's mask. Where the
    mask says so, or `position_ids` that restart, each document attends to itself alone; tokens that are padding are
    seen by no other, and their own results are zeros. Raises `NotImplementedError` for mask tensors, mask functions
    that are not known here, dropout and cached keys, and `ValueError` where the ranks do not hold the parts of one
    batch: before q, k or v is sent, and on every rank alike.
    """
    _refuse(module, query, key, attention_mask, dropout, kwargs)
    pattern = attention_mask if isinstance(attention_mask, Pattern) else _pattern_without_mask(module, kwargs)
    digest = kwargs.get("loong_digest")
    if not compat.MASKS_ARE_ASKED_FOR:
        padding, digest = compat.told_before(kwargs.get("position_ids"))
        pattern = pattern._replace(padding=padding)
    batch = batch_of(
        query.shape[0],
        query.shape[2],
        kwargs.get("position_ids"),
        pattern.padding,
        digest,
        groups,
        use_cache=bool(kwargs.get("use_cache")),
    )
    _refuse_local_positions(module, batch.seq_len)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if torch.is_autocast_enabled(q.device.type):  # as in PyTorch's own attention: rotary widens q and k, and not v
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    shape, seq_len = q.shape, batch.seq_len
    if batch.begins is not None:
        # Documents may end elsewhere in each row: the rows go through as one sequence, in which they are documents.
        q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
        seq_len *= shape[0]
    out = attention_2d(
        q,
        k,
        v,
        groups,
        qkv_format="bshd",
        causal=pattern.causal,
        softmax_scale=scaling,
        window_size=pattern.window,
        cu_seqlens=batch.begins,
        softmax_offset=kwargs.get("s_aux"),
        softcap=kwargs.get("softcap") or 0.0,
        seq_len=seq_len,
        kernel=kernel,
        varying_lengths=True,  # batches come in many lengths
    ).reshape(*shape[:3], value.shape[3])
    if pattern.padding is not None:
        out = out * pattern.padding[..., None, None]
    return out, None


def _pattern_without_mask(module: Any, kwargs: dict[str, Any]) -> Pattern:
    """For models that ask for no mask."""
    causal, window = kwargs.get("is_causal"), kwargs.get("sliding_window")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    return Pattern(causal, None if window is None else (window - 1, 0 if causal else window - 1))


def _refuse(
    module: Any, query: torch.Tensor, key: torch.Tensor, mask: Any, dropout: float, kwargs: dict[str, Any]
) -> None:
    reason = None
    if isinstance(mask, Pattern):
        reason = mask.unknown
    elif mask is not None:
        reason = "a mask tensor of its own making: give the [b, s] attention_mask of padding, or packed position_ids"
    if reason is None and dropout:
        reason = f"dropout={dropout}: set the model's attention_dropout to 0"
    if reason is None and query.shape[2] != key.shape[2]:
        reason = f"{query.shape[2]} queries for {key.shape[2]} cached keys: it is for training, not for generation"
    if reason is None and getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
        reason = "attn_temperature_tuning, which counts positions from 0 on every rank: switch it off"
    known = _IRRELEVANT | _READ
    given = sorted(k for k, v in kwargs.items() if v is not None and k not in known and v is not False)
    if reason is None and given:
        reason = f"{', '.join(given)}: use a model without; documents of a pack are told by position_ids that restart"
    if reason:
        raise NotImplementedError(f"megatron_loong's attention does not work with {reason}")


def _refuse_local_positions(module: Any, seq_len: int) -> None:
    """Rotary embeddings that change with the length are told the greatest position of this rank, not of all."""
    config = getattr(module, "config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for one in (rope, *rope.values()):
        kind = (one.get("rope_type") or one.get("type")) if isinstance(one, dict) else None
        if kind not in ("dynamic", "longrope"):
            continue
        longest = one.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        longest = longest or getattr(config, "max_position_embeddings", 0)
        if seq_len > longest:
            raise NotImplementedError(
                f"megatron_loong's attention does not work with rope_type={kind!r} for {seq_len} tokens: beyond "
                f"{longest} it depends on the length, and a rank knows its own part alone; use 'yarn', 'llama3' or "
                f"'linear', or at most {longest} tokens"
            )
