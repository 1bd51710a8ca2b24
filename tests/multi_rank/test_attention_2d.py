"""attention_2d over gloo processes equals dense attention on one device."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from megatron_loong.config import AXES, LoongConfig, divisors
from tests.multi_rank import cases
from tests.multi_rank.pool import WorkerFailure, WorkerPool

PLACEMENTS = ["-".join(order) for order in itertools.permutations(AXES)]
SIZES = [(cp, hp, w) for cp in range(1, 9) for hp in divisors(cp) for w in divisors(cp // hp)]
#: With fewer than 8 ranks, every other placement runs by night.
LAYOUTS = [
    *(
        pytest.param(cp, hp, w, PLACEMENTS if cp == 8 else PLACEMENTS[::2], id=f"cp{cp}-hp{hp}-w{w}")
        for cp, hp, w in SIZES
    ),
    *(
        pytest.param(cp, hp, w, PLACEMENTS[1::2], id=f"cp{cp}-hp{hp}-w{w}-more", marks=pytest.mark.nightly)
        for cp, hp, w in SIZES
        if cp < 8
    ),
]


@pytest.mark.parametrize(("cp", "hp", "w", "placements"), LAYOUTS)
def test_attention_2d_matches_one_device(pool: WorkerPool, cp: int, hp: int, w: int, placements: list[str]) -> None:
    """float64: out, dq, dk, dv within 1e-12; all placements, causal and full, g in {1, 2, h}, hp above g too."""
    heads = 8 if 8 % hp == 0 else 2 * hp
    compared = pool.run(cases.float64_layout, cp, hp, w, placements, heads, ["bshd", "sbhd"])
    assert all(n >= 2 * 2 * len(placements) for n in compared[:cp])


def test_more_head_ranks_than_divide_the_kv_heads(pool: WorkerPool) -> None:
    """6 KV heads over 4 head ranks: neither divides the other."""
    pool.run(cases.replicated_kv_heads)


@pytest.mark.parametrize(
    "config", [LoongConfig(8, 2, 2, least_rows_to_cut=4), LoongConfig(8, 2, 4, "context_first")], ids=str
)
def test_heads_in_parts(pool: WorkerPool, config: LoongConfig) -> None:
    """The all-to-all under the ring: the same numbers and the same bytes."""
    for whole, *parted in pool.run(cases.heads_in_parts, config):
        assert all(sent == whole for sent in parted)


@pytest.mark.parametrize("kv_heads", [4, 8], ids=["keys move", "queries move"])
@pytest.mark.parametrize("wire", ["float32", "input"])
def test_either_wire_of_gradients_keeps_the_error_bound(pool: WorkerPool, wire: str, kv_heads: int) -> None:
    """What travels in bfloat16 is summed in float32: 2.5x the one-device kernel's error, as below."""
    config = LoongConfig(8, 1, 2, least_rows_to_cut=4)
    for ratios in pool.run(cases.rms_error_ratios, config, torch.bfloat16, False, wire, kv_heads):
        assert max(ratios.values()) <= 2.5, ratios


@pytest.mark.parametrize("reference", [False, True], ids=["auto", "reference"])
def test_every_dtype_and_unequal_value_width(pool: WorkerPool, reference: bool) -> None:
    pool.run(cases.dtypes_and_value_width, "reference" if reference else "auto")


@pytest.mark.parametrize("cp_global_ranks", [[5, 2, 7, 0], [3, 1, 2, 0]], ids=str)
def test_ranks_of_a_group_in_any_order(pool: WorkerPool, cp_global_ranks: list[int]) -> None:
    pool.run(cases.scattered_ranks, cp_global_ranks)


def test_two_groups_at_the_same_time(pool: WorkerPool) -> None:
    pool.run(cases.two_cp_groups)


BF16_LAYOUTS = [(8, 1, 8), (8, 1, 2), (8, 2, 2), (8, 8, 1)]


@pytest.mark.parametrize(("cp", "hp", "w"), BF16_LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rms_error_is_that_of_the_one_device_kernel(
    pool: WorkerPool, dtype: torch.dtype, cp: int, hp: int, w: int
) -> None:
    """RMS error against float64 at most 2.5x that of the same kernel on one device."""
    for ratios in pool.run(cases.rms_error_ratios, LoongConfig(cp, hp, w), dtype, False):
        worst = max(ratios, key=lambda name: ratios[name])
        assert ratios[worst] <= 2.5, f"{worst}: RMS error {ratios[worst]:.2f}x the one-device kernel's; all: {ratios}"


def test_a_planted_bf16_merge_is_caught(pool: WorkerPool) -> None:
    """The bound of the test above means something: folding blocks in bfloat16 breaks it."""
    ratios = pool.run(cases.rms_error_ratios, LoongConfig(8, 1, 8), torch.bfloat16, True)[0]
    assert max(ratios.values()) > 2.5, ratios


def test_the_ring_holds_two_blocks_besides_its_own(pool: WorkerPool) -> None:
    """A single ring: the block attended to and the one that arrives; a double ring: the same on either ring."""
    for single, double in pool.run(cases.kv_blocks_held):
        assert single <= 2, f"a single ring held {single} blocks besides its own"
        assert double <= 4, f"a double ring held {double} blocks besides its own"


ERRORS = {
    "too few heads": "head_parallel_size=8 is more than the 4 query heads; try one of [1, 2, 4]",
    "groups do not divide": "the number of query heads, 8, is not a multiple of the number of KV heads, 3",
    "wrong local length": "q of logical rank",
    "window": "window_size=(-2, 0): each side must be -1",
    "packed without boundaries": "qkv_format='thd' needs cu_seqlens",
    "boundaries that fall": "cu_seqlens must ascend from 0",
    "dropout": "dropout_p=1.0 must be a number of at least 0 and below 1",
    "sink of another size": "softmax_offset has shape [3]; it needs one number per query head: [8]",
    "kernel without soft cap": "does not do soft caps on scores; what would work: reference",
    "unknown kernel": "no_such_kernel",
    "ranks do not fit": "has 7 ranks but context_parallel_size=8",
    "rank twice": "names a rank twice",
    "overlap": "is asked for in two context-parallel groups",
    "one rank differs": "has 7 ranks but context_parallel_size=8 (asked for by rank 3)",
}


@pytest.mark.parametrize("what", ERRORS)
def test_bad_input_gives_every_rank_the_same_error(pool: WorkerPool, what: str) -> None:
    messages = pool.run(cases.error_message, what)
    assert ERRORS[what] in messages[0], messages[0]
    # The one message that must name the rank: what it holds, and what it ought to hold.
    alike = {re.sub(r"logical rank \d", "logical rank", message) for message in messages}
    assert len(alike) == 1, f"ranks disagree: {alike}"
    assert pool.run(cases.still_alive) == list(range(8)), "the workers must be usable after an error"


def test_a_worker_that_fails_is_reported_with_its_rank() -> None:
    """The harness itself: no error of a worker may be lost."""
    pool = WorkerPool(2)
    with pytest.raises(WorkerFailure, match=r"rank 1: ZeroDivisionError"):
        pool.run(cases.fails_on_rank_one)
