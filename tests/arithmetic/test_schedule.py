"""Tiles and hops, drawn at random: every pair once, every message matched, every gradient home."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_loong.config import LoongConfig, divisors
from megatron_loong.layout.packing import packed_layout
from megatron_loong.layout.tokens import TokenLayout, zigzag_or_contiguous
from megatron_loong.schedule.rows import original_rows, union
from megatron_loong.schedule.steps import Hop, Schedule, Step, ring_schedule
from megatron_loong.schedule.tiles import Mask, Tile

#: Blocks of a few rows are cut as long ones are in use; or none are.
CUTS = {"long blocks": 4, "short blocks": LoongConfig.least_rows_to_cut}


@st.composite
def layouts(draw: st.DrawFn, max_tokens: int = 64) -> tuple[TokenLayout, int]:
    """(layout, inner ring size)."""
    hp, ring = draw(st.sampled_from([1, 2])), draw(st.integers(1, 6))
    tokens = draw(st.integers(1, max_tokens))
    cuts = draw(st.sets(st.integers(1, max(1, tokens - 1)), max_size=8)) - {tokens}
    documents = (0, *sorted(cuts), tokens)
    kind = draw(st.sampled_from(["zigzag", "contiguous", "packed"]))
    inner = draw(st.sampled_from(divisors(ring)))
    if kind == "packed":
        return packed_layout(LoongConfig(hp * ring, hp), documents), inner
    layout = zigzag_or_contiguous(LoongConfig(hp * ring, hp, sequence_layout=kind), tokens)
    return dataclasses.replace(layout, documents=documents), inner


reaches = st.one_of(st.none(), st.integers(0, 12))
masks = st.builds(Mask, left=reaches, right=st.one_of(st.just(0), reaches))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Whichever side moves, however results return, and whether own blocks are cut or not."""
    layout, inner = draw(layouts())
    moving, direct, least_rows = st.sampled_from(["kv", "q"]), st.booleans(), st.sampled_from([*CUTS.values()])
    return ring_schedule(layout, layout, draw(masks), inner, draw(moving), draw(direct), draw(least_rows))


def ring_of(schedule: Schedule) -> tuple[int, int]:
    """(ring size, inner ring size)."""
    return schedule.routes[0].ring_size, schedule.routes[0].inner_ring_size


def peer_rank(rank: int, hop: Hop, inner_ring_size: int) -> int:
    """The ring rank at the other end of a hop of `rank`."""
    outer, inner = divmod(rank, inner_ring_size)
    return outer * inner_ring_size + hop.peer if hop.ring == "inner" else hop.peer * inner_ring_size + inner


def moved_rows(step: Step, tile: Tile) -> slice:
    """The rows of a tile on the side that moves."""
    return getattr(tile, step.moving)


def tokens_of(layout: TokenLayout, ring_rank: int) -> list[int]:
    return [token for start, stop in layout.ring_runs(ring_rank) for token in range(start, stop)]


def allowed(layout: TokenLayout, mask: Mask, q: int, k: int) -> bool:
    same = bisect_right(layout.documents, q) == bisect_right(layout.documents, k)
    after_left = mask.left is None or k - q >= -mask.left
    before_right = mask.right is None or k - q <= mask.right
    return same and after_left and before_right


def pairs_of_tile(tile) -> list[tuple[int, int]]:
    """(row, key) pairs that FlashAttention computes for a tile's slices and window; fails on a row without a key."""
    rows, keys = tile.q.stop - tile.q.start, tile.kv.stop - tile.kv.start
    pairs = []
    for i in range(rows):
        low = 0 if tile.window[0] < 0 else max(0, i + keys - rows - tile.window[0])
        high = keys if tile.window[1] < 0 else min(keys, i + keys - rows + tile.window[1] + 1)
        assert low < high, f"row {i} of {tile} sees nothing"
        pairs += [(i + tile.q.start, j + tile.kv.start) for j in range(low, high)]
    return pairs


@settings(max_examples=200, deadline=None)
@given(schedules(), st.booleans())
def test_every_allowed_pair_is_computed_once_over_all_ranks_and_no_other(schedule: Schedule, backward: bool) -> None:
    layout, mask = schedule.routes[0].q, schedule.routes[0].mask
    computed: Counter[tuple[int, int]] = Counter()
    for rank in range(ring_of(schedule)[0]):
        for step in schedule.steps(rank, backward):
            here = tokens_of(layout, rank)
            moved = [tokens_of(layout, step.owner)[i] for a, b in step.rows for i in range(a, b)]
            q_tokens, kv_tokens = (here, moved) if step.moving == "kv" else (moved, here)
            for tile in step.tiles:
                computed.update((q_tokens[i], kv_tokens[j]) for i, j in pairs_of_tile(tile))
    n = layout.seq_len
    expected = {(q, k) for q in range(n) for k in range(n) if allowed(layout, mask, q, k)}
    assert set(computed) == expected
    assert set(computed.values()) <= {1}


@pytest.mark.parametrize("ring", [3, 4, 7, 8])
def test_contiguous_chunks_are_balanced_by_moving_queries_too(ring: int) -> None:
    """LightSeq: every rank computes its own block and about half of the ring's others; with KV alone, up to all."""
    layout = zigzag_or_contiguous(LoongConfig(ring, sequence_layout="contiguous"), 16 * ring)
    schedule = ring_schedule(layout, layout, Mask(right=0), ring)
    blocks = [sum(len(step.tiles) for step in schedule.steps(rank, backward=False)) for rank in range(ring)]
    assert sum(blocks) == ring * (ring + 1) // 2
    assert max(blocks) - min(blocks) <= 1 + ring % 2


@settings(max_examples=100, deadline=None)
@given(schedules())
def test_what_is_sent_is_what_the_tiles_read(schedule: Schedule) -> None:
    for routes in schedule.routes:
        for rank in range(routes.ring_size):
            for owner in range(routes.ring_size):
                slices = [getattr(tile, routes.moving) for tile in routes.tiles(rank, owner)]
                assert routes.needs(rank, owner) == union((x.start, x.stop) for x in slices)


@settings(max_examples=100, deadline=None)
@given(schedules(), st.booleans())
def test_every_message_is_received_in_the_step_in_which_it_is_sent(schedule: Schedule, backward: bool) -> None:
    ring, w = ring_of(schedule)
    sent, received = Counter(), Counter()
    for rank in range(ring):
        for index, step in enumerate(schedule.steps(rank, backward)):
            for kind in ("sends", "receives", "return_sends", "return_receives"):
                for hop in getattr(step, kind):
                    peer = peer_rank(rank, hop, w)
                    at_once = kind in ("sends", "receives") and hop.ring == "inner" and w == 2
                    assert peer != rank and hop.rows and hop.due >= index + (not at_once)
                    ends = (rank, peer) if kind.endswith("sends") else (peer, rank)
                    counted = sent if kind.endswith("sends") else received
                    counted[(kind.startswith("return"), index, *ends, hop[2:])] += 1
    assert sent == received
    assert all(count == 1 for count in sent.values())
    # Messages between two ranks match in the order in which they are posted: one of a kind in a step leaves no doubt.
    assert all(count == 1 for count in Counter((*key[:4], key[4][0]) for key in sent).values())


@settings(max_examples=100, deadline=None)
@given(schedules(), st.booleans())
def test_blocks_are_here_when_they_are_used(schedule: Schedule, backward: bool) -> None:
    for rank in range(ring_of(schedule)[0]):
        steps = schedule.steps(rank, backward)
        arrival = {(step.moving, rank): -1 for step in steps}
        arrival.update(((hop.moving, hop.owner), hop.due) for step in steps for hop in step.receives)
        held = {(step.moving, step.owner): step.rows for step in steps}
        dropped: set[tuple[str, int]] = set()
        for index, step in enumerate(steps):
            for hop in step.sends:
                key = hop.moving, hop.owner
                assert arrival[key] <= index and key not in dropped
                assert union((*held[key], *hop.rows)) == held[key], "only what is here is sent on"
            if step.tiles:
                assert arrival[step.moving, step.owner] <= index and (step.moving, step.owner) not in dropped
            dropped |= {(step.moving, owner) for owner in step.last_use}
        assert dropped >= set(arrival), "every block is dropped"


@pytest.mark.parametrize("least_rows_to_cut", CUTS.values(), ids=CUTS.keys())
def test_the_first_outer_hop_hides_behind_the_begun_own_block_or_else_a_tile(least_rows_to_cut: int) -> None:
    """Two inner rings of two, backward, blocks of 8 rows."""
    layout = zigzag_or_contiguous(LoongConfig(4), 32)
    steps = ring_schedule(layout, layout, Mask(right=0), 2, least_rows_to_cut=least_rows_to_cut).steps(0, backward=True)
    begun = bool(steps[0].tiles)
    assert begun == (least_rows_to_cut <= 8)
    needed = 1 if begun else 2
    for kind in ("sends", "receives"):
        hops = [(index, hop.ring, hop.due) for index, step in enumerate(steps) for hop in getattr(step, kind)]
        assert [(i, due) for i, ring, due in hops if ring == "outer"] == [(0, needed)]
        assert [(i, due) for i, ring, due in hops if ring == "inner"] == [(0, 1), (needed, 2)]


@settings(max_examples=100, deadline=None)
@given(schedules())
def test_every_result_returns_once(schedule: Schedule) -> None:
    """Who has added to the results for a block, carried along with the messages."""
    ring, w = ring_of(schedule)
    passes = [schedule.steps(rank, backward=True) for rank in range(ring)]
    gathered: dict[tuple[int, str, int], list[int]] = {}  # (rank, kind of block, owner): who has added to it
    under_way: dict[tuple[int, str, int], list[tuple[int, Hop, list[int]]]] = {}
    for index in range(len(passes[0])):
        for rank, steps in enumerate(passes):
            step = steps[index]
            key = rank, step.moving, step.owner
            for due, hop, names in under_way.pop(key, []):
                assert due <= index and union((*step.return_rows, *hop.rows)) == step.return_rows
                gathered.setdefault(key, []).extend(names)
            if step.tiles and rank not in gathered.setdefault(key, []):
                gathered[key].append(rank)
            for tile in step.tiles:
                rows = original_rows(step.rows, moved_rows(step, tile))
                assert original_rows(step.return_rows, step.return_place(moved_rows(step, tile))) == rows
        for rank, steps in enumerate(passes):
            for hop in steps[index].return_sends:
                to = peer_rank(rank, hop, w), hop.moving, hop.owner
                names = gathered.pop((rank, hop.moving, hop.owner), [])
                under_way.setdefault(to, []).append((hop.due, hop, names))
    assert not under_way
    for routes in schedule.routes:
        for owner in range(ring):
            names = gathered.pop((owner, routes.moving, owner), [])
            assert sorted(names) == [rank for rank in range(ring) if routes.tiles(rank, owner)]
    assert not any(gathered.values())


@pytest.mark.parametrize("reach, hops", [(0, 0), (7, 6), (8, 6), (1000, 12)])
def test_a_window_makes_only_the_hops_that_it_reaches(reach: int, hops: int) -> None:
    """Zigzag, ring 4, chunks of 8: a window of one chunk reaches the two neighbours, but for the ring's ends."""
    assert len(windowed_hops(reach)) == hops


def test_a_window_of_one_chunk_sends_only_the_rows_that_are_seen() -> None:
    assert [hop.row_count for hop in windowed_hops(3)] == [3] * 6


def windowed_hops(reach: int) -> list[Hop]:
    """What all ranks of a ring of four send forward, chunks of 8, causal with a window."""
    layout = zigzag_or_contiguous(LoongConfig(4), 64)
    schedule = ring_schedule(layout, layout, Mask(left=reach, right=0), 4)
    return [hop for rank in range(4) for step in schedule.steps(rank, backward=False) for hop in step.sends]


@pytest.mark.parametrize("q_len, kv_len", [(5, 5), (3, 9), (9, 3)])
@pytest.mark.parametrize("mask", [Mask(), Mask(right=0), Mask(left=2, right=0), Mask(left=1, right=2)])
def test_pairs_are_those_that_one_counts(mask: Mask, q_len: int, kv_len: int) -> None:
    shift = kv_len - q_len
    counted = sum(
        (mask.left is None or k >= q + shift - mask.left) and (mask.right is None or k <= q + shift + mask.right)
        for q in range(q_len)
        for k in range(kv_len)
    )
    assert mask.pairs(q_len, kv_len) == counted
