"""The all-to-all that trades a share of the sequence for a share of the heads (DeepSpeed-Ulysses; LoongTrain 4.2).

    shares of the sequence [s of the rank, b, h, d]  <->  shares of the heads [s of the ring rank, b, heads of it, d]

All tensors of one exchange travel in one message per peer. A row of the message is everything that one token has for
that peer. One pass over memory packs the messages, and another puts what arrives in the order of the sequence
(`kernels.row_ops`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_loong.comm.all_to_all import all_to_all
from megatron_loong.comm.groups import GroupHandle
from megatron_loong.comm.transport import Pending
from megatron_loong.kernels.common import on_device
from megatron_loong.kernels.row_ops import copy_rows_
from megatron_loong.layout.sharding import places_of
from megatron_loong.layout.tokens import TokenLayout, joined, starts_of

Shares = tuple[range, ...]
"""By head coordinate: the heads that it takes of one tensor."""


@dataclass(frozen=True, eq=False)
class HeadExchange:
    """The exchange of one head group, for one layout of the tokens."""

    handle: GroupHandle
    layout: TokenLayout
    ring_rank: int

    def split(
        self,
        tensors: Sequence[torch.Tensor],
        shares: Sequence[Shares],
        what: str,
        into: Sequence[torch.Tensor | None] | None = None,
    ) -> Pending[list[torch.Tensor]]:
        """Begin the exchange of shares of the sequence for shares of the heads; returns what waits for the results.

        Each [s, b, heads, d] becomes [s_ring, b, heads of this rank, d]. One dtype for all; the result is in the order
        of `TokenLayout.ring_runs`. `into` gives contiguous tensors to write results to; without one, and without a
        head group, a tensor is returned as it is.
        """
        into = into or [None] * len(tensors)
        if self.handle.size == 1:
            results = [x if out is None else out.copy_(x) for x, out in zip(tensors, into, strict=True)]
            return lambda: results
        tokens, me, row = self._tokens, self.handle.rank, _row_of(tensors, shares)
        # This rank sends each peer its own tokens with the peer's heads, and receives the peer's tokens with its own.
        given, lengths = [tokens[me] * width for width in row.widths], [n * row.widths[me] for n in tokens]
        send = tensors[0].new_empty(sum(given))
        copy_rows_(
            [
                pair
                for index, (x, heads) in enumerate(zip(tensors, shares, strict=True))
                for pair in _given_out(x, heads, send, row, index)
            ]
        )
        pending = all_to_all(send, given, lengths, self.handle, what)
        order = _order(self.layout, self.ring_rank, send.device)
        # `finish` must not refer to the tensors: they are packed, and the caller may free them while messages travel.
        forms = [(x.shape, x.dtype) for x in tensors]

        def finish() -> list[torch.Tensor]:
            parts = row.columns_of(pending().view(sum(tokens), row.widths[me]), me)
            results = [
                part.new_empty(sum(tokens), shape[1], len(heads[me]), shape[3], dtype=dtype) if out is None else out
                for part, (shape, dtype), heads, out in zip(parts, forms, shares, into, strict=True)
            ]
            copy_rows_([(x.view(part.shape), part) for x, part in zip(results, parts, strict=True)], source_rows=order)
            return results

        return finish

    def join(
        self,
        tensors: list[torch.Tensor],
        shares: Sequence[Shares],
        what: str,
        into: Sequence[torch.Tensor] | None = None,
    ) -> Pending[list[torch.Tensor]]:
        """Begin the inverse of `split`: each [s_ring, b, heads of this rank, d] becomes [s, b, heads, d].

        The list `tensors` is emptied, so that their memory can be freed as soon as they are packed. Where several ranks
        have results for one head, they are summed in float32 or wider and rounded once. `into` gives tensors of all
        heads, of which `shares` are written; no head may then be in two shares.
        """
        if self.handle.size == 1:
            results = tensors.copy()
            tensors.clear()
            return lambda: results
        tokens, me, row = self._tokens, self.handle.rank, _row_of(tensors, shares)
        given, lengths = [n * row.widths[me] for n in tokens], [tokens[me] * width for width in row.widths]
        send = tensors[0].new_empty(sum(given))
        parts = row.columns_of(send.view(sum(tokens), row.widths[me]), me)
        order = _order(self.layout, self.ring_rank, send.device)
        copy_rows_([(part, x.reshape(part.shape)) for x, part in zip(tensors, parts, strict=True)], target_rows=order)
        forms = [(x.shape, x.dtype) for x in tensors]
        tensors.clear()
        pending = all_to_all(send, given, lengths, self.handle, what)

        def finish() -> list[torch.Tensor]:
            # Into a tensor of all heads goes one part of the heads after another, so nothing may be summed there: with
            # parts every KV head has one reader (`HeadShares.most_parts`).
            received = pending()
            results = []
            for index, ((shape, dtype), heads) in enumerate(zip(forms, shares, strict=True)):
                if into is None:
                    results.append(_put_together(shape, dtype, heads, received, row, index, tokens[me]))
                    continue
                for share, view in zip(heads, _views(shape, heads, received, row, index, tokens[me]), strict=True):
                    into[index][:, :, share.start : share.stop].copy_(view)
                results.append(into[index])
            return results

        return finish

    @property
    def _tokens(self) -> tuple[int, ...]:
        """Tokens of each rank of the head group."""
        first = self.ring_rank * self.handle.size
        return self.layout.rank_tokens[first : first + self.handle.size]


class _Row(NamedTuple):
    """How one token's elements lie in a message."""

    starts: tuple[tuple[int, ...], ...]
    """By peer: where in its row each tensor begins, and where the last one ends."""
    widths: tuple[int, ...]
    """By peer: length of its row."""
    alike: tuple[bool, ...]
    """By tensor: whether all peers get equally many heads, in order, in rows of one form. One copy then serves all."""

    def columns_of(self, rows: torch.Tensor, peer: int) -> list[torch.Tensor]:
        """Each tensor's columns in rows for `peer`."""
        return [rows[:, a:b] for a, b in itertools.pairwise(self.starts[peer])]


def _row_of(tensors: Sequence[torch.Tensor], shares: Sequence[Shares]) -> _Row:
    """Of tensors [s, b, heads, d]."""
    return _row(tuple(x.shape[1] * x.shape[3] for x in tensors), tuple(shares))


@functools.lru_cache(maxsize=256)
def _row(head_sizes: tuple[int, ...], shares: tuple[Shares, ...]) -> _Row:
    """head_sizes: elements that one token has of a head of each tensor."""
    # Where q, k and v have the same shares for every peer, a token's row is alike for all, and one strided copy packs a
    # tensor for all peers. Uneven heads, or a KV head that goes to two peers, take a copy for each peer.
    peers = zip(*shares, strict=True)
    starts = [
        tuple(starts_of(n * len(heads) for n, heads in zip(head_sizes, of_peer, strict=True))) for of_peer in peers
    ]
    one_form = len(set(starts)) == 1
    alike = tuple(one_form and _in_order_and_equal(x) for x in shares)
    return _Row(tuple(starts), tuple(x[-1] for x in starts), alike)


def _in_order_and_equal(shares: Shares) -> bool:
    """Whether the shares are equal pieces of all the heads, in order."""
    size = len(shares[0])
    return all(x == range(i * size, (i + 1) * size) for i, x in enumerate(shares))


def _views(
    shape: torch.Size, shares: Shares, buffer: torch.Tensor, row: _Row, index: int, tokens: int
) -> list[torch.Tensor]:
    """By peer: the view [tokens, b, heads, d] of what tensor `index` has in a buffer of rows."""
    views = []
    pieces = buffer.split([tokens * n for n in row.widths])
    for heads, starts, width, piece in zip(shares, row.starts, row.widths, pieces, strict=True):
        part = piece.view(tokens, width)[:, starts[index] : starts[index + 1]]
        views.append(part.unflatten(1, (shape[1], len(heads), shape[3])))
    return views


def _one_view(
    shape: torch.Size, shares: Shares, buffer: torch.Tensor, row: _Row, index: int, tokens: int
) -> torch.Tensor:
    """As `_views` for equal shares, in one: [tokens, b, peer, heads of a peer, d]."""
    start, stop = row.starts[0][index : index + 2]
    rows = buffer.view(len(shares), tokens, row.widths[0])[:, :, start:stop]
    return rows.unflatten(2, (shape[1], len(shares[0]), shape[3])).permute(1, 2, 0, 3, 4)


def _given_out(
    x: torch.Tensor, shares: Shares, buffer: torch.Tensor, row: _Row, index: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Where each peer's heads of x go in a buffer of rows, and the heads."""
    if row.alike[index]:
        view = _one_view(x.shape, shares, buffer, row, index, x.shape[0])
        return [(view, x.unflatten(2, (len(shares), len(shares[0]))))]
    views = _views(x.shape, shares, buffer, row, index, x.shape[0])
    return [(view, x[:, :, heads.start : heads.stop]) for heads, view in zip(shares, views, strict=True)]


def _put_together(
    shape: torch.Size,
    dtype: torch.dtype,
    shares: Shares,
    buffer: torch.Tensor,
    row: _Row,
    index: int,
    tokens: int,
) -> torch.Tensor:
    if row.alike[index]:
        return _one_view(shape, shares, buffer, row, index, tokens).flatten(2, 3)
    # Unequal shares, or heads in several of them: a KV head that two ranks read has a gradient from each.
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.zeros(tokens, shape[1], shares[-1].stop, shape[3], dtype=wide, device=buffer.device)
    for heads, view in zip(shares, _views(shape, shares, buffer, row, index, tokens), strict=True):
        total[:, :, heads.start : heads.stop] += view
    return total.to(dtype)


@functools.lru_cache(maxsize=64)
def _order(layout: TokenLayout, ring_rank: int, device: torch.device) -> torch.Tensor | None:
    """int64 [s_ring]: rows of the exchange buffer (rank after rank) in the order of the sequence; None: as they are."""
    # The buffer holds the runs of the head group rank after rank: in zigzag with two ranks, chunks 0 3 | 1 2. The
    # sequence wants chunks 0 1 2 3, so `order` takes each run's rows from where its rank's part of the buffer has them.
    hp = layout.head_parallel_size
    rank_runs = [layout.rank_runs[ring_rank * hp + head] for head in range(hp)]
    first_row = starts_of(sum(b - a for a, b in runs) for runs in rank_runs)
    run_row = [starts_of(b - a for a, b in runs) for runs in rank_runs]
    order = []
    for head, index in layout.ring_order[ring_rank]:
        start, stop = rank_runs[head][index]
        row = first_row[head] + run_row[head][index]
        order.append((row, row + stop - start))
    order = joined(order)
    if len(order) < 2 and all(start == 0 for start, _ in order):
        return None
    return on_device(places_of(order), device)
