"""A batch of Hugging Face's, cut for one rank of a context-parallel group: for a loop, a DataLoader or a Trainer.

Every rank of a group is handed the same whole batch and keeps its own tokens. Labels are shifted before the cut, for
the token that follows may live on another rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, default_collate

from megatron_loong.comm.groups import LoongGroups
from megatron_loong.config import LoongConfig
from megatron_loong.hf.batch import row_digests
from megatron_loong.hf.loss import NO_LABEL
from megatron_loong.layout.sharding import token_positions

#: [b, S] tensors that are cut.
_CUT = ("input_ids", "labels", "shift_labels", "attention_mask", "position_ids")
#: What packing collators say besides: position_ids say it too.
_PACKS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def shard_batch(batch: Mapping[str, Any], groups: LoongGroups) -> dict[str, torch.Tensor]:
    """This rank's part of a batch, as keyword arguments of a causal language model that was parallelized.

    `batch` is whole and the same on every rank of the group: input_ids [b, S], and if you like labels (aligned with
    the tokens, -100: no loss), attention_mask (0 where a row is padded, on either side) and position_ids (those that
    restart at 0 are packed documents). S is any length from the number of ranks on. With labels, the model's `loss`
    is this rank's share of the mean over the batch: the sum over the ranks is the loss, and the sum of the gradients is
    the gradient (under a wrapper that averages over N ranks of one group, multiply the loss by N).
    """
    shard = _shard(batch, groups.config, groups.require_cp_rank())
    if "labels" in shard:
        shard["num_items_in_batch"] = (_following(batch) != NO_LABEL).sum()
    return shard


@dataclass(frozen=True)
class ShardCollator:
    """`collate`, and then this rank's part of what it made. For a DataLoader, with workers or without."""

    collate: Callable[[list[Any]], Mapping[str, Any]]
    config: LoongConfig
    cp_rank: int
    """This rank's place in its group."""

    def __call__(self, features: list[Any]) -> dict[str, torch.Tensor]:
        """The whole batch is made, and cut; the same features on every rank must give the same batch."""
        return _shard(self.collate(features), self.config, self.cp_rank)


def data_loader(
    dataset: Any,
    groups: LoongGroups,
    *,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] = default_collate,
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
    **options: Any,
) -> DataLoader:
    """A DataLoader in which all ranks of a context-parallel group read the same rows, and each group other rows.

    `options` are those of `torch.utils.data.DataLoader`. With `shuffle`, call `loader.sampler.set_epoch(epoch)`.
    Batches are what a model that was parallelized takes, but for `num_items_in_batch`: see docs/huggingface.md.
    """
    if isinstance(dataset, IterableDataset):
        raise NotImplementedError(
            "data_loader shares out datasets that have a length; give each group its part of a stream yourself (the "
            "same to all its ranks) with DataLoader(stream, collate_fn=ShardCollator(collate, groups.config, "
            "groups.cp_rank))"
        )
    cp = groups.config.context_parallel_size
    replicas, replica = (dist.get_world_size() // cp, dist.get_rank() // cp) if dist.is_initialized() else (1, 0)
    sampler = DistributedSampler(dataset, replicas, replica, shuffle=shuffle, seed=seed, drop_last=drop_last)
    collate = ShardCollator(collate_fn, groups.config, groups.require_cp_rank())
    return DataLoader(dataset, sampler=sampler, collate_fn=collate, drop_last=drop_last, **options)


def _shard(batch: Mapping[str, Any], config: LoongConfig, cp_rank: int) -> dict[str, torch.Tensor]:
    unknown = sorted(k for k, x in batch.items() if x is not None and k not in (*_CUT, *_PACKS))
    if unknown:
        raise NotImplementedError(
            f"a batch with {', '.join(unknown)} cannot be cut for context parallelism; supported: {', '.join(_CUT)} "
            "(drop the rest in the collator or the dataset)"
        )
    whole = {k: batch[k] for k in _CUT if batch.get(k) is not None}
    if "input_ids" not in whole or whole["input_ids"].dim() != 2:
        raise ValueError(f"a batch must have input_ids [b, S]; this one has {_shapes(batch)}")
    rows, seq_len = whole["input_ids"].shape
    wrong = [k for k, x in whole.items() if x.shape[-1:] != (seq_len,) or x.dim() != 2 or x.shape[0] not in (1, rows)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} must be [b, S] as input_ids; the batch has {_shapes(batch)}")
    if seq_len < config.context_parallel_size:
        raise ValueError(
            f"a batch of {seq_len} tokens is too short for context_parallel_size={config.context_parallel_size}: every "
            "rank needs one; pad it, or leave such rows out"
        )
    if "position_ids" not in whole:
        whole["position_ids"] = _positions(batch, seq_len).to(whole["input_ids"].device)
        mask = whole.get("attention_mask")
        if mask is not None and mask.device.type == "cpu" and bool(mask.all()):
            del whole["attention_mask"]  # nothing is padded
    if "labels" in whole or "shift_labels" in whole:
        whole["labels"] = whole["shift_labels"] = _following(batch)
    digest = row_digests([x for k, x in whole.items() if k != "position_ids"])
    places = token_positions(config, cp_rank, seq_len).to(whole["input_ids"].device)
    # Contiguous rows of its own for each: an accelerator's copy must not carry the whole batch along.
    shard = {k: x.expand(rows, -1)[:, places].contiguous() for k, x in whole.items()}
    return {**shard, "loong_digest": digest}


def _following(batch: Mapping[str, Any]) -> torch.Tensor:
    """[b, S]: the label of the token that follows each token."""
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    return torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=NO_LABEL)


def _positions(batch: Mapping[str, Any], seq_len: int) -> torch.Tensor:
    """Counted from 0 in each row, or in each document of a pack that tells its boundaries alone."""
    positions = torch.arange(seq_len).unsqueeze(0)
    starts: torch.Tensor | Sequence[int] | None = batch.get("cu_seq_lens_q")
    if starts is None:
        told = [key for key in _PACKS if batch.get(key) is not None]
        if told:
            raise ValueError(
                f"a batch with {', '.join(told)} needs position_ids or cu_seq_lens_q too: give one of them"
            )
        return positions
    starts = torch.as_tensor(starts).cpu().flatten().long()
    if int(starts[0]) != 0 or int(starts[-1]) != seq_len or batch["input_ids"].shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q={starts.tolist()} must go from 0 to the {seq_len} tokens of one row; the batch has "
            f"{_shapes(batch)}"
        )
    return positions - starts[:-1].repeat_interleave(starts.diff())


def _shapes(batch: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {list(x.shape)}" for k, x in batch.items() if torch.is_tensor(x))
