"""Masks and shapes, drawn at random and named, over gloo ranks: equal to dense attention with the explicit mask."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_loong.attention.heads import latent_is_smaller
from megatron_loong.config import AXES, LoongConfig, divisors
from megatron_loong.layout.tokens import zigzag_or_contiguous
from megatron_loong.schedule.steps import ring_schedule
from megatron_loong.schedule.tiles import Mask
from tests.multi_rank import mask_cases
from tests.multi_rank.mask_cases import Case
from tests.multi_rank.pool import WorkerPool

PLACEMENTS = ["-".join(order) for order in itertools.permutations(AXES)]


@st.composite
def boundaries(draw: st.DrawFn, tokens: int) -> tuple[int, ...]:
    """Some documents may be empty."""
    return (0, *sorted(draw(st.lists(st.integers(0, tokens), max_size=6))), tokens)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    cp = draw(st.integers(1, 8))
    hp = draw(st.sampled_from(divisors(cp)))
    config = LoongConfig(
        cp,
        hp,
        draw(st.sampled_from(divisors(cp // hp))),
        draw(st.sampled_from(PLACEMENTS)),
        draw(st.sampled_from(["zigzag", "contiguous"])),
        draw(st.sampled_from([4, LoongConfig.least_rows_to_cut])),
    )
    tokens = draw(st.integers(1, 60))
    packed = draw(st.booleans())
    documents = draw(boundaries(tokens)) if packed else (0, tokens)
    kv_documents = None
    if draw(st.integers(0, 3)) == 0:
        lengths = [draw(st.integers(0, 12)) for _ in documents[1:]]
        kv_documents = (0, *itertools.accumulate([*lengths[:-1], lengths[-1] or not any(lengths)]))
    # At least one query head per head rank; KV heads that divide them, in any relation to the head group.
    heads = draw(st.integers(hp, hp + 4))
    window = draw(st.one_of(st.none(), st.tuples(st.integers(-1, 9), st.integers(-1, 4))))
    qkv_format = draw(st.sampled_from(["bshd", "sbhd", "thd"] if packed else ["bshd", "sbhd"]))
    return Case(
        config,
        documents,
        packed=packed,
        kv_documents=kv_documents,
        causal=draw(st.booleans()),
        window=window,
        batch=1 if qkv_format == "thd" else draw(st.integers(1, 2)),
        heads=heads,
        kv_heads=draw(st.sampled_from(divisors(heads))),
        v_dim=draw(st.sampled_from([8, 5])),
        qkv_format=qkv_format,
        sink=draw(st.booleans()),
        dead_sink=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.0, 0.3])),
        tell_lengths=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_any_layout_mask_and_shape_matches_one_device(pool: WorkerPool, case: Case) -> None:
    """float64: out, dq, dk, dv (and dsink) within 1e-12."""
    compared = pool.run(mask_cases.run_case, case)
    assert min(compared[: case.config.context_parallel_size]) >= 4


DOUBLE_RING = LoongConfig(8, 2, 2, least_rows_to_cut=4)
NAMED = {
    "documents of 1 token and of no multiple": Case(
        DOUBLE_RING, (0, 1, 2, 9, 40, 41, 59), packed=True, qkv_format="thd"
    ),
    "one long document among short ones": Case(DOUBLE_RING, (0, 3, 97, 99, 101), packed=True, qkv_format="thd"),
    "fewer tokens than ranks": Case(DOUBLE_RING, (0, 2, 5), packed=True, qkv_format="thd"),
    "sliding window in a double ring": Case(DOUBLE_RING, (0, 96), window=(7, 0)),
    "window both ways": Case(DOUBLE_RING, (0, 96), causal=False, window=(5, 3)),
    "packed and windowed": Case(DOUBLE_RING, (0, 30, 31, 96), packed=True, qkv_format="thd", window=(6, 0)),
    "full": Case(DOUBLE_RING, (0, 48), causal=False),
    "causal bottom-right, more keys": Case(DOUBLE_RING, (0, 24), kv_documents=(0, 61)),
    "causal bottom-right, fewer keys": Case(DOUBLE_RING, (0, 61), kv_documents=(0, 24)),
    "cross-attention of documents": Case(
        DOUBLE_RING, (0, 9, 20), packed=True, kv_documents=(0, 31, 35), causal=False, qkv_format="thd"
    ),
    "documents without queries, and without keys": Case(
        DOUBLE_RING, (0, 4, 4, 8, 40), packed=True, kv_documents=(0, 4, 8, 8, 60), causal=False, qkv_format="thd"
    ),
    "documents without keys in a ring": Case(
        LoongConfig(8, 1, 4), (0, 4, 8), packed=True, kv_documents=(0, 8, 8), causal=False, qkv_format="thd"
    ),
    "rows without a key under sinks of -inf": Case(
        DOUBLE_RING, (0, 61), kv_documents=(0, 24), sink=True, dead_sink=True
    ),
    "the same in the reference kernel": Case(
        DOUBLE_RING, (0, 61), kv_documents=(0, 24), sink=True, dead_sink=True, softcap=3.0
    ),
    "learnable sinks": Case(DOUBLE_RING, (0, 48), sink=True, kv_heads=2),
    "soft cap": Case(DOUBLE_RING, (0, 48), softcap=2.0),
    "dropout": Case(DOUBLE_RING, (0, 48), dropout_p=0.2, batch=2),
    "10 heads over 4": Case(LoongConfig(8, 4, 2), (0, 32), heads=10, kv_heads=5),
    "6 heads over 4, 2 KV heads": Case(LoongConfig(8, 4, 1), (0, 32), heads=6, kv_heads=2),
    "7 heads over 8 ranks of 2, one KV head": Case(LoongConfig(8, 2, 4), (0, 32), heads=7, kv_heads=1),
    "prime length": Case(DOUBLE_RING, (0, 101)),
    "prime length, full, lengths asked for": Case(DOUBLE_RING, (0, 101), causal=False, tell_lengths=False),
    "narrow values (MLA)": Case(DOUBLE_RING, (0, 48), v_dim=5, kv_heads=4),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_cases_match_one_device(pool: WorkerPool, name: str) -> None:
    for placement in ("head_first", "inner-head-outer"):
        case = dataclasses.replace(NAMED[name], config=dataclasses.replace(NAMED[name].config, placement=placement))
        assert min(pool.run(mask_cases.run_case, case)) >= 4


def test_max_logits_of_all_heads(pool: WorkerPool) -> None:
    pool.run(mask_cases.max_logits_case, LoongConfig(8, 4, 2))
    pool.run(mask_cases.max_logits_case, LoongConfig(8, 1, 2))


def test_dropout_is_replayed_and_keeps_what_it_should(pool: WorkerPool) -> None:
    """p 0.25, 4 heads x 512 x 512 pairs: mean 1 within 5 standard errors; rows of 512 keys spread by 0.0255."""
    results = pool.run(mask_cases.dropout_replay, LoongConfig(8, 2, 2), 512)
    mean = sum(x for x, _ in results) / len(results)
    row_spread = (0.25 / 0.75 / 512) ** 0.5
    assert abs(mean - 1) < 5 * row_spread / (4 * 512) ** 0.5
    # Width 8 repeats each row's value, so a rank sees 4 x 64 rows: their spread is known to about 4%.
    assert all(0.8 * row_spread < spread < 1.2 * row_spread for _, spread in results)


@pytest.mark.parametrize("config", [LoongConfig(8), LoongConfig(8, 2, 2)], ids=["ring-8", "2d-double-ring"])
def test_bytes_fall_with_the_window_and_equal_the_schedules(pool: WorkerPool, config: LoongConfig) -> None:
    """256 tokens over 8 ranks, 16 to a chunk: hops and rows that the window reaches, and no others."""
    windows = [None, 40, 15, 0]
    per_rank = pool.run(mask_cases.windowed_bytes, config, 256, windows)
    layout = zigzag_or_contiguous(config, 256)
    totals = []
    for index, window in enumerate(windows):
        # Two query and two KV heads: backward the queries move, with dout, lse and delta.
        ways = [ring_schedule(layout, layout, Mask(window, 0), config.inner_ring_size or 1, x) for x in ("kv", "q")]
        head_bytes = 4 * 2 * 8 // config.head_parallel_size  # float32, 2 heads of 8 shared out, of k or of v
        exchange = (config.head_parallel_size - 1) * (256 // 8) * 4 * head_bytes
        for rank in range(8):
            there, back = (x.steps(rank // config.head_parallel_size, i == 1) for i, x in enumerate(ways))
            hops = [
                [hop for step in steps for hop in getattr(step, kind)]
                for steps, kind in ((there, "sends"), (back, "sends"), (back, "return_sends"))
            ]
            rows = [sum(hop.row_count for hop in sent) for sent in hops]
            forward = exchange + 2 * head_bytes * rows[0]
            backward = exchange + (2 * head_bytes + head_bytes // 4) * rows[1] + head_bytes * rows[2]
            assert per_rank[rank][index] == (forward, backward), (rank, window)
        totals.append(sum(sum(x[index]) for x in per_rank))
    assert totals == sorted(totals, reverse=True) and totals[0] > 2 * totals[1] > 3 * totals[2]


@pytest.mark.parametrize("hp", [1, 2, 4, 8])
def test_the_latent_of_mla_travels_where_it_is_smaller(pool: WorkerPool, hp: int) -> None:
    """8 heads of 6 + 4 and 5 against a latent of 12 + 4: equal to dense attention, and the fewer bytes as told."""
    config = LoongConfig(8, hp, min(2, 8 // hp))
    sent = pool.run(mask_cases.latent_case, config, (0, 64))
    latent, expanded = (sum(x) for x in zip(*sent, strict=True))
    assert (latent < expanded) == latent_is_smaller(12 + 4, 6 + 4 + 5, 8, hp, 8 // hp), (latent, expanded)
    pool.run(mask_cases.latent_case, config, (0, 5, 31, 32, 61))
