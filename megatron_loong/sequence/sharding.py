"""Tokens to ranks and back. Everything that depends on where a token lives reads `token_positions`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_loong.config import LoongConfig
from megatron_loong.sequence.packing import (
    checked_boundaries,
    packed_layout,
    padded_layout,
    paired_layouts,
    without_empty,
)
from megatron_loong.topology.errors import collective
from megatron_loong.topology.groups import LoongGroups, checked_groups
from megatron_loong.topology.layout import coordinates_of, logical_rank_of
from megatron_loong.topology.tokens import Run, TokenLayout, rows_layout, starts_of, zigzag_or_contiguous

Boundaries = torch.Tensor | Sequence[int] | Sequence[Sequence[int]]
"""`cu_seqlens`: global, the same on every rank, from 0 to the number of tokens; padding is a document of its own. A
tensor on the CPU costs no synchronisation.

Or two rows, [2, documents + 1]: `cu_seqlens` and `cu_seqlens_padded`. Documents begin where the second says, and are as
long as the first says: what follows is padding, which attention passes over (zeros).

Or bool [b, S], for b rows of S tokens that go through as one sequence of b * S tokens (q [1, b * s, h, d]): True where
a document begins. Each rank then holds of every row what it holds of a row without documents, and the documents of one
row need not be those of another.
"""


def layout_of(config: LoongConfig, seq_len: int, cu_seqlens: Boundaries | None = None) -> TokenLayout:
    """Where the tokens of one sequence of `seq_len`, or of a pack of documents, live.

    Without `cu_seqlens` as `config.sequence_layout` says, in chunks that differ by one token at most; with it as
    `sequence.packing` deals them. Raises `ValueError` for a length below 1 and as `documents_of`.
    """
    if checked_whole("seq_len", seq_len) < 1:
        raise ValueError(f"sequence length {seq_len} must be at least 1")
    if cu_seqlens is None:
        return zigzag_or_contiguous(config, seq_len)
    if isinstance(cu_seqlens, torch.Tensor):
        if cu_seqlens.dtype == torch.bool:
            return _layout_of_rows(config, seq_len, cu_seqlens)
        if cu_seqlens.device.type == "meta":  # no values: where the documents end is not asked for
            cu_seqlens = [0, seq_len]
    if two := _two_rows(cu_seqlens):
        lengths, documents = checked_boundaries(two[0]), documents_of(two[1], seq_len)
        if len(lengths) != len(documents):
            raise ValueError(
                f"cu_seqlens has {len(lengths) - 1} documents, cu_seqlens_padded has {len(documents) - 1}; give both "
                "for the same documents"
            )
        return padded_layout(config, lengths, documents)
    return packed_layout(config, without_empty(documents_of(cu_seqlens, seq_len)))


def _two_rows(cu_seqlens: Any) -> Any:
    """The two rows of boundaries with padding; None for boundaries of another form."""
    if isinstance(cu_seqlens, torch.Tensor):
        return cu_seqlens.tolist() if cu_seqlens.dim() == 2 and len(cu_seqlens) == 2 else None
    is_row = isinstance(cu_seqlens, (tuple, list)) and len(cu_seqlens) == 2
    return cu_seqlens if is_row and all(hasattr(x, "__len__") for x in cu_seqlens) else None


def layouts_of(
    config: LoongConfig,
    seq_len: int,
    cu_seqlens: Boundaries | None,
    kv_seq_len: int | None = None,
    cu_seqlens_kv: Boundaries | None = None,
) -> tuple[TokenLayout, TokenLayout]:
    """Layouts of queries and of keys, the same object where they are alike; keys are as queries unless told.

    Raises `ValueError` as `layout_of` and `paired_layouts`.
    """
    kv_seq_len = seq_len if kv_seq_len is None else kv_seq_len
    if cu_seqlens_kv is None and (kv_seq_len == seq_len or cu_seqlens is None):
        layout = layout_of(config, seq_len, cu_seqlens)
        return layout, layout if kv_seq_len == seq_len else layout_of(config, kv_seq_len)
    if cu_seqlens_kv is None:
        raise ValueError(
            f"kv_seq_len={kv_seq_len} with seq_len={seq_len} and cu_seqlens: give cu_seqlens_kv, the boundaries of the "
            "keys of the same documents"
        )
    documents = (0, seq_len) if cu_seqlens is None else documents_of(cu_seqlens, seq_len)
    kv_documents = documents_of(cu_seqlens_kv, kv_seq_len, "cu_seqlens_kv")
    if cu_seqlens is not None and documents == kv_documents:
        layout = packed_layout(config, without_empty(documents))
        return layout, layout
    queries, keys = paired_layouts(config, documents, kv_documents)
    return zigzag_or_contiguous(config, seq_len) if cu_seqlens is None else queries, keys


def checked_whole(name: str, value: object, meaning: str = "the tokens of all ranks together") -> int:
    """A whole number; `ValueError` for what is none."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name}={value!r} must be a whole number: {meaning}") from None


def _checked(x: object, groups: LoongGroups, dim: int) -> int:
    """`dim` from the front; `ValueError` unless x is a tensor that has it, and groups are groups."""
    checked_groups(groups)
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"x (the tensor to share out or to gather) must be a tensor; got a {type(x).__name__}")
    if not -x.dim() <= checked_whole("dim", dim, "that of the tokens") < x.dim():
        raise ValueError(f"dim={dim} is outside the {x.dim()} dimensions of a tensor of shape {list(x.shape)}")
    return dim % x.dim()


def documents_of(boundaries: Boundaries, tokens: int, name: str = "cu_seqlens") -> tuple[int, ...]:
    """Boundaries of all documents of a pack of `tokens`; empty documents stay.

    Raises `ValueError` unless they are whole numbers that ascend from 0 to `tokens`. Tokens after the last
    boundary are refused rather than made a document: boundaries of one rank's own tokens would pass for the pack's.
    """
    documents = checked_boundaries(boundaries, name)
    if documents[-1] > tokens:
        raise ValueError(f"{name} ends at {documents[-1]}, but there are {tokens} tokens")
    if documents[-1] < tokens:
        raise ValueError(
            f"{name} ends at {documents[-1]}, but the ranks together hold {tokens} tokens. If these are the boundaries "
            f"of one rank's own tokens, give those of the whole pack, the same on every rank; if the last "
            f"{tokens - documents[-1]} tokens are padding, make them a document: append {tokens}"
        )
    return documents


def _layout_of_rows(config: LoongConfig, seq_len: int, begins: torch.Tensor) -> TokenLayout:
    if begins.dim() != 2 or begins.numel() != seq_len:
        raise ValueError(
            f"cu_seqlens of bool must be [b, S] with a place for each of the {seq_len} tokens, the rows of a batch "
            f"joined into one sequence (q.reshape(1, -1, h, d)); got {list(begins.shape)}"
        )
    rows, length = begins.shape
    inside = [] if begins.device.type == "meta" else begins.flatten().nonzero().flatten().tolist()
    documents = sorted({*inside, *range(0, seq_len + 1, length)})
    return rows_layout(config, rows, tuple(documents))


def token_positions(
    config: LoongConfig, cp_rank: int, seq_len: int, *, cu_seqlens: Boundaries | None = None
) -> torch.Tensor:
    """Global indices of the tokens of `cp_rank`, in local order: int64 on the CPU, about [seq_len / cp_size].

    The one source for batch slices, position ids, rotary embedding, labels and loss mask. `seq_len` is the global
    length S, or the number of packed tokens with `cu_seqlens`. The ranks hold every token once; a length that
    `config.sequence_multiple` does not divide gives ranks that differ by a token or two. Raises `ValueError` when the
    rank is outside, or as `layout_of`.

    >>> token_positions(LoongConfig(4, 2), cp_rank=1, seq_len=16).tolist()
    [2, 3, 12, 13]
    """
    if not isinstance(config, LoongConfig):
        raise ValueError(f"config={config!r:.80} must be a LoongConfig: groups.config, if you have the groups")
    layout = layout_of(config, seq_len, cu_seqlens)
    cp_rank = checked_whole("cp_rank", cp_rank, "an index into the ranks of the group")
    runs = layout.rank_runs[logical_rank_of(config, coordinates_of(config, cp_rank))]
    return places_of(runs)


def places_of(runs: Sequence[Run]) -> torch.Tensor:
    """int64: the tokens of some runs, in order."""
    return torch.cat([torch.arange(0), *(torch.arange(start, stop) for start, stop in runs)])


def shard_sequence(
    x: torch.Tensor, groups: LoongGroups, dim: int = 1, *, cu_seqlens: Boundaries | None = None
) -> torch.Tensor:
    """This rank's tokens of a full tensor: [..., S, ...] -> [..., about S / cp_size, ...] along `dim`.

    Local and differentiable. With `cu_seqlens`, `dim` is that of the packed tokens. Raises `ValueError` as
    `layout_of`.
    """
    dim = _checked(x, groups, dim)
    runs = layout_of(groups.config, x.shape[dim], cu_seqlens).rank_runs[groups.logical_rank]
    return torch.cat([x.narrow(dim, 0, 0), *(x.narrow(dim, start, stop - start) for start, stop in runs)], dim)


def unshard_sequence(
    x_local: torch.Tensor, groups: LoongGroups, dim: int = 1, *, cu_seqlens: Boundaries | None = None
) -> torch.Tensor:
    """The inverse of `shard_sequence`: gathers [..., about S / cp_size, ...] to [..., S, ...] on every rank.

    Collective over the context-parallel group, and differentiable: this rank's tokens get the gradient of their places
    in this rank's whole, without another message, for every rank is to compute the same of it (a loss of log-probs).
    Raises `ValueError`, on every rank alike, when the ranks together do not hold what the layout says.
    """
    dim = _checked(x_local, groups, dim)
    lengths = [n for (n,) in gather_lengths([x_local.shape[dim]], groups, x_local.device)]
    layout = layout_of(groups.config, sum(lengths), cu_seqlens)
    expected = [layout.tokens_of(rank) for rank in range(len(lengths))]
    if lengths != expected:
        raise ValueError(f"the ranks hold {lengths} tokens; {sum(lengths)} in this layout are shared out as {expected}")
    longest = max(lengths)
    x = x_local.detach().movedim(dim, 0)
    padded = x.new_zeros(longest, *x.shape[1:])
    padded[: len(x)] = x
    parts = gathered(padded, groups, "tokens")
    whole = x.new_empty(sum(lengths), *x.shape[1:])
    for runs, part in zip(layout.rank_runs, parts, strict=True):
        for (start, stop), row in zip(runs, starts_of(b - a for a, b in runs), strict=False):
            whole[start:stop] = part[row : row + stop - start]
    if x_local.requires_grad and torch.is_grad_enabled():
        mine = places_of(layout.rank_runs[groups.logical_rank]).to(whole.device)
        whole = whole.index_copy(0, mine, x_local.movedim(dim, 0))
    return whole.movedim(0, dim).contiguous()


def gather_lengths(local_lengths: Sequence[int], groups: LoongGroups, device: torch.device) -> list[list[int]]:
    """By logical rank, the lengths that each rank of the group holds. Collective; waits for the device.

    Raises `CommunicationError` when a peer is lost.
    """
    return gathered(torch.tensor(local_lengths), groups, "lengths", device).tolist()


def gathered(x: torch.Tensor, groups: LoongGroups, what: str, device: torch.device | None = None) -> torch.Tensor:
    """Equal tensors of all ranks, stacked by logical rank; `what` they are is said in errors.

    `device`: x is a few numbers on the host, which travel through that device if the groups need one.
    """
    # Gathering over the head group, then the inner, then the outer ring gives the parts in logical order and
    # needs no communicator beyond those of the attention.
    parts = x.unsqueeze(0)
    for name in ("head", "inner", "outer"):
        handle = groups.handle(name)
        if handle.process_group is not None:
            if device is not None and "gloo" not in dist.get_backend_config(handle.process_group):
                parts = parts.to(device)
            received = [torch.empty_like(parts) for _ in range(handle.size)]
            with collective(f"gathering {what}", f"{name} group", handle.global_ranks):
                dist.all_gather([received[i] for i in handle.order], parts, group=handle.process_group)
            parts = torch.cat(received)
    return parts
