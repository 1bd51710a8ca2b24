"""transformers 4.48 to the newest: how an attention is made known to it, and what it is told of masks.

From 4.53 on a model asks the attention implementation what to make of its mask. Before, it makes an s x s mask itself,
and hands its attention fewer keywords: there the masks are switched off on the model, and what the attention must
know of a batch is looked up by its position_ids, the one tensor that reaches every layer as it is.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

MASKS_ARE_ASKED_FOR = importlib.util.find_spec("transformers.masking_utils") is not None
"""Whether transformers is 4.53 or newer."""

_told: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""position_ids -> (padding mask, digest) of the batch, for transformers up to 4.52."""


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make `attention`, and where transformers asks for it `mask`, known to all models under `name`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if MASKS_ARE_ASKED_FOR:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
    else:
        ALL_ATTENTION_FUNCTIONS[name] = attention


def quiet_masks(model: Any) -> Callable[[], None]:
    """Up to 4.52: no s x s mask, and padding and digest put where `told_before` finds them. Returns how to undo it."""
    if MASKS_ARE_ASKED_FOR:
        return lambda: None
    decoder = getattr(model, model.base_model_prefix)
    decoder._update_causal_mask = lambda *args, **kwargs: None

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if positions is not None:
            _told[positions] = (None if mask is None else mask.bool(), kwargs.get("loong_digest"))
        return args, {k: x for k, x in kwargs.items() if k not in ("attention_mask", "loong_digest")}

    handle = model.register_forward_pre_hook(note, with_kwargs=True)

    def undo() -> None:
        handle.remove()
        del decoder._update_causal_mask

    return undo


def told_before(position_ids: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Padding mask and digest of the batch of these positions."""
    if position_ids is None or position_ids not in _told:
        raise NotImplementedError(
            "with transformers up to 4.52 the positions must reach attention as the model was given them: give "
            "position_ids (shard_batch does), and use non-reentrant checkpointing, "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    return _told[position_ids]


def attention_by_name(model: Any) -> bool:
    """Whether the model looks its attention up by name at every call, as it must for another one to take its place."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(sys.modules[type(model).__module__])
