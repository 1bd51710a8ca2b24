"""Ranks that call attention with other arguments are told so, all of them alike, before anything is sent."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_loong import LoongConfig, attention_2d, build_groups, shard_sequence
from megatron_loong.attention import agreement
from tests.multi_rank.cases import random_inputs
from tests.multi_rank.pool import WorkerPool

CONFIG = LoongConfig(8, 2, 2)
SEQ_LEN = 64

#: What rank 2 does otherwise than the others: arguments, by whether it is rank 2; and what everyone is told.
DIFFERENT: dict[str, Callable[[bool], dict[str, Any]]] = {
    "causal is True on ranks 0, 1, 3, 4, 5, 6, 7 and False on rank 2": lambda odd: {"causal": not odd},
    "softmax_scale is 0.25 on ranks 0, .* and 0.5 on rank 2": lambda odd: {"softmax_scale": 0.5 if odd else 0.25},
    "window_size is None on .* and [4, 0] on rank 2": lambda odd: {"window_size": (4, 0) if odd else None},
    "softcap is 0.0 on .* and 3.0 on rank 2": lambda odd: {"softcap": 3.0 * odd},
    "kernel is auto on .* and reference on rank 2": lambda odd: {"kernel": "reference" if odd else "auto"},
    "cu_seqlens is [0, 24, 64] on .* and [0, 32, 64] on rank 2": lambda odd: {"cu_seqlens": [0, 24 + 8 * odd, 64]},
    "seq_len is 64 on .* and None on rank 2": lambda odd: {"seq_len": None if odd else 64},
    "dropout_p is 0.1 on .* and 0.2 on rank 2": lambda odd: {"dropout_p": 0.1 + 0.1 * odd, "dropout_seed": 1},
    "dropout_seed is 1 on .* and 2 on rank 2": lambda odd: {"dropout_p": 0.1, "dropout_seed": 1 + odd},
    "deterministic is False on .* and True on rank 2": lambda odd: {"deterministic": odd},
    "gradient_wire is auto on .* and input on rank 2": lambda odd: {"gradient_wire": "input" if odd else "auto"},
    "softmax_offset is None on .* and given on rank 2": lambda odd: {"softmax_offset": torch.zeros(4) if odd else None},
    "k.dtype is torch.float64 on .* and torch.float32 on rank 2": lambda odd: {"dtype": torch.float32} if odd else {},
    # Rank 2 alone is wrong, and finds that out before it talks to anyone.
    "softmax_scale is 0.25 on .* and -1.0 on rank 2; the fault found is none on": (
        lambda odd: {"softmax_scale": -1.0 if odd else 0.25}
    ),
    "the fault found is none on .* and max_logits must be a tensor": (
        lambda odd: {"max_logits": 4 if odd else torch.zeros(4)}
    ),
    r"shape of q but its length is [1, 4, 8] on .* and [2, 4, 8] on rank 2": lambda odd: {"batch": 1 + odd},
}


def told(rank: int, number: int) -> str:
    """What this rank is told."""
    groups = build_groups(CONFIG, range(8))
    different = list(DIFFERENT.values())[number]
    try:
        options = {"seq_len": SEQ_LEN, **different(rank == 2)}
        inputs = random_inputs(options.pop("batch", 1), SEQ_LEN, 4, 4, 8, options.pop("dtype", torch.float64))
        q, k, v, _ = (shard_sequence(x, groups, cu_seqlens=options.get("cu_seqlens")) for x in inputs)
        attention_2d(q, k, v, groups, **options)
    except ValueError as error:
        return str(error)
    finally:
        groups.destroy()
    return "no error"


@pytest.mark.parametrize("message", DIFFERENT, ids=lambda message: message.split(" is ")[0])
def test_ranks_that_disagree_are_told_the_argument_and_who_gave_what(pool: WorkerPool, message: str) -> None:
    (answer,) = set(pool.run(told, list(DIFFERENT).index(message)))
    assert answer.startswith("the ranks of the context-parallel group [0, 1, 2, 3, 4, 5, 6, 7] disagree"), answer
    first, _, last = message.partition(".*")
    assert first in answer and last in answer, answer


def counted(rank: int, always: bool) -> Any:
    """Exchanges of calls that differ in what may change, and of a second kind; then a disagreement in a known kind."""
    with mock.patch.dict(os.environ, {"LOONG_CHECK": str(int(always))}):
        groups = build_groups(CONFIG, range(8))
    exchanges, gathered = [], agreement.gathered

    def counting(*args: Any, **kwargs: Any) -> Any:
        exchanges.append(1)
        return gathered(*args, **kwargs)

    def call(cut: int, seed: int, tokens: int, **options: Any) -> int:
        documents = [0, cut, tokens]
        inputs = random_inputs(1, tokens, 4, 4, 8, torch.float32)
        q, k, v, dout = (shard_sequence(x, groups, cu_seqlens=documents) for x in inputs)
        options |= {"cu_seqlens": documents, "seq_len": tokens, "dropout_p": 0.1, "dropout_seed": seed}
        out = attention_2d(q.requires_grad_(), k, v, groups, **options)
        torch.autograd.grad(out, q, dout)
        return len(exchanges)

    with mock.patch.object(agreement, "gathered", counting):
        counts = [call(8, 1, 64), call(9, 2, 64), call(30, 3, 80), call(8, 1, 64, causal=False), call(8, 1, 64)]
        if always:
            with pytest.raises(ValueError, match="dropout_seed is 5 on ranks .* and 6 on rank 2"):
                call(8, 6 if rank == 2 else 5, 64)
    groups.destroy()
    return counts


def test_what_changes_step_by_step_is_compared_once_for_each_kind_of_call(pool: WorkerPool) -> None:
    assert all(counts == [1, 1, 1, 2, 2] for counts in pool.run(counted, False))


def test_every_call_is_compared_where_that_is_asked_for(pool: WorkerPool) -> None:
    """LOONG_CHECK=1."""
    assert all(counts == [1, 2, 3, 4, 5] for counts in pool.run(counted, True))


def one_token_more(rank: int) -> str:
    groups = build_groups(CONFIG, range(8))
    q = torch.zeros(1, 8 + (rank == 5), 4, 8)
    try:
        attention_2d(q, q, q, groups, seq_len=SEQ_LEN)
    except ValueError as error:
        return str(error)
    finally:
        groups.destroy()
    return "no error"


def test_a_length_that_one_rank_alone_has_wrong_is_everybodys_error(pool: WorkerPool) -> None:
    (answer,) = set(pool.run(one_token_more))
    assert answer.startswith("q of logical rank 5 has 9 tokens; of 64 tokens in this layout it holds 8"), answer
