"""Layout arithmetic: coordinates, groups, token positions, visit order, tiles."""

from __future__ import annotations

import itertools

import pytest

from megatron_loong.planner.schedule import (
    Visit,
    backward_visits,
    forward_visits,
    gradient_sources,
    kv_visit_order,
    tiles,
)
from megatron_loong.config import AXES, LoongConfig, divisors
from megatron_loong.sequence.sharding import head_group_chunk_order, ring_runs, token_positions
from megatron_loong.topology.layout import coordinates_of, cp_rank_of, group_members, logical_rank_of

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
        assert len(set(places)) == len(places)
        assert [cp_rank_of(config, place) for place in places] == list(range(len(places))), config
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
    for config in CONFIGS:
        seq_len = 2 * config.sequence_multiple
        chunk = seq_len // config.sequence_multiple
        for ring_rank in range(config.ring_size):
            joined: list[int] = []
            for head, place in head_group_chunk_order(config, ring_rank):
                logical = ring_rank * config.head_parallel_size + head
                positions = token_positions(
                    LoongConfig(config.context_parallel_size, 1, sequence_layout=config.sequence_layout),
                    logical,
                    seq_len,
                ).tolist()
                joined += positions[place * chunk : (place + 1) * chunk]
            assert joined == [t for a, b in ring_runs(config, ring_rank, seq_len) for t in range(a, b)], config


@pytest.mark.parametrize(("n", "w"), RINGS, ids=str)
def test_every_owner_is_visited_once_and_blocks_come_from_neighbours(n: int, w: int) -> None:
    outer = n // w
    for order in (forward_visits(outer, w), backward_visits(outer, w)):
        for rank in range(n):
            assert sorted(v.owner(rank, n, w) for v in order) == list(range(n))
    for rank, visit in itertools.product(range(n), forward_visits(outer, w)):
        source = visit.source()
        if source is not None:
            o, i = divmod(rank, w)
            neighbour = o * w + (i - 1) % w if visit.inner_shift else (o - 1) % outer * w + i
            assert source.owner(neighbour, n, w) == visit.owner(rank, n, w)
    assert kv_visit_order(0, n, w)[0] == 0


@pytest.mark.parametrize(("n", "w"), RINGS, ids=str)
def test_the_gradient_of_each_block_gathers_every_rank_and_ends_at_its_owner(n: int, w: int) -> None:
    """Follow the hops by hand: who has added to a block's dKV when its owner makes the last visit."""
    outer = n // w
    order = backward_visits(outer, w)
    gathered: dict[tuple[int, Visit], set[int]] = {}
    for visit in order:
        for rank in range(n):
            o, i = divmod(rank, w)
            contributors = {rank}
            for source in gradient_sources(visit, outer, w):
                over_inner = source.outer_shift == visit.outer_shift
                neighbour = o * w + (i - 1) % w if over_inner else (o - 1) % outer * w + i
                assert source.owner(neighbour, n, w) == visit.owner(rank, n, w)
                assert not contributors & gathered[neighbour, source], "added twice"
                contributors |= gathered[neighbour, source]
            gathered[rank, visit] = contributors
    assert all(gathered[rank, Visit(0, 0)] == set(range(n)) for rank in range(n))


def test_tiles_compute_each_allowed_pair_once_and_no_other() -> None:
    for layout, ring, causal in itertools.product(("zigzag", "contiguous"), (1, 2, 3, 4), (True, False)):
        config = LoongConfig(ring, sequence_layout=layout)
        seq_len = 2 * config.sequence_multiple
        seen: list[tuple[int, int]] = []
        work = []
        for rank, owner in itertools.product(range(ring), repeat=2):
            q_runs, kv_runs = ring_runs(config, rank, seq_len), ring_runs(config, owner, seq_len)
            q = [t for a, b in q_runs for t in range(a, b)]
            kv = [t for a, b in kv_runs for t in range(a, b)]
            found = [
                (x, y)
                for tile in tiles(q_runs, kv_runs, causal)
                for x in q[tile.q]
                for y in kv[tile.kv]
                if not tile.causal or y <= x
            ]
            seen += found
            work.append((rank == owner, len(found)))
        allowed = [(x, y) for x in range(seq_len) for y in range(seq_len) if not causal or y <= x]
        assert sorted(seen) == allowed
        if layout == "zigzag":
            assert len({n for own, n in work if not own}) <= 1, "off-diagonal tiles cost the same"


BAD = [
    ({"context_parallel_size": 0}, "context_parallel_size=0"),
    ({"context_parallel_size": 8, "head_parallel_size": 3}, "head_parallel_size=3 does not divide"),
    ({"context_parallel_size": 8, "inner_ring_size": 3}, r"try one of \[1, 2, 4, 8\]"),
    ({"placement": "head-outer"}, "placement='head-outer' is unknown"),
    ({"placement": None}, "placement=None is unknown"),
    ({"sequence_layout": "striped"}, "sequence_layout='striped' is unknown"),
    ({"context_parallel_size": 2.0}, "must be a whole number"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[m for _, m in BAD])
def test_a_bad_config_says_what_would_fit(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoongConfig(**values)


def test_a_misspelt_key_is_an_error() -> None:
    with pytest.raises(ValueError, match="LoongConfig has no field head_paralel_size"):
        LoongConfig.from_dict({"context_parallel_size": 2, "head_paralel_size": 2})


@pytest.mark.parametrize("seq_len", [0, 7, 12], ids=str)
def test_a_sequence_that_is_not_a_multiple_is_refused(seq_len: int) -> None:
    with pytest.raises(ValueError, match=r"not a multiple of 2 \* context_parallel_size = 8 .* nearest"):
        token_positions(LoongConfig(4), 0, seq_len)
