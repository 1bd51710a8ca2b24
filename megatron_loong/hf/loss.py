"""The loss of a part of a sequence: labels that are shifted already, and a count of those of all ranks."""

from __future__ import annotations

from typing import Any

import torch

#: transformers' mark of a token that has no loss.
NO_LABEL = -100


def causal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **unused: Any,
) -> torch.Tensor:
    """Sum of the cross-entropies of this rank's tokens over the number of labels of all ranks: [b, s, v] -> [].

    transformers' own shifts local labels unless told not to, and up to 4.49 even if told. Raises `ValueError` for a
    batch that was not cut by `shard_batch` or `ShardCollator`, or that nobody counted the labels of.
    """
    check_loss_arguments(shift_labels, num_items_in_batch)
    assert shift_labels is not None and num_items_in_batch is not None
    flat = logits.float().reshape(-1, vocab_size)
    loss = torch.nn.functional.cross_entropy(
        flat, shift_labels.reshape(-1).to(flat.device), ignore_index=NO_LABEL, reduction="sum"
    )
    return loss / num_items_in_batch


def check_loss_arguments(shift_labels: torch.Tensor | None, num_items_in_batch: Any) -> None:
    """`ValueError` unless labels are shifted and counted."""
    missing = [
        name for name, x in (("shift_labels", shift_labels), ("num_items_in_batch", num_items_in_batch)) if x is None
    ]
    if missing:
        raise ValueError(
            f"the loss of a part of a sequence needs {' and '.join(missing)}: the labels that follow each token, and "
            "how many there are on all ranks; cut the batch with megatron_loong.hf.shard_batch or ShardCollator"
        )
