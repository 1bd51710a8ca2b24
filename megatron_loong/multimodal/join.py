"""Vision rows travel once, from the rank that encoded an image to the ranks that hold its tokens.

    images     0 1 2 3 4 5            dealt by cost             deal_images
    encoded    0 3 | 1 4 | 2 5        each on one rank
    rows          all-to-all          exactly those needed      join_tokens
    tokens     zigzag, packs, ...     as the text's             token_positions

Everything about who sends what follows from the deal, from where in the sequence the rows belong and from the layout,
all of which every rank knows alike: no sizes are exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_loong.comm.all_to_all import all_to_all
from megatron_loong.comm.groups import GroupHandle, LoongGroups, checked_groups
from megatron_loong.config import LoongConfig
from megatron_loong.layout.sharding import Boundaries, token_positions
from megatron_loong.multimodal.images import ImageDeal


def join_tokens(
    text: torch.Tensor,
    rows: torch.Tensor,
    vision: torch.Tensor,
    deal: ImageDeal,
    groups: LoongGroups,
    *,
    cu_seqlens: Boundaries | None = None,
    cp_group: dist.ProcessGroup | None = None,
    frozen: bool = False,
) -> torch.Tensor:
    """This rank's tokens of a sequence of text and images: `text` with the vision rows put in their places.

    Shapes: text [b, s, h], this rank's tokens (`shard_sequence`), with anything where an image's tokens stand; rows
    [n, h], what encoder and projector made of this rank's images (`deal.images_of`), one after the other, n =
    `deal.rows_of`; returns [b, s, h]. `vision` [b, S] is whole and the same on every rank: bool, True where a row
    belongs, which are filled in order as `masked_scatter` does; or int64, the row of each place among those of all
    images, -1 where there is text. With `cu_seqlens`, [1, S] is a pack of documents, as for `shard_sequence`.

    Differentiable in text and rows; the backward is the transposed exchange, so the gradient of a row is the whole
    one, on the rank that encoded it. Sums over the ranks of the parameters' gradients are then one rank's, as for any
    other parameter. Collective over `cp_group`, a process group of `groups.cp_global_ranks` (in Megatron the
    context-parallel group); the world if not given. Waits for the device if `vision` is on it.

    Ranks without an image take part with no rows. `frozen`: neither encoder nor projector is trained, on no rank; else
    every rank sends gradients back, whether or not its own rows need one. Where a reducer expects a gradient of every
    parameter, encode a blank image there and give its `rows[:0]`.

    Raises `ValueError` for shapes that do not fit and for rows that no image has, before anything is sent.
    """
    checked_groups(groups)
    cp_group = _checked_group(cp_group, groups)
    sources = _checked_sources(vision, deal)
    plan = exchange_plan(sources, deal, groups.config, groups.require_cp_rank(), cu_seqlens)
    if text.dim() != 3 or text.shape[0] != sources.shape[0] or text.shape[1] != plan.local_tokens:
        raise ValueError(
            f"text {list(text.shape)} must be [{sources.shape[0]}, {plan.local_tokens}, h], this rank's tokens of "
            f"vision {list(vision.shape)}"
        )
    expected = deal.rows_of(groups.require_cp_rank())
    if list(rows.shape) != [expected, text.shape[2]]:
        raise ValueError(
            f"rows {list(rows.shape)} must be [{expected}, {text.shape[2]}]: of images "
            f"{deal.images_of(groups.require_cp_rank())!r:.80}, which this rank encodes"
        )
    if frozen:
        rows = rows.detach()
    elif torch.is_grad_enabled() and not rows.requires_grad:
        # Else autograd skips the backward of this rank's exchange, and the others wait for it.
        rows = rows.detach().requires_grad_()
    send = rows.to(text.dtype).index_select(0, plan.send.to(rows.device))
    if groups.config.context_parallel_size > 1 and bool((sources >= 0).any()):
        handle = GroupHandle("images", groups.cp_global_ranks, groups.require_cp_rank(), cp_group)
        send = _Exchange.apply(send, plan, handle)  # type: ignore[assignment]
    return text.reshape(-1, text.shape[2]).index_copy(0, plan.places.to(text.device), send).view(text.shape)


@dataclass(frozen=True)
class ExchangePlan:
    """Which rows one rank sends to whom, and where it puts those that come. Tensors are int64 on the CPU."""

    send: torch.Tensor
    """Places among this rank's rows, of what goes to cp_rank 0, then to 1, and so on."""
    send_counts: tuple[int, ...]
    places: torch.Tensor
    """Places among this rank's b * s tokens, of what comes from cp_rank 0, then from 1, and so on."""
    receive_counts: tuple[int, ...]
    local_tokens: int
    """s."""


def exchange_plan(
    sources: torch.Tensor,
    deal: ImageDeal,
    config: LoongConfig,
    cp_rank: int,
    cu_seqlens: Boundaries | None = None,
) -> ExchangePlan:
    """The plan of `cp_rank`. `sources`: int64 [b, S] on the CPU, the row that belongs in each place, or below 0.

    A row that no token asks for (its sequence was cut short) is not sent; one that several ask for is sent for each.
    """
    counts = torch.tensor(deal.rows, dtype=torch.int64)
    encoder_of_row = torch.tensor(deal.encoders, dtype=torch.int64).repeat_interleave(counts)
    is_mine = encoder_of_row == cp_rank
    place_in_mine = is_mine.cumsum(0) - 1
    send, local_tokens = [], 0
    places = torch.arange(0)
    receive_counts: list[int] = []
    for rank in range(config.context_parallel_size):
        positions = token_positions(config, rank, sources.shape[1], cu_seqlens=cu_seqlens)
        wanted = sources.index_select(1, positions).flatten()
        if rank == cp_rank:
            (places,) = torch.where(wanted >= 0)
            encoders = encoder_of_row[wanted[places]]
            # By encoder, and in local order within each: the order in which every encoder packs what it sends.
            places = places[encoders.argsort(stable=True)]
            receive_counts = torch.bincount(encoders, minlength=config.context_parallel_size).tolist()
            local_tokens = len(positions)
        wanted = wanted[wanted >= 0]
        send.append(place_in_mine[wanted[is_mine[wanted]]])
    return ExchangePlan(torch.cat(send), tuple(map(len, send)), places, tuple(receive_counts), local_tokens)


class _Exchange(torch.autograd.Function):
    """[rows sent, h] -> [rows received, h]; the backward goes the way back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, plan: ExchangePlan, handle: GroupHandle) -> torch.Tensor:
        ctx.plan, ctx.handle = plan, handle
        return _exchanged(rows, plan.send_counts, plan.receive_counts, handle, "image embeddings")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        plan = ctx.plan
        what = "gradients of image embeddings"
        return _exchanged(gradients[0], plan.receive_counts, plan.send_counts, ctx.handle, what), None, None


def _exchanged(
    rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], handle: GroupHandle, what: str
) -> torch.Tensor:
    width = rows.shape[1]
    flat = rows.contiguous().flatten()
    wait = all_to_all(flat, [n * width for n in send], [n * width for n in receive], handle, what)
    return wait().view(-1, width)


def _checked_sources(vision: torch.Tensor, deal: ImageDeal) -> torch.Tensor:
    """The row of each place, int64 [b, S] on the CPU, below 0 where there is none."""
    total = sum(deal.rows)
    if vision.dim() != 2 or vision.dtype not in (torch.bool, torch.int64):
        raise ValueError(
            f"vision must be bool or int64 [b, S], for all ranks' tokens; got {vision.dtype} {list(vision.shape)}"
        )
    vision = vision.cpu()
    if vision.dtype == torch.int64:
        if vision.numel() and int(vision.max()) >= total:
            raise ValueError(f"vision names row {int(vision.max())}, but the images have {total} rows")
        return vision
    if int(vision.sum()) != total:
        raise ValueError(f"vision has {int(vision.sum())} places for image tokens, but the images have {total} rows")
    return torch.where(vision, vision.flatten().cumsum(0).view(vision.shape) - 1, -1)


def _checked_group(cp_group: dist.ProcessGroup | None, groups: LoongGroups) -> dist.ProcessGroup | None:
    if groups.config.context_parallel_size == 1:
        return None
    given = dist.group.WORLD if cp_group is None else cp_group
    assert given is not None  # there are groups, so there is a world
    members = dist.get_process_group_ranks(given)
    if set(members) != set(groups.cp_global_ranks):
        raise ValueError(
            f"the exchange of image embeddings needs a process group of ranks {list(groups.cp_global_ranks)}; "
            f"{'the world' if cp_group is None else 'cp_group'} has {members}: give cp_group="
            "torch.distributed.new_group(cp_global_ranks), or in Megatron the context-parallel group"
        )
    return given
