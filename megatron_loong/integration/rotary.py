"""Hooks that give each of this rank's tokens its own row of the rotary embedding, by the layout of the tokens."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

import megatron_loong.integration.dynamic as dynamic
import megatron_loong.integration.packed as packed
from megatron_loong.integration.runtime import Runtime


def _hook_rotary_slice(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    """This rank's rows of the rotary embedding of one sequence, which Megatron takes in zigzag.

    Of a pack none are taken here: each token's own are, where the embedding is applied. Only the multimodal embedding
    comes here with a pack, one row for each token of it.
    """

    @functools.wraps(original)
    def get_pos_emb_on_this_cp_rank(pos_emb: torch.Tensor, seq_dim: int, cp_group: Any) -> torch.Tensor:
        if state.in_packed_model and cp_group and packed.layout_config(state, cp_group.size()):
            return pos_emb
        config = cp_group and packed.contiguous_config(state, cp_group.size())
        if config is None:  # as without a group, which is Megatron's error
            rows = original(pos_emb, seq_dim, cp_group)
            state.cut_embeddings[rows] = True
            return rows
        places = packed.local_places(config, cp_group.rank(), pos_emb.shape[seq_dim], None, pos_emb.device)
        return pos_emb.index_select(seq_dim, places.in_pack)

    return get_pos_emb_on_this_cp_rank


def _hook_rotary_thd(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    rope = importlib.import_module(original.__module__)
    signature = inspect.signature(original)
    row_by_row = inspect.signature(rope._apply_rotary_pos_emb_bshd).parameters

    @functools.wraps(original)
    def _apply_rotary_pos_emb_thd(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(*args, **kwargs).arguments
        t, cp_group = given["t"], given.get("cp_group")
        size, rank = (1, 0) if cp_group is None else (cp_group.size(), cp_group.rank())
        config, rank = dynamic.layout_and_rank(state, size, rank)
        if config is None:
            return original(*args, **kwargs)
        if given["freqs"] in state.cut_embeddings:
            raise NotImplementedError(
                "a rotary embedding that was cut as that of one sequence reached a pack of documents; with "
                "--position-embedding-type mrope and --context-parallel-impl loong, supported: GPTModel.forward of "
                "Megatron, or an embedding of the whole pack"
            )
        tokens = t.shape[0] * config.context_parallel_size
        local = packed.rotary_freqs(config, rank, tokens, given["cu_seqlens"], given["freqs"])
        # All but what says where the documents lie, which the rows of `local` do already (max_seqlen, after 0.19).
        how = {name: x for name, x in given.items() if name in row_by_row and name not in ("t", "freqs")}
        return rope._apply_rotary_pos_emb_bshd(t.unsqueeze(1), local, **how).squeeze(1)

    return _apply_rotary_pos_emb_thd


def _hook_fused_rotary_thd(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    """TransformerEngine's kernel for sequences, given each packed token's own row of frequencies."""
    rope = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")

    @functools.wraps(original)
    def fused_apply_rotary_pos_emb_thd(
        t: torch.Tensor,
        cu_seqlens: torch.Tensor,
        freqs: torch.Tensor,
        cp_size: int = 1,
        cp_rank: int = 0,
        **kwargs: Any,
    ) -> torch.Tensor:
        config, rank = dynamic.layout_and_rank(state, cp_size, cp_rank)
        if config is None:
            return original(t, cu_seqlens, freqs, cp_size=cp_size, cp_rank=cp_rank, **kwargs)
        local = packed.rotary_freqs(config, rank, t.shape[0] * config.context_parallel_size, cu_seqlens, freqs)
        return rope.fused_apply_rotary_pos_emb(t.unsqueeze(1), local, **kwargs).squeeze(1)

    return fused_apply_rotary_pos_emb_thd


HOOKS: dict[str, Callable[[Runtime, Callable[..., Any]], Callable[..., Any]]] = {
    "rotary_slice": _hook_rotary_slice,
    "rotary_thd": _hook_rotary_thd,
    "fused_rotary_thd": _hook_fused_rotary_thd,
}
