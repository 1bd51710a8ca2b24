"""Packs of documents: balance, tokens, and the table in the docs."""

from __future__ import annotations

import itertools
import random
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing import cost_of_ours, cost_of_padded_zigzag, draw_mix
from megatron_loong.config import PACK_LAYOUTS, LoongConfig
from megatron_loong.layout.packing import packed_layout, paired_layouts
from megatron_loong.layout.sharding import layout_of, token_positions
from megatron_loong.schedule.tiles import Mask, held_segments, tiles

REPOSITORY = Path(__file__).parents[2]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=40),
    st.sampled_from([LoongConfig(4), LoongConfig(8, 2), LoongConfig(6, 6), LoongConfig(12, 2, 3, "context_first")]),
)
def test_every_token_is_held_once_and_ranks_hold_equally_many(lengths: list[int], config: LoongConfig) -> None:
    documents = (0, *itertools.accumulate(lengths))
    ranks = range(config.context_parallel_size)
    held = [token_positions(config, r, documents[-1], cu_seqlens=documents).tolist() for r in ranks]
    assert sorted(itertools.chain(*held)) == list(range(documents[-1]))
    assert max(map(len, held)) - min(map(len, held)) <= 1


LAYOUTS = [LoongConfig(4), LoongConfig(8, 2), LoongConfig(16, 1, 4), LoongConfig(64, 8)]


@pytest.mark.parametrize("tokens_per_rank", [1024, 4096, 10_007])
@pytest.mark.parametrize("config", LAYOUTS, ids=LoongConfig.describe)
def test_no_rank_does_more_than_a_tenth_above_the_mean(config: LoongConfig, tokens_per_rank: int) -> None:
    for seed in range(50):
        documents = draw_mix(random.Random(seed), tokens_per_rank * config.context_parallel_size)
        ours, padded = cost_of_ours(config, documents), cost_of_padded_zigzag(config, documents)
        real_pairs = sum(Mask(right=0).pairs(b - a, b - a) for a, b in itertools.pairwise(documents))
        assert sum(ours.pairs) == real_pairs, "no pair is computed for padding, or twice"
        assert ours.balance <= 1.10, f"seed {seed}: {ours.balance:.3f}"
        assert sum(ours.kv_rows_sent) <= sum(padded.kv_rows_sent)


def test_short_documents_stay_whole_and_send_nothing() -> None:
    documents = tuple(range(0, 8 * 1024 + 1, 128))
    assert sum(cost_of_ours(LoongConfig(8), documents).kv_rows_sent) == 0


def test_one_document_is_cut_as_zigzag_cuts_it() -> None:
    layout = packed_layout(LoongConfig(4), (0, 64))
    assert layout.rank_runs == (((0, 8), (56, 64)), ((8, 16), (48, 56)), ((16, 24), (40, 48)), ((24, 40),))


BAD_BOUNDARIES = {
    "cu_seqlens must ascend from 0": [[0], [1, 8], [0, 9, 8], [], torch.tensor([8, 0])],
    "cu_seqlens holds no token": [[0, 0]],
    "cu_seqlens must be one row of whole numbers": [
        torch.tensor([0.0, 8.0]), [0, 3.9, 8], torch.tensor([[0, 8]]), [[0, 8]], torch.tensor(8), 8, "0 8", [0, None]
    ],
    "cu_seqlens ends at 9, but there are 8 tokens": [[0, 9]],
    "ends at 4, but .* 8 tokens.* one rank's own tokens, .* padding, .* append 8": [[0, 4], torch.tensor([0, 2, 4])],
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_BOUNDARIES, ids=lambda message: message[:30])
def test_bad_boundaries_are_refused(message: str) -> None:
    for boundaries in BAD_BOUNDARIES[message]:
        with pytest.raises(ValueError, match=message):
            token_positions(LoongConfig(2), 0, 8, cu_seqlens=boundaries)
    assert token_positions(LoongConfig(2), 0, 8, cu_seqlens=torch.tensor([0, 0, 4, 4, 8, 8])).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seq_len", ["64", 64.0, None, 0, -1], ids=repr)
def test_lengths_that_are_none_are_refused(seq_len: Any) -> None:
    with pytest.raises(ValueError, match="whole number|must be at least 1"):
        token_positions(LoongConfig(2), 0, seq_len)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=20),
    st.sampled_from([LoongConfig(1), LoongConfig(4), LoongConfig(8, 2)]),
)
def test_documents_of_both_sides_stay_pairs(lengths: list[tuple[int, int]], config: LoongConfig) -> None:
    """An empty document stays where its partner is not, and tokens live where either side alone puts them."""
    sides = [(0, *itertools.accumulate(x)) for x in zip(*lengths, strict=True)]
    if not all(side[-1] for side in sides):
        return
    layouts = paired_layouts(config, *sides)
    pairs = zip(*((b - a for a, b in itertools.pairwise(x.documents)) for x in layouts), strict=True)
    assert list(pairs) == [pair for pair in lengths if any(pair)]
    assert [x.rank_runs for x in layouts] == [packed_layout(config, side).rank_runs for side in sides]


# ---- as Megatron and TransformerEngine cut ----


def thd_partitioned_indices(cu_seqlens: tuple[int, ...], cp: int, rank: int) -> list[int]:
    """TransformerEngine's `thd_get_partitioned_indices`, token by token, after its kernel's arithmetic."""
    starts, indices = [x // cp for x in cu_seqlens], []
    for token in range(cu_seqlens[-1] // cp):
        document = max(i for i, start in enumerate(starts) if start <= token)
        inside, length = token - starts[document], starts[document + 1] - starts[document]
        chunk = rank if inside < length // 2 else 2 * (cp - 1) - rank
        indices.append(cu_seqlens[document] + inside + length // 2 * chunk)
    return indices


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=20),
    st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (8, 2), (12, 4)]),
)
def test_per_document_is_the_cut_of_transformer_engine(chunks: list[int], sizes: tuple[int, int]) -> None:
    config = LoongConfig(*sizes, pack_layout="per_document")
    cp = config.context_parallel_size
    documents = (0, *itertools.accumulate(2 * cp * n for n in chunks))
    for rank in range(cp):
        found = token_positions(config, rank, documents[-1], cu_seqlens=documents).tolist()
        assert found == thd_partitioned_indices(documents, cp, rank)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 16), st.integers(0, 15)), min_size=1, max_size=8))
def test_padding_behind_documents_costs_no_pair(lengths: list[tuple[int, int]]) -> None:
    """Of every layout: pairs of real tokens alone, as counted from the tiles that run."""
    real = (0, *itertools.accumulate(a for a, _ in lengths))
    padded = (0, *itertools.accumulate(-(-(a + b) // 8) * 8 for a, b in lengths))
    expected = sum(Mask(right=0).pairs(b - a, b - a) for a, b in itertools.pairwise(real))
    for pack_layout in PACK_LAYOUTS:
        config = LoongConfig(4, 2, pack_layout=pack_layout)
        layout = layout_of(config, padded[-1], (real, padded))
        held = [held_segments(layout, rank) for rank in range(2)]
        found = [
            tile for q, kv in itertools.product(held, repeat=2) for tile in tiles(layout, layout, q, kv, Mask(right=0))
        ]
        pairs = sum(
            Mask(*(None if x < 0 else x for x in tile.window)).pairs(
                tile.q.stop - tile.q.start, tile.kv.stop - tile.kv.start
            )
            for tile in found
        )
        assert pairs == expected, config


def test_contiguous_packs_are_parts_of_the_pack() -> None:
    config = LoongConfig(4, pack_layout="contiguous")
    held = [token_positions(config, rank, 10, cu_seqlens=(0, 7, 10)).tolist() for rank in range(4)]
    assert held == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]


BAD_PADDING = {
    r"document 1 of the pack \(tokens 16 to 27\) has 12 tokens, .* no multiple of 8 .* Pad this one to 16": (
        0,
        16,
        28,
        36,
    ),
    "document 1 has 9 tokens in cu_seqlens, but 8 with its padding": ((0, 3, 12), (0, 8, 16)),
    "cu_seqlens has 1 documents, cu_seqlens_padded has 2": ((0, 8), (0, 8, 16)),
}


@pytest.mark.parametrize("message", BAD_PADDING, ids=lambda message: message[:30])
def test_padding_that_does_not_fit_is_refused(message: str) -> None:
    boundaries = BAD_PADDING[message]
    with pytest.raises(ValueError, match=message):
        token_positions(
            LoongConfig(4, pack_layout="per_document"), 0, 36 if len(boundaries) == 4 else 16, cu_seqlens=boundaries
        )


@pytest.mark.nightly
def test_the_page_in_the_docs_is_what_the_script_says() -> None:
    page = runpy.run_path(str(REPOSITORY / "scripts" / "packing_table.py"))["document"]()
    assert (REPOSITORY / "docs" / "packing.md").read_text() == page + "\n"
