"""Sequences cut over the ranks of a context-parallel group, and gathered again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_loong.comm.errors import collective
from megatron_loong.comm.groups import LoongGroups, checked_groups
from megatron_loong.layout.sharding import Boundaries, checked_whole, layout_of, places_of
from megatron_loong.layout.tokens import starts_of


def _checked(x: object, groups: LoongGroups, dim: int) -> int:
    """`dim` from the front; `ValueError` unless x is a tensor that has it, and groups are groups."""
    checked_groups(groups)
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"x (the tensor to share out or to gather) must be a tensor; got a {type(x).__name__}")
    if not -x.dim() <= checked_whole("dim", dim, "that of the tokens") < x.dim():
        raise ValueError(f"dim={dim} is outside the {x.dim()} dimensions of a tensor of shape {list(x.shape)}")
    return dim % x.dim()


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
