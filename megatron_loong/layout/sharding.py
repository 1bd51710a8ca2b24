"""Which tokens each rank holds. Everything that depends on where a token is reads `token_positions`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from megatron_loong.config import LoongConfig
from megatron_loong.layout.packing import (
    checked_boundaries,
    packed_layout,
    padded_layout,
    paired_layouts,
    without_empty,
)
from megatron_loong.layout.ranks import coordinates_of, logical_rank_of
from megatron_loong.layout.tokens import Run, TokenLayout, rows_layout, zigzag_or_contiguous

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
    `layout.packing` deals them. Raises `ValueError` for a length below 1 and as `documents_of`.
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
    return cu_seqlens if is_row and all(hasattr(x, "__len__") and getattr(x, "ndim", 1) for x in cu_seqlens) else None


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
    # Self-attention must get one object, not two equal ones: callers see by `is` that q, k and v may go through in one
    # message.
    kv_seq_len = seq_len if kv_seq_len is None else kv_seq_len
    if cu_seqlens_kv is None and (kv_seq_len == seq_len or cu_seqlens is None):
        layout = layout_of(config, seq_len, cu_seqlens)
        return layout, layout if kv_seq_len == seq_len else layout_of(config, kv_seq_len)
    if cu_seqlens_kv is None:
        raise ValueError(
            f"kv_seq_len={kv_seq_len} with seq_len={seq_len} and cu_seqlens: give cu_seqlens_kv, the boundaries of the "
            "keys of the same documents"
        )
    if _two_rows(cu_seqlens) is not None:
        raise NotImplementedError(
            "cu_seqlens of two rows (documents with padding) does not work with cu_seqlens_kv; supported: one row, in "
            "which padding is a document of its own that has no keys"
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
    # The rows of a batch as one sequence: every row begins a document, whatever the mask says of its first token.
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
