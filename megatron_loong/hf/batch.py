"""Whether the ranks hold the parts of one batch, and where its documents begin: told by what all of them hold.

A rank's own positions tell neither: in zigzag they jump in any case. So the ranks gather positions and padding (24
bytes a token) once for each batch, in inference mode once for each layer, and all of them come to the same end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from megatron_loong.comm.groups import LoongGroups, groups_by_number
from megatron_loong.comm.sequence import gather_lengths, unshard_sequence
from megatron_loong.layout.sharding import token_positions


class Batch(NamedTuple):
    """What the ranks of a group hold together."""

    seq_len: int
    begins: torch.Tensor | None
    """bool [b, S] on the CPU: where documents begin. None: every row is one document."""


_seen: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""position_ids -> a list of what they came with, and the batch. Every layer asks, and recomputation does again."""

_WHOLE_BATCH = (
    "each rank's position_ids count from 0: they are missing, or every rank was handed the whole batch; "
    "give each rank its part with megatron_loong.hf.shard_batch"
)


def row_digests(whole: Sequence[torch.Tensor]) -> torch.Tensor:
    """int64 [b]: a number for the contents of each row of some [b, S] tensors of whole numbers."""
    total = torch.zeros(whole[0].shape[0], dtype=torch.int64, device=whole[0].device)
    weights = torch.arange(1, whole[0].shape[1] + 1, device=total.device) * 0x9E3779B97F4A7C1 | 1
    for x in whole:  # in 64 bits that overflow, alike on every device
        mixed = (x.to(torch.int64) + 0x632BE59BD9B4E01) * weights
        total = total * 31 + (mixed ^ (mixed >> 29)).sum(1)
    return total


def batch_of(
    rows: int,
    tokens: int,
    position_ids: torch.Tensor | None,
    padding: torch.Tensor | None,
    digest: torch.Tensor | None,
    groups: LoongGroups,
    *,
    use_cache: bool,
) -> Batch:
    """The batch of which this rank holds `tokens` of each of `rows`. Collective, unless the positions were seen before.

    Raises `ValueError`, on every rank alike, when the ranks hold no parts of one batch.
    """
    if position_ids is None or position_ids.dim() != 2:
        shape = "none" if position_ids is None else list(position_ids.shape)
        raise NotImplementedError(
            "megatron_loong's attention needs position_ids [b, s] to tell that the ranks hold the parts of one "
            f"batch, and this model hands its attention {shape}"
        )
    if torch.compiler.is_compiling():
        # How long the sequence is must be known here, so the ranks must hold equally many tokens.
        seq_len = tokens * groups.config.context_parallel_size
        begins = torch.ops.megatron_loong.documents(
            position_ids, padding, digest, groups.number, rows, tokens, seq_len, use_cache
        )
        return Batch(seq_len, begins)
    batch = _remembered(rows, tokens, position_ids, padding, digest, groups)
    if use_cache and padding is None and batch.begins is not None:
        raise ValueError(
            "position_ids restart, which means packed documents, but with use_cache=True transformers itself attends "
            "across them; set use_cache=False"
        )
    return batch


def _remembered(rows: int, tokens: int, position_ids: torch.Tensor, *others: Any) -> Batch:
    # All ranks run the same program, so a tensor is known on all of them or on none. Tensors of inference mode do not
    # say when they are written to: nothing is remembered of them.
    tensors = [x for x in (position_ids, *others) if torch.is_tensor(x)]
    if any(x.is_inference() for x in tensors):
        return _batch_of(rows, tokens, position_ids, *others)
    changes = tuple(x._version for x in tensors)
    asked = *others, changes, rows, tokens
    entries: list[Any] = _seen.get(position_ids) or []
    for known, batch in entries:
        if all(a is b or (not torch.is_tensor(a) and a == b) for a, b in zip(asked, known, strict=True)):
            return batch
    batch = _batch_of(rows, tokens, position_ids, *others)
    # A model has a few kinds of masks, each with a padding tensor of its own.
    _seen[position_ids] = [*entries[-3:], (asked, batch)]
    return batch


@torch.no_grad()
def _batch_of(
    rows: int,
    tokens: int,
    position_ids: torch.Tensor,
    padding: torch.Tensor | None,
    digest: torch.Tensor | None,
    groups: LoongGroups,
) -> Batch:
    held = [rows, tokens, position_ids.shape[1], tokens if padding is None else padding.shape[1]]
    everyone = gather_lengths(held, groups, position_ids.device)
    for rank, (b, s, *others) in enumerate(everyone):
        if b != everyone[0][0]:
            raise ValueError(f"the ranks hold {[x[0] for x in everyone]} rows; shard one batch over them (shard_batch)")
        if others != [s, s]:
            raise ValueError(
                f"logical rank {rank} holds {s} tokens of each row, but positions of {others[0]} and an attention_mask "
                f"of {others[1]}; shard them as the tokens (shard_batch)"
            )
    marks = [
        position_ids.expand(rows, -1),
        torch.full_like(position_ids, 2).expand(rows, -1) if padding is None else padding,
        torch.zeros_like(position_ids).expand(rows, -1) if digest is None else digest[:, None].expand(-1, tokens),
    ]
    mine = torch.stack([x.to(torch.int64) for x in marks], dim=-1)
    positions, real, digests = unshard_sequence(mine, groups, dim=1).cpu().unbind(-1)
    seq_len = positions.shape[1]
    different = (digests != digests[:, :1]).any(1).nonzero().flatten().tolist()
    if different:
        raise ValueError(
            f"the ranks were given different batches: rows {different} are not the same on every rank; every rank of "
            "the group must shard the same rows (with a sampler that counts groups, not ranks)"
        )
    if ((real == 2) != (real == 2)[0, 0]).any():
        raise ValueError("some ranks have an attention_mask and others none; shard one batch over them (shard_batch)")
    if real[0, 0] == 2:
        begins = _documents_by_position(positions, groups)
    else:
        begins = _documents_by_padding(positions, real == 1)
    return Batch(seq_len, begins if begins[:, 1:].any() else None)


def _documents_by_position(positions: torch.Tensor, groups: LoongGroups) -> torch.Tensor:
    """As transformers has it: a document begins where positions do not go on. It must begin at 0."""
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff() != 1
    ranks = range(groups.config.context_parallel_size)
    parts = [positions[:, token_positions(groups.config, rank, positions.shape[1])] for rank in ranks]
    if len(parts) > 1 and all(bool((x == torch.arange(x.shape[1])).all()) for x in parts):
        raise ValueError(_WHOLE_BATCH)
    wrong = (begins & (positions != 0)).nonzero()
    if len(wrong):
        row, place = wrong[0].tolist()
        raise ValueError(
            f"position_ids of row {row} go on at place {place} of {positions.shape[1]} with {positions[row, place]}, "
            "which neither follows nor starts a document at 0: the ranks do not hold the parts of one sequence; give "
            "each rank its part with megatron_loong.hf.shard_batch"
        )
    return begins


def _documents_by_padding(positions: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """A row's tokens are one document, its padding others."""
    begins = torch.ones_like(real)
    begins[:, 1:] = real.diff()
    holes = ((begins & real).sum(1) > 1).nonzero().flatten().tolist()
    if holes:
        raise NotImplementedError(
            "megatron_loong's attention does not work with an attention_mask that is 0 between tokens "
            f"(rows {holes}): padding may stand before or behind a row's tokens, not among them"
        )
    follows = real[:, 1:] & real[:, :-1]
    wrong = (follows & (positions.diff() != 1)).nonzero()
    if len(wrong):
        row, place = wrong[0].tolist()
        raise ValueError(
            f"position_ids of row {row} do not go on at place {place + 1} of {positions.shape[1]}, beside an "
            "attention_mask: the ranks do not hold the parts of one sequence (see "
            "megatron_loong.hf.shard_batch), or it is a pack, which transformers tells by its position_ids "
            "only without an attention_mask"
        )
    return begins


@torch.library.custom_op("megatron_loong::documents", mutates_args=())
def _documents(
    position_ids: torch.Tensor,
    padding: torch.Tensor | None,
    digest: torch.Tensor | None,
    groups: int,
    rows: int,
    tokens: int,
    seq_len: int,
    use_cache: bool,
) -> torch.Tensor:
    """`Batch.begins` as a node of a compiled graph, with a row's first token alone where there is one document."""
    held = groups_by_number(groups)
    batch = batch_of(rows, tokens, position_ids, padding, digest, held, use_cache=use_cache)
    if batch.seq_len != seq_len:
        raise NotImplementedError(
            f"a sequence of {batch.seq_len} tokens cannot be compiled: the ranks hold unequal numbers of them; pad it "
            f"to a multiple of {held.config.sequence_multiple}, with an attention_mask"
        )
    if batch.begins is not None:
        return batch.begins.clone()
    begins = torch.zeros(rows, seq_len, dtype=torch.bool)
    begins[:, 0] = True
    return begins


@_documents.register_fake
def _(position_ids, padding, digest, groups, rows, tokens, seq_len, use_cache):
    return position_ids.new_empty(rows, seq_len, dtype=torch.bool, device="cpu")
