"""What one call of `attention_2d` comes to on this rank: arguments checked, layouts, kernel and parts chosen."""

from __future__ import annotations

import torch

from megatron_loong.attention.agreement import can_be_told, compare, is_known, kind_of
from megatron_loong.attention.checks import check_arguments, check_heads, check_latent, check_shapes, check_tensor
from megatron_loong.attention.heads import head_shares, latent_shares
from megatron_loong.attention.options import AttentionOptions, CallArguments
from megatron_loong.attention.plan import Call
from megatron_loong.comm.groups import LoongGroups, checked_groups
from megatron_loong.comm.sequence import gather_lengths
from megatron_loong.kernels.registry import choose_kernel
from megatron_loong.layout.sharding import layouts_of
from megatron_loong.layout.tokens import TokenLayout
from megatron_loong.schedule.parts import Queries, parts_of_heads

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""q, k and v."""


def prepare(
    qkv: Tensors, groups: LoongGroups, options: AttentionOptions, arguments: CallArguments
) -> tuple[Tensors, Call]:
    """q, k, v sequence first, and all else that the call needs. Errors are those of `attention_2d`."""
    # Drawn before the ranks compare their arguments: generators that differ are an error in the first call, and not
    # masks that differ from rank to rank.
    if options.dropout_p and arguments.dropout_seed is None:
        arguments = arguments._replace(dropout_seed=int(torch.randint(2**62, ())))
    qkv, held = _checked_on_all_ranks(qkv, groups, options, arguments)
    q, k, v = qkv
    check_shapes(q, k, v, groups, options.qkv_format, arguments)
    hp, packed = groups.config.head_parallel_size, arguments.cu_seqlens is not None
    if arguments.kv_up_weight is None:
        check_heads(q, k)
        shares, value_dim = head_shares(q.shape[2], k.shape[2], hp), v.shape[3]
        request = options.request(q, k, v, hp, packed=packed)
    else:
        value_dim = check_latent(q, k, v, arguments.kv_up_weight)
        shares = latent_shares(q.shape[2], hp)
        expanded = q[..., :1].expand(*q.shape[:3], value_dim)  # for its shape: the kernel sees one KV head per query
        request = options.request(q, q, expanded, hp, packed=packed)
    kernel = choose_kernel(request, options.kernel)
    layouts = _layouts(q, k, groups, arguments, held)
    rows = q.shape[1] * layouts[0].seq_len // layouts[0].ring_size * len(shares.query[0])
    queries = Queries(rows, max(q.shape[3], v.shape[3]) * q.dtype.itemsize, q.is_cuda, groups.nodes > 1)
    call = Call(
        groups=groups,
        options=options,
        layouts=layouts,
        kernel=kernel,
        shares=shares,
        value_dim=value_dim,
        rules=options.rules(q.shape[3], arguments.dropout_seed),
        max_logits=arguments.max_logits,
        head_parts=_head_parts(options.head_parts, hp, shares.most_parts, queries),
        wire_dtype=options.wire_dtype(q.dtype),
    )
    return qkv, call


def sequence_first(x: torch.Tensor, qkv_format: str) -> torch.Tensor:
    """[s, b, heads, d] of a tensor in a format; what has other dimensions stays, and is refused later."""
    if qkv_format == "thd" and x.dim() == 3:
        return x.unsqueeze(1)
    return x.transpose(0, 1) if qkv_format == "bshd" and x.dim() == 4 else x


def in_format(x: torch.Tensor, qkv_format: str) -> torch.Tensor:
    """The inverse of `sequence_first`."""
    return x.squeeze(1) if qkv_format == "thd" else x.transpose(0, 1) if qkv_format == "bshd" else x


def _checked_on_all_ranks(
    qkv: Tensors, groups: LoongGroups, options: AttentionOptions, arguments: CallArguments
) -> tuple[Tensors, list[list[int]] | None]:
    """q, k, v sequence first; and the tokens of q and k that each logical rank holds, where the ranks compared.

    `ValueError` for wrong types and where the ranks disagree. Options are checked in the first call of a kind only.
    """
    kind = kind_of(qkv, options, arguments)
    is_new, fault = not is_known(groups, kind), None
    try:
        check_arguments(arguments)
        if is_new:
            checked_groups(groups)
            for name, x in zip("qkv", qkv, strict=True):
                check_tensor(name, x)
            options.check()
    except ValueError as error:
        # The other ranks may be about to compare. Then this rank takes part, so that all of them raise and none waits.
        if not can_be_told(groups, qkv):
            raise
        fault = error
    q, k, v = (sequence_first(x, options.qkv_format) for x in qkv)
    held = compare(groups, kind, (q, k, v), options, arguments, fault) if is_new or fault else None
    return (q, k, v), held


def _head_parts(asked: int | None, head_parallel_size: int, most: int, queries: Queries) -> int:
    """Parts in which the heads go through: what was asked for, or by size. The same on every rank."""
    if asked is None:
        return parts_of_heads(most, queries) if head_parallel_size > 1 else 1
    if head_parallel_size == 1 and asked != 1:
        raise ValueError(f"head_parts={asked}, but head_parallel_size=1: there is no all-to-all to hide; leave it out")
    if asked < 1 or most % asked:
        raise ValueError(f"head_parts={asked} does not divide the {most} KV heads of a rank that can be parted")
    return asked


def _layouts(
    q: torch.Tensor,
    k: torch.Tensor,
    groups: LoongGroups,
    arguments: CallArguments,
    held: list[list[int]] | None,
) -> tuple[TokenLayout, TokenLayout]:
    """Layouts of queries and keys (the same object for self-attention), checked against what the ranks hold.

    held: tokens of q and k by logical rank, if the ranks compared; else this rank looks at its own.
    """
    config, seq_len, kv_seq_len = groups.config, arguments.seq_len, arguments.kv_seq_len
    mine = [q.shape[0], k.shape[0]]
    if config.context_parallel_size == 1:
        held = [mine]
        kv_seq_len = k.shape[0] if kv_seq_len is None else kv_seq_len
    elif seq_len is None and held is None:
        held = gather_lengths(mine, groups, q.device)
    if seq_len is None:
        assert held is not None
        seq_len, keys = (sum(side) for side in zip(*held, strict=True))
        kv_seq_len = keys if kv_seq_len is None else kv_seq_len
    # If the ranks compared, each of them knows all lengths and checks them all, so that all raise or none does. Else a
    # rank can look at its own alone.
    layouts = layouts_of(config, seq_len, arguments.cu_seqlens, kv_seq_len, arguments.cu_seqlens_kv)
    for rank, counts in enumerate(held) if held is not None else [(groups.logical_rank, mine)]:
        for name, count, layout in zip(("q", "k and v"), counts, layouts, strict=True):
            if count != (expected := layout.tokens_of(rank)):
                raise ValueError(
                    f"{name} of logical rank {rank} has {count} tokens; of {layout.seq_len} tokens in this layout it "
                    f"holds {expected} (see shard_sequence, token_positions)"
                )
    return layouts
