"""Layout arithmetic: coordinates, groups, token positions, visit order, tiles."""

from __future__ import annotations

import itertools

import pytest

from megatron_loong.config import AXES, CAUSAL, FULL, LoongConfig, divisors
from megatron_loong.layout.ranks import coordinates_of, group_members, logical_rank_of
from megatron_loong.layout.sharding import token_positions
from megatron_loong.layout.tokens import zigzag_or_contiguous
from megatron_loong.schedule.routes import forward_order, own_last_order
from megatron_loong.schedule.steps import ring_schedule
from megatron_loong.schedule.tiles import Mask, held_segments, tiles

PLACEMENTS = ["-".join(order) for order in itertools.permutations(AXES)] + ["head_first", "context_first"]
CONFIGS = [
    LoongConfig(cp, hp, w, placement, layout)
    for cp in (1, 2, 3, 4, 6, 8, 12, 16)
    for hp in divisors(cp)
    for w in divisors(cp // hp)
    for placement in PLACEMENTS
    for layout in ("zigzag", "contiguous")
]
RINGS = [(n, w) for n in (1, 2, 3, 4, 6, 8, 12) for w in divisors(n)]


def test_coordinates_are_a_bijection() -> None:
    for config in CONFIGS:
        places = [coordinates_of(config, rank) for rank in range(config.context_parallel_size)]
        assert len(set(places)) == len(places), config
        assert sorted(logical_rank_of(config, p) for p in places) == list(range(len(places)))


def test_named_placements_are_the_orders_they_stand_for() -> None:
    named = LoongConfig(8, 2, 2, "head_first"), LoongConfig(8, 2, 2, "context_first")
    spelt = LoongConfig(8, 2, 2, "head-inner-outer"), LoongConfig(8, 2, 2, "inner-outer-head")
    for a, b in zip(named, spelt, strict=True):
        assert [coordinates_of(a, r) for r in range(8)] == [coordinates_of(b, r) for r in range(8)]
    assert group_members(named[0], "head")[0] == [0, 1]
    assert group_members(named[1], "head")[0] == [0, 4]


def test_groups_of_an_axis_partition_the_ranks() -> None:
    for config, axis in itertools.product(CONFIGS, AXES):
        members = group_members(config, axis)
        assert sorted(itertools.chain(*members)) == list(range(config.context_parallel_size))
        for group in members:
            assert [getattr(coordinates_of(config, r), axis) for r in group] == list(range(len(group)))


def test_token_positions_cover_the_sequence_once() -> None:
    for config in CONFIGS:
        seq_len = 3 * config.sequence_multiple
        found = [token_positions(config, r, seq_len).tolist() for r in range(config.context_parallel_size)]
        assert sorted(itertools.chain(*found)) == list(range(seq_len)), config
        assert all(x == sorted(x) and len(x) == len(found[0]) for x in found)


def test_zigzag_inside_megatron_is_megatrons() -> None:
    """head_first: cp_rank r holds chunks r and 2*cp-1-r, as Megatron's get_batch_on_this_cp_rank slices."""
    for rank in range(4):
        found = token_positions(LoongConfig(4, 2), rank, 16).tolist()
        assert found == [2 * rank, 2 * rank + 1, 14 - 2 * rank, 15 - 2 * rank]


def test_a_head_group_holds_the_runs_of_its_ring_rank() -> None:
    """After the all-to-all a ring rank holds what it would hold were the ring the whole group."""
    for config in CONFIGS:
        seq_len = 2 * config.sequence_multiple
        layout = zigzag_or_contiguous(config, seq_len)
        ring = zigzag_or_contiguous(LoongConfig(config.ring_size, sequence_layout=config.sequence_layout), seq_len)
        for ring_rank in range(config.ring_size):
            assert layout.ring_runs(ring_rank) == ring.ring_runs(ring_rank), config
            first = ring_rank * config.head_parallel_size
            runs = [layout.rank_runs[first + head][index] for head, index in layout.ring_order[ring_rank]]
            assert runs == sorted(runs), config


@pytest.mark.parametrize(("n", "w"), RINGS, ids=str)
def test_every_owner_is_visited_once_and_blocks_come_from_neighbours(n: int, w: int) -> None:
    """One causal document: C-1 hops in either direction, all but one block's worth of rows, all to neighbours."""
    outer = n // w
    layout = zigzag_or_contiguous(LoongConfig(n), 4 * n)
    schedule = ring_schedule(layout, layout, Mask(right=0), w)
    for backward, order in enumerate((forward_order(outer, w), own_last_order(outer, w))):
        for rank in range(n):
            assert sorted(place.owner(rank, n, w) for place in order) == list(range(n))
            assert all(place.rank(place.owner(rank, n, w), n, w) == rank for place in order)
            steps = schedule.steps(rank, bool(backward))
            o, i = divmod(rank, w)
            for kind in ("sends", "return_sends"):
                sent = [hop for step in steps for hop in getattr(step, kind)]
                assert len(sent) == (n - 1 if backward or kind == "sends" else 0)
                for hop in sent:
                    assert hop.rows == ((0, 4),)
                    assert hop.peer == ((i + 1) % w if hop.ring == "inner" else (o + 1) % outer)


def test_tiles_off_the_diagonal_cost_the_same_in_zigzag() -> None:
    layout = zigzag_or_contiguous(LoongConfig(4), 64)
    held = [held_segments(layout, rank) for rank in range(4)]
    for rank, owner in itertools.product(range(4), repeat=2):
        (tile,) = tiles(layout, layout, held[rank], held[owner], Mask(right=0))
        sizes = (tile.q.stop - tile.q.start, tile.kv.stop - tile.kv.start)
        if rank == owner:
            assert (sizes, tile.window) == ((16, 16), CAUSAL)
        else:
            assert (sizes, tile.window) == ((8, 16) if owner > rank else (16, 8), FULL)


BAD = [
    ({"context_parallel_size": 0}, "context_parallel_size=0"),
    ({"context_parallel_size": 8, "head_parallel_size": 3}, "head_parallel_size=3 does not divide"),
    ({"context_parallel_size": 8, "inner_ring_size": 3}, r"try one of \[1, 2, 4, 8\]"),
    ({"placement": "head-outer"}, "placement='head-outer' is unknown"),
    ({"placement": None}, "placement=None is unknown"),
    ({"sequence_layout": "striped"}, "sequence_layout='striped' is unknown"),
    ({"pack_layout": "padded"}, "pack_layout='padded' is unknown; use dealt or per_document or contiguous"),
    ({"context_parallel_size": 2.0}, "must be a whole number"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[m for _, m in BAD])
def test_a_bad_config_says_what_would_fit(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoongConfig(**values)


def test_a_misspelt_key_is_an_error() -> None:
    with pytest.raises(ValueError, match="LoongConfig has no field head_paralel_size"):
        LoongConfig.from_dict({"context_parallel_size": 2, "head_paralel_size": 2})


@pytest.mark.parametrize("seq_len", [3, 7, 13, 31], ids=str)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_any_length_is_shared_out_to_within_a_token_per_chunk(seq_len: int, layout: str) -> None:
    config = LoongConfig(4, 2, sequence_layout=layout)
    found = [token_positions(config, rank, seq_len).tolist() for rank in range(4)]
    assert sorted(itertools.chain(*found)) == list(range(seq_len))
    assert max(map(len, found)) - min(map(len, found)) <= config.chunks_per_rank


def test_a_length_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence length 0 must be at least 1"):
        token_positions(LoongConfig(4), 0, 0)
