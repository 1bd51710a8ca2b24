"""Where each token lives. The only file that knows what zigzag is; everything else reads `token_positions`.

Zigzag (LoongTrain section 4.3; the causal balance of Megatron's own CP): the sequence is cut into 2*cp_size
chunks and logical rank l = ring_rank * head_parallel_size + head holds chunks l and 2*cp_size-1-l:

    cp_size 4, chunk | 0 1 2 3 4 5 6 7        ring_size 2, after the all-to-all over heads (hp 2):
    logical rank     | 0 1 2 3 3 2 1 0        ring rank 0: chunks 0 1 | 6 7     ring rank 1: chunks 2 3 | 4 5
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_loong.config import LoongConfig
from megatron_loong.topology.groups import LoongGroups
from megatron_loong.topology.layout import coordinates_of, logical_rank_of

Run = tuple[int, int]
"""A contiguous run of the global sequence, [start, stop)."""


def chunks_of_logical_rank(config: LoongConfig, logical_rank: int) -> list[int]:
    """Chunks that a logical rank holds, in local order; there are cp_size * chunks_per_rank chunks in all.

    >>> chunks_of_logical_rank(LoongConfig(4, 2), 1)
    [1, 6]
    """
    if config.sequence_layout == "contiguous":
        return [logical_rank]
    return [logical_rank, 2 * config.context_parallel_size - 1 - logical_rank]


def head_group_chunk_order(config: LoongConfig, ring_rank: int) -> list[tuple[int, int]]:
    """(head, local chunk) of each chunk that a head group holds together, in the order of the global sequence.

    >>> head_group_chunk_order(LoongConfig(4, 2), ring_rank=0)
    [(0, 0), (1, 0), (1, 1), (0, 1)]
    """
    hp = config.head_parallel_size
    held = [
        (chunk, head, place)
        for head in range(hp)
        for place, chunk in enumerate(chunks_of_logical_rank(config, ring_rank * hp + head))
    ]
    return [(head, place) for _, head, place in sorted(held)]


def ring_runs(config: LoongConfig, ring_rank: int, seq_len: int) -> list[Run]:
    """The contiguous runs of the sequence that a ring rank holds after the all-to-all, ascending.

    >>> ring_runs(LoongConfig(4, 2), ring_rank=1, seq_len=16)
    [(4, 8), (8, 12)]
    """
    # A head group holds the chunks that its ring rank would hold were the ring the whole cp group.
    ring = LoongConfig(config.ring_size, sequence_layout=config.sequence_layout)
    length = _chunk_length(ring, seq_len)
    return [(chunk * length, (chunk + 1) * length) for chunk in chunks_of_logical_rank(ring, ring_rank)]


def token_positions(
    config: LoongConfig, cp_rank: int, seq_len: int, *, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """Global indices of the tokens of `cp_rank`, in local order: int64 [seq_len / cp_size] on the CPU.

    The one source for batch slices, position ids, rotary embedding, labels and loss mask. `seq_len` is the global
    length S. Raises `ValueError` when S is not a multiple of `config.sequence_multiple` or the rank is outside.

    >>> token_positions(LoongConfig(4, 2), cp_rank=1, seq_len=16).tolist()
    [2, 3, 12, 13]
    """
    _refuse_packed(cu_seqlens)
    length = _chunk_length(config, seq_len)
    logical_rank = logical_rank_of(config, coordinates_of(config, cp_rank))
    return torch.cat(
        [torch.arange(chunk * length, (chunk + 1) * length) for chunk in chunks_of_logical_rank(config, logical_rank)]
    )


def shard_sequence(
    x: torch.Tensor, groups: LoongGroups, dim: int = 1, *, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """This rank's tokens of a full tensor: [..., S, ...] -> [..., S / cp_size, ...] along `dim`.

    Local and differentiable. Raises `ValueError` when S is not a multiple of `config.sequence_multiple`.
    """
    _refuse_packed(cu_seqlens)
    config = groups.config
    groups.require_cp_rank()
    length = _chunk_length(config, x.shape[dim])
    chunks = chunks_of_logical_rank(config, groups.logical_rank)
    return torch.cat([x.narrow(dim, chunk * length, length) for chunk in chunks], dim)


def unshard_sequence(
    x_local: torch.Tensor, groups: LoongGroups, dim: int = 1, *, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """The inverse of `shard_sequence`: gathers [..., S / cp_size, ...] to [..., S, ...] on every rank.

    Collective over the context-parallel group; not differentiable (the result is detached). Raises `ValueError`
    when the local length is not a multiple of the chunks per rank.
    """
    _refuse_packed(cu_seqlens)
    config = groups.config
    groups.require_cp_rank()
    dim = dim % x_local.dim()
    _chunk_length(config, x_local.shape[dim] * config.context_parallel_size)
    # Gathering over the head group, then the inner, then the outer ring gives the parts in logical order and
    # needs no communicator beyond those of the attention.
    parts = x_local.detach().contiguous().unsqueeze(0)
    for name in ("head", "inner", "outer"):
        handle = groups.handle(name)
        if handle.process_group is not None:
            received = [torch.empty_like(parts) for _ in range(handle.size)]
            dist.all_gather(received, parts, group=handle.process_group)
            parts = torch.cat([received[slot] for slot in handle.slots])
    pieces: dict[int, torch.Tensor] = {}
    for logical_rank, part in enumerate(parts.unbind(0)):
        chunks = chunks_of_logical_rank(config, logical_rank)
        pieces.update(zip(chunks, part.chunk(len(chunks), dim), strict=True))
    return torch.cat([pieces[chunk] for chunk in sorted(pieces)], dim)


def _chunk_length(config: LoongConfig, seq_len: int) -> int:
    multiple = config.sequence_multiple
    if seq_len < multiple or seq_len % multiple:
        nearest = max(1, round(seq_len / multiple)) * multiple
        chunks = f"{config.chunks_per_rank} * " if config.chunks_per_rank > 1 else ""
        raise ValueError(
            f"sequence length {seq_len} is not a multiple of {chunks}context_parallel_size = {multiple} "
            f"({config.sequence_layout} layout); the nearest that is: {nearest}"
        )
    return seq_len // multiple


def _refuse_packed(cu_seqlens: torch.Tensor | None) -> None:
    if cu_seqlens is not None:
        raise NotImplementedError(
            "cu_seqlens: packed (thd) sequences are not supported yet; "
            "use one document per sequence with qkv_format='bshd' or 'sbhd'"
        )
