"""`--reset-attention-mask`: documents of a sequence that do not see each other, told by boundaries instead of a mask.

Megatron's dataset resets a mask of [S, S] behind each end-of-document token. The same boundaries are read off the batch
before it is cut (from one diagonal of that mask, or from the position ids), travel with the tokens to the model, and
reach attention as those of a pack. So the mask need not exist at all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_loong.integration.runtime import Runtime


def starts_of_documents(batch: dict[str, Any]) -> torch.Tensor:
    """Which tokens begin a document: bool [b, S]. From `attention_mask` ([b, 1, S, S], true: hidden), else positions.

    The mask is causal within each document, so a token that does not see the one before it begins one.
    """
    mask, position_ids = batch.get("attention_mask"), batch["position_ids"]
    if mask is None:
        starts = position_ids == 0
    else:
        starts = torch.nn.functional.pad(mask[:, 0].diagonal(-1, 1, 2), (1, 0), value=True)
        starts = starts.expand(position_ids.shape[0], -1).clone()
    starts[:, 0] = True
    return starts


def as_one_pack(batch: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """The rows of a batch ([b, S]) behind one another ([1, b S]), without its mask, and where its documents end.

    Returns boundaries as int32 [documents + 1], from 0 to b S. Waits for the device.
    """
    starts = starts_of_documents(batch).flatten()
    cu_seqlens = torch.nn.functional.pad(starts.nonzero().flatten(), (0, 1), value=starts.numel()).int()
    rows = {key: x.reshape(1, -1) if key in _ROWS and x is not None else x for key, x in batch.items()}
    return {**rows, "attention_mask": None}, cu_seqlens


_ROWS = ("tokens", "labels", "loss_mask", "position_ids")


def asked(state: Runtime) -> bool:
    """Whether Megatron's arguments say `--reset-attention-mask`."""
    return bool(getattr(state.args(), "reset_attention_mask", False))


def model_forward(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    """`GPTModel.forward` that is told the documents of the tokens it is given."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        tokens = given.arguments.get("input_ids")
        cu_seqlens = None if tokens is None else state.documents_of.get(tokens)
        if cu_seqlens is not None:
            longest = int(cu_seqlens.diff().max())
            given.arguments["packed_seq_params"] = PackedSeqParams(
                "thd", cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest
            )
        params, before = given.arguments.get("packed_seq_params"), state.in_packed_model
        state.in_packed_model = getattr(params, "qkv_format", None) == "thd"
        try:
            return original(*given.args, **given.kwargs)
        finally:
            state.in_packed_model = before

    return forward


def refuse_lost_documents(state: Runtime) -> None:
    """Raise `NotImplementedError` when attention is to run without the documents that were asked for."""
    if asked(state):
        raise NotImplementedError(
            "--reset-attention-mask is not in effect with --context-parallel-impl loong: the documents did not reach "
            "attention; supported: batches cut by megatron.core.utils.get_batch_on_this_cp_rank whose tokens go to "
            "GPTModel as they are, or packed_seq_params of your own"
        )
