"""Tiles and hops, drawn at random: every pair once, every message matched, every gradient home."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_loong.config import LoongConfig, divisors
from megatron_loong.planner.rows import original_rows, row_count, union
from megatron_loong.planner.schedule import Hop, RingSchedule, ring_schedule
from megatron_loong.planner.tiles import Mask
from megatron_loong.planner.visits import OWN
from megatron_loong.sequence.packing import packed_layout
from megatron_loong.topology.tokens import TokenLayout, zigzag_or_contiguous


@pytest.fixture(autouse=True, scope="module", params=[4, 2048], ids=["long blocks", "short blocks"])
def least_rows_to_cut(request: pytest.FixtureRequest) -> Iterator[int]:
    """Blocks of some rows are cut here as long ones are in use, or none are."""
    ring_schedule.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_loong.planner.tiles.LEAST_ROWS_TO_CUT", request.param)
        yield request.param
    ring_schedule.cache_clear()


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
def attentions(draw: st.DrawFn) -> tuple[RingSchedule, ...]:
    """The schedules of one attention, whichever side moves, and however gradients go home."""
    layout, inner = draw(layouts())
    return ring_schedule(layout, layout, draw(masks), inner, draw(st.sampled_from(["kv", "q"])), draw(st.booleans()))


schedules = attentions().flatmap(st.sampled_from)


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
@given(attentions(), st.booleans())
def test_every_allowed_pair_is_computed_once_over_all_ranks_and_no_other(
    attention: tuple[RingSchedule, ...], backward: bool
) -> None:
    layout, mask = attention[0].q, attention[0].mask
    computed: Counter[tuple[int, int]] = Counter()
    for schedule in attention:
        for rank in range(schedule.ring_size):
            passage = schedule.passage(rank, backward)
            for visit in passage.visits:
                owner = visit.owner(rank, schedule.ring_size, schedule.inner_ring_size)
                here = tokens_of(layout, rank)
                moved = [tokens_of(layout, owner)[i] for a, b in passage.rows.get(visit, ()) for i in range(a, b)]
                q_tokens, kv_tokens = (here, moved) if schedule.moving == "kv" else (moved, here)
                opening = passage.opening if visit == OWN else ()
                for tile in (*opening, *passage.tiles.get(visit, ())):
                    computed.update((q_tokens[i], kv_tokens[j]) for i, j in pairs_of_tile(tile))
    n = layout.seq_len
    expected = {(q, k) for q in range(n) for k in range(n) if allowed(layout, mask, q, k)}
    assert set(computed) == expected
    assert set(computed.values()) <= {1}


@pytest.mark.parametrize("ring", [3, 4, 7, 8])
def test_contiguous_chunks_are_balanced_by_helping(ring: int) -> None:
    """LightSeq: every rank computes its own block and about half of the ring's others; without help, up to all."""
    layout = zigzag_or_contiguous(LoongConfig(ring, sequence_layout="contiguous"), 16 * ring)
    attention = ring_schedule(layout, layout, Mask(right=0), ring)
    blocks = [sum(len(x.tiles(rank, owner)) for x in attention for owner in range(ring)) for rank in range(ring)]
    assert sum(blocks) == ring * (ring + 1) // 2
    assert max(blocks) - min(blocks) <= 1 + ring % 2


@settings(max_examples=100, deadline=None)
@given(schedules)
def test_what_is_sent_is_what_the_tiles_read(schedule: RingSchedule) -> None:
    for rank in range(schedule.ring_size):
        for owner in range(schedule.ring_size):
            slices = [getattr(tile, schedule.moving) for tile in schedule.tiles(rank, owner)]
            read = union((x.start, x.stop) for x in slices)
            assert schedule.needs(rank, owner) == read


@settings(max_examples=100, deadline=None)
@given(schedules, st.booleans())
def test_every_message_is_received_in_the_step_in_which_it_is_sent(schedule: RingSchedule, backward: bool) -> None:
    sent, received = Counter(), Counter()
    for rank in range(schedule.ring_size):
        passage = schedule.passage(rank, backward)
        outer, inner = divmod(rank, schedule.inner_ring_size)
        for kind, by_step in (("kv", passage.hops), ("dkv", passage.return_hops)):
            for step, hops in by_step.items():
                for hop in hops:
                    peer = (
                        outer * schedule.inner_ring_size + hop.peer
                        if hop.ring == "inner"
                        else hop.peer * schedule.inner_ring_size + inner
                    )
                    at_once = kind == "kv" and hop.ring == "inner" and schedule.inner_ring_size == 2
                    assert peer != rank and hop.rows and hop.due >= step + (not at_once)
                    ends = (rank, peer) if hop.send else (peer, rank)
                    (sent if hop.send else received)[(kind, step, hop.ring, *ends, hop.rows, hop.due)] += 1
    assert sent == received
    assert all(count == 1 for count in sent.values())


@settings(max_examples=100, deadline=None)
@given(schedules, st.booleans())
def test_blocks_are_here_when_they_are_used(schedule: RingSchedule, backward: bool) -> None:
    for rank in range(schedule.ring_size):
        passage = schedule.passage(rank, backward)
        arrival = {OWN: -2}
        arrival.update((hop.visit, hop.due) for hops in passage.hops.values() for hop in hops if not hop.send)
        for step, hops in passage.hops.items():
            for hop in hops:
                if hop.send:
                    assert arrival[hop.visit] <= step <= passage.last_use[hop.visit]
                    held = passage.rows[hop.visit]
                    assert union((*held, *hop.rows)) == held, "only what is here is sent on"
        for index, visit in enumerate(passage.visits):
            if passage.tiles.get(visit):
                assert arrival[visit] <= index <= passage.last_use[visit]


def test_the_first_outer_hop_hides_behind_the_opening_or_else_a_tile(least_rows_to_cut: int) -> None:
    """Two inner rings of two, backward, blocks of 8 rows."""
    layout = zigzag_or_contiguous(LoongConfig(4), 32)
    passage = RingSchedule(layout, layout, Mask(right=0), 2).passage(0, backward=True)
    assert bool(passage.opening) == (least_rows_to_cut <= 8)
    wanted = 0 if passage.opening else 1
    outer = [(step, hop.due) for step, x in passage.hops.items() for hop in x if hop.ring == "outer"]
    inner = [(step, hop.due) for step, x in passage.hops.items() for hop in x if hop.ring == "inner"]
    assert outer == [(-1, wanted)] * 2  # one sent, one received
    assert inner == [(-1, 0)] * 2 + [(wanted, 1)] * 2


@settings(max_examples=100, deadline=None)
@given(schedules)
def test_every_gradient_comes_home_once(schedule: RingSchedule) -> None:
    """Who has added to a block's gradient, carried along with the messages."""
    ring, inner = schedule.ring_size, schedule.inner_ring_size
    passages = [schedule.passage(rank, backward=True) for rank in range(ring)]
    under_way: dict[tuple[int, str, int, int], tuple[int, list[int]]] = {}
    at_home: dict[int, list[int]] = {}
    for step in range(len(passages[0].visits)):
        contributors: dict[int, list[int]] = {}
        for rank, passage in enumerate(passages):
            visit = passage.visits[step]
            if visit not in passage.rows:
                continue
            owner = visit.owner(rank, ring, inner)
            tiles = passage.tiles[visit]
            tiles = (*tiles, *(passage.opening if visit == OWN else ()))
            mine = [rank] if tiles else []
            for tile in tiles:
                place = passage.return_place(visit, getattr(tile, schedule.moving))
                rows = original_rows(passage.rows[visit], getattr(tile, schedule.moving))
                assert original_rows(passage.return_rows[visit], place) == rows
            for posted, hops in passage.return_hops.items():
                for hop in hops:
                    if not hop.send and hop.visit == visit:
                        assert posted < hop.due <= step
                        came_owner, names = under_way.pop((posted, hop.ring, rank, hop.peer))
                        assert came_owner == owner
                        covered = union((*passage.return_rows[visit], *hop.rows))
                        assert covered == passage.return_rows[visit]
                        mine += names
            contributors[rank] = mine
            if visit == OWN:
                at_home[rank] = mine
        for rank, passage in enumerate(passages):
            for hop in passage.return_hops.get(step, ()):
                if hop.send:
                    outer_of_rank, inner_of_rank = divmod(rank, inner)
                    peer = outer_of_rank * inner + hop.peer if hop.ring == "inner" else hop.peer * inner + inner_of_rank
                    my_place = inner_of_rank if hop.ring == "inner" else outer_of_rank
                    owner = hop.visit.owner(rank, ring, inner)
                    under_way[(step, hop.ring, peer, my_place)] = (owner, contributors[rank])
    assert not under_way
    for owner, names in at_home.items():
        assert sorted(names) == [rank for rank in range(ring) if schedule.tiles(rank, owner)]


def sent_hops(schedule: RingSchedule) -> list[Hop]:
    """What all ranks send in the forward pass."""
    passages = [schedule.passage(rank, backward=False) for rank in range(schedule.ring_size)]
    return [hop for passage in passages for hops in passage.hops.values() for hop in hops if hop.send]


@pytest.mark.parametrize("reach, hops", [(0, 0), (7, 6), (8, 6), (1000, 12)])
def test_a_window_makes_only_the_hops_that_it_reaches(reach: int, hops: int) -> None:
    """Zigzag, ring 4, chunks of 8: a window of one chunk reaches the two neighbours, but for the ring's ends."""
    layout = zigzag_or_contiguous(LoongConfig(4), 64)
    schedule = RingSchedule(layout, layout, Mask(left=reach, right=0), 4)
    messages = [
        hop for rank in range(4) for x in schedule.passage(rank, backward=False).hops.values() for hop in x if hop.send
    ]
    assert len(messages) == hops


def test_a_window_of_one_chunk_sends_only_the_rows_that_are_seen() -> None:
    layout = zigzag_or_contiguous(LoongConfig(4), 64)
    schedule = RingSchedule(layout, layout, Mask(left=3, right=0), 4)
    rows = [
        row_count(hop.rows)
        for r in range(4)
        for x in schedule.passage(r, backward=False).hops.values()
        for hop in x
        if hop.send
    ]
    assert rows == [3] * 6


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
