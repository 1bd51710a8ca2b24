"""Dynamic context parallelism: micro-batches that bring the ranks that share them.

Megatron's `--hybrid-context-parallel` gives each sequence as many ranks of DP x CP as its length needs, so that short
ones do not pay for the long ones (FlexSP, arXiv 2412.01523; ByteScale, arXiv 2502.21231 do the same):

    lengths -> Megatron's scheduler -> PackedSeqParams(local_cp_size, cp_group) -> the layout of 2D-Attention over them
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from megatron_loong.config import LoongConfig
from megatron_loong.integration.packed import layout_config
from megatron_loong.integration.runtime import Members, Runtime


class OneRank:
    """A context-parallel group of this process alone, as far as Megatron's rotary embedding asks.

    Megatron leaves `cp_group` at None where `local_cp_size` is 1, and its embedding then takes the static group.
    """

    def size(self) -> int:
        """1."""
        return 1

    def rank(self) -> int:
        """0."""
        return 0


def members_of(packed_seq_params: Any) -> Members | None:
    """The ranks that share a micro-batch with these `PackedSeqParams`; None: those of the layer, as ever.

    `ValueError` when `local_cp_size` and `cp_group` contradict each other.
    """
    size = getattr(packed_seq_params, "local_cp_size", None)
    group = getattr(packed_seq_params, "cp_group", None)
    if group is None and size is None:
        return None
    held = 1 if group is None else group.size()
    if size not in (None, held):
        raise ValueError(
            f"packed_seq_params.local_cp_size={size}, but packed_seq_params.cp_group "
            + ("is missing" if group is None else f"has {held} ranks")
            + "; give the group of the ranks that share this micro-batch"
        )
    if group is None or held == 1:
        return Members((dist.get_rank() if dist.is_initialized() else 0,), 0)
    return Members(tuple(dist.get_process_group_ranks(group)), group.rank())


@contextlib.contextmanager
def attending(state: Runtime, members: Members | None) -> Iterator[None]:
    """Inside, the rotary embedding finds the ranks of the micro-batch: Megatron hands it the layer's group."""
    before, state.members = state.members, members
    try:
        yield
    finally:
        state.members = before


def layout_and_rank(state: Runtime, cp_size: int, cp_rank: int) -> tuple[LoongConfig | None, int]:
    """The layout of the micro-batch whose attention runs now, and this rank's place in it.

    `cp_size` and `cp_rank` are those of the layer, which hold unless the micro-batch brings ranks of its own. The
    layout is None where attention is native.
    """
    members = state.members
    if members is None:
        return layout_config(state, cp_size), cp_rank
    return LoongConfig(1) if members.size == 1 else layout_config(state, members.size), members.rank
