"""Hugging Face transformers without Megatron: `attn_implementation="loong"` for a model whose sequence is sharded.

    groups = build_groups(LoongConfig(context_parallel_size=4, head_parallel_size=2), range(4))
    register(groups)
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="loong")
    loss = model(**shard_batch(input_ids, groups, labels=input_ids)).loss     # this rank's share of the mean loss
    loss.backward()                                                            # sum gradients over the ranks

Everything in such a model but attention works token by token, so nothing else has to know of the sharding. Positions
and labels do, which `shard_batch` sees to: a label is the token that follows in the whole sequence, which another
rank may hold.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_loong.attention.attention_2d import attention_2d
from megatron_loong.sequence.sharding import shard_sequence, token_positions
from megatron_loong.topology.groups import LoongGroups

#: transformers' mark of a token that has no loss.
NO_LABEL = -100

#: What transformers hands to an attention function and changes no result here.
_IRRELEVANT = set(
    "is_causal use_cache output_attentions output_hidden_states return_dict position_ids cache_position "
    "num_items_in_batch shift_labels".split()
)


def register(groups: LoongGroups, name: str = "loong", kernel: str = "auto") -> None:
    """Make `attn_implementation=name` run 2D-Attention over `groups`. Registering again takes the earlier one's place.

    Needs transformers with `AttentionInterface` (4.48 on). Models built before use the new groups too.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(name, functools.partial(loong_attention, groups=groups, kernel=kernel))


def loong_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    groups: LoongGroups,
    kernel: str = "auto",
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention contract: query [b, h, s, d], key and value [b, g, s, d]; returns [b, s, h, d].

    s is this rank's part of the sequence. Raises `NotImplementedError` for masks, dropout, sliding windows, soft caps,
    sinks and cached keys, rather than leave them out.
    """
    _refuse(query, key, attention_mask, dropout, kwargs)
    causal = kwargs.get("is_causal")
    out = attention_2d(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        groups,
        qkv_format="bshd",
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        softmax_scale=scaling,
        kernel=kernel,
    )
    return out, None


def _refuse(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    reason = None
    if mask is not None:
        reason = "an attention mask: give no attention_mask, and sequences of one length"
    elif dropout:
        reason = f"dropout={dropout}: set the model's attention_dropout to 0"
    elif query.shape[2] != key.shape[2]:
        reason = f"{query.shape[2]} queries for {key.shape[2]} cached keys: it is for training, not for generation"
    else:
        given = sorted(k for k, v in kwargs.items() if v is not None and k not in _IRRELEVANT and v is not False)
        if given:
            reason = f"{', '.join(given)}: use a model without"
    if reason:
        raise NotImplementedError(f"attn_implementation='loong' does not work with {reason}")


def shard_batch(
    input_ids: torch.Tensor, groups: LoongGroups, labels: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """This rank's part of a batch, as keyword arguments of a causal language model.

    `input_ids` and `labels` [b, S], whole and the same on every rank of the group; labels are aligned with the tokens,
    as transformers has them (-100: no loss), and are shifted here. With labels, the model's `loss` is this rank's share
    of the mean over all labels of the batch: its sum over the ranks is the loss, and the sum of the gradients is the
    gradient (under a wrapper that averages over the ranks, multiply by their number). Raises `ValueError` when S is not
    a multiple of `groups.config.sequence_multiple`.
    """
    seq_len = input_ids.shape[1]
    positions = torch.as_tensor(token_positions(groups.config, groups.require_cp_rank(), seq_len))
    positions = positions.to(input_ids.device)
    batch = {
        "input_ids": shard_sequence(input_ids, groups, dim=1),
        "position_ids": positions.unsqueeze(0).expand(input_ids.shape[0], -1),
    }
    if labels is not None:
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NO_LABEL)
        batch["shift_labels"] = shard_sequence(following, groups, dim=1)
        batch["labels"] = batch["shift_labels"]  # transformers computes a loss only if there are labels
        batch["num_items_in_batch"] = (following != NO_LABEL).sum()
    return batch
