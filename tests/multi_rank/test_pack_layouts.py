"""Packs as Megatron and the trainers on it cut them: exact for every mask and layout, and gathered with gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from megatron_loong import LoongConfig, attention_2d, build_groups, shard_sequence, unshard_sequence
from megatron_loong.config import PACK_LAYOUTS
from tests.dense import dense_with_gradients, document_mask
from tests.integration.foreign_cuts import PROGRAMS
from tests.multi_rank import mask_cases
from tests.multi_rank.cases import random_inputs
from tests.multi_rank.mask_cases import Case
from tests.multi_rank.pool import WorkerPool

#: Documents of 16, 8, 32 and 24 tokens, of which 13, 8, 31 and 1 are real: multiples of 2 x cp, for a cp of 4.
DOCUMENTS, LENGTHS = (0, 16, 24, 56, 80), (0, 13, 21, 52, 53)
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": (5, 0)},
    "causal-padded": {"lengths": LENGTHS},
    "full-padded": {"causal": False, "lengths": LENGTHS},
    "window-padded": {"window": (5, 0), "lengths": LENGTHS},
}
LAYOUTS = {
    "one rank": (1, 1, 1),
    "ring 4": (4, 1, 4),
    "double ring 2 x 2": (4, 1, 2),
    "head 2 x ring 2": (4, 2, 2),
    "head 4": (4, 4, 1),
}


def run_masks(rank: int, pack_layout: str, layout: tuple[int, int, int]) -> int:
    config = LoongConfig(*layout, pack_layout=pack_layout)
    heads = {"heads": 4, "kv_heads": 2, "qkv_format": "thd"}
    return sum(
        mask_cases.run_case(rank, Case(config, DOCUMENTS, packed=True, **heads, **mask)) for mask in MASKS.values()
    )


@pytest.mark.multi_rank
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pack_layout", PACK_LAYOUTS)
def test_every_mask_matches_one_device(pool: WorkerPool, pack_layout: str, layout: str) -> None:
    """float64: out, dq, dk, dv of every mask of `MASKS` within 1e-12."""
    cp = LAYOUTS[layout][0]
    assert pool.run(run_masks, pack_layout, LAYOUTS[layout])[:cp] == [4 * len(MASKS)] * cp


def gathered_log_probs(rank: int, config: LoongConfig) -> None:
    """A loss of per-token results, on every rank of the whole pack, as PPO and GRPO compute it."""
    groups = build_groups(config, range(config.context_parallel_size))
    if groups.cp_rank is None:
        return
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, DOCUMENTS[-1], 11, generator=generator, dtype=torch.float64)
    weights = torch.randn(1, DOCUMENTS[-1], generator=generator, dtype=torch.float64)

    def loss_of(log_probs: torch.Tensor) -> torch.Tensor:
        # Not a sum of the tokens' own losses: means over documents, of which a rank holds parts.
        means = [(weights * log_probs)[:, a:b].mean() for a, b in itertools.pairwise(DOCUMENTS)]
        return torch.stack(means).square().sum()

    whole = logits.clone().requires_grad_()
    expected = loss_of(whole.log_softmax(-1)[..., 0])
    (gradient,) = torch.autograd.grad(expected, whole)
    mine = shard_sequence(logits, groups, cu_seqlens=DOCUMENTS).requires_grad_()
    loss = loss_of(unshard_sequence(mine.log_softmax(-1)[..., 0], groups, cu_seqlens=DOCUMENTS))
    assert abs(loss - expected) < 1e-14
    (found,) = torch.autograd.grad(loss, mine)
    error = (found - shard_sequence(gradient, groups, cu_seqlens=DOCUMENTS)).abs().max()
    assert error < 1e-14, f"gradient of the log-probs on rank {rank}: {error:.1e}"
    assert not unshard_sequence(mine.detach(), groups, cu_seqlens=DOCUMENTS).requires_grad
    groups.destroy()


@pytest.mark.multi_rank
@pytest.mark.parametrize("pack_layout", PACK_LAYOUTS)
def test_per_token_results_are_gathered_with_their_gradients(pool: WorkerPool, pack_layout: str) -> None:
    pool.run(gathered_log_probs, LoongConfig(4, 2, pack_layout=pack_layout))


# ---- what trainers on Megatron hand over ----

#: Tokens of documents; none is a multiple of 2 x cp.
REAL = (13, 7, 31, 1, 18)


def run_program(rank: int, program: str, config: LoongConfig, arguments: dict[str, Any]) -> int:
    """Attention of what a program cut against dense attention over its documents without padding."""
    groups = build_groups(config, range(config.context_parallel_size))
    if groups.cp_rank is None:
        return 0
    inputs = random_inputs(1, sum(REAL), 4, 2, 8, torch.float64)
    documents = (0, *itertools.accumulate(REAL))
    expected = dense_with_gradients(*inputs, allowed=document_mask(documents, documents, (-1, 0)))

    def cut(x: torch.Tensor) -> torch.Tensor:
        return PROGRAMS[program](x[0].split(REAL), config.context_parallel_size, rank)[0]

    q, k, v, dout = map(cut, inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention_2d(*leaves, groups, qkv_format="thd", **arguments)
    found = [out, *torch.autograd.grad(out, leaves, dout)]
    is_real = cut(torch.ones(1, sum(REAL), 1, 1, dtype=torch.bool))
    for name, x in zip(("out", "dq", "dk", "dv"), found, strict=True):
        error = ((x - cut(expected[name])) * is_real).abs().max()
        assert error <= 1e-12, f"{name} of {program} on rank {rank}: {error:.1e}"
    groups.destroy()
    return len(found)


@pytest.mark.multi_rank
@pytest.mark.parametrize("layout", ["double ring 2 x 2", "head 2 x ring 2"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_batches_of_trainers_are_taken_as_they_are(pool: WorkerPool, program: str, layout: str) -> None:
    """What each cuts and tells in PackedSeqParams, within 1e-12 of dense attention over the documents alone."""
    packed = pytest.importorskip("megatron_loong.integration.packed")
    from megatron.core.packed_seq_params import PackedSeqParams

    documents = torch.arange(sum(REAL)).split(REAL)
    local, told = PROGRAMS[program](documents, 4, 0)
    q = {name: torch.tensor(x).int() for name, x in told.items()}
    params = PackedSeqParams("thd", **q, **{name.replace("_q", "_kv"): x for name, x in q.items()})
    arguments = packed.packed_arguments(params, len(local), 4)
    config = LoongConfig(*LAYOUTS[layout], pack_layout="per_document")
    assert pool.run(run_program, program, config, arguments)[:4] == [4] * 4
