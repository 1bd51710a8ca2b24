"""The simulated attention: the bytes that the rings count, times that can be worked out by hand, bounds that hold."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from megatron_loong.config import LoongConfig, divisors
from megatron_loong.layout.tokens import zigzag_or_contiguous
from megatron_loong.planner import programs
from megatron_loong.planner.bound import computing_bound, pass_bound
from megatron_loong.planner.hardware import Curve, Hardware
from megatron_loong.planner.links import Site
from megatron_loong.planner.methods import LOONGTRAIN, MEGATRON_CP, OURS, Program
from megatron_loong.planner.profiles import PROFILES
from megatron_loong.planner.search import axis_orders
from megatron_loong.planner.simulate import simulate_pass
from megatron_loong.planner.tile_costs import TileCosts
from megatron_loong.planner.traffic import AttentionShape, attention_bytes
from megatron_loong.schedule.routes import OWN, Place
from megatron_loong.schedule.steps import ring_schedule
from megatron_loong.schedule.tiles import Mask
from tests.arithmetic.test_schedule import peer_rank

LAYOUTS = [
    LoongConfig(cp, hp, w, placement)
    for cp in (4, 8, 16)
    for hp in divisors(cp)
    for w in divisors(cp // hp)
    for placement in axis_orders(hp, cp // hp // w, w)
]
SHAPE = AttentionShape(1 << 16, heads=16, kv_heads=4, head_dim=128)


_make_tokens = programs.Tokens.__init__


def unbalanced(self: programs.Tokens, config: LoongConfig, seq_len: int, causal: bool) -> None:
    """`Tokens` that admit no symmetry, so that every rank is simulated."""
    _make_tokens(self, config, seq_len, causal)
    self.balanced = False


def ideal(**changes: object) -> Hardware:
    """A machine of round numbers: one FLOP a nanosecond, no latency, no memory traffic, links that cost nothing."""
    free = 1e30
    flat = Curve(((1, 1e9),))
    hardware = Hardware(
        "ideal",
        4,
        1e9,
        1 << 40,
        free,
        free,
        flat,
        flat,
        flat,
        flat,
        free,
        1e-30,
        4,
        free,
        1e-30,
        kernel_overhead_s=1e-30,
    )
    return dataclasses.replace(hardware, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cp", "hp", "w"),
    [
        (c.context_parallel_size, c.head_parallel_size, c.inner_ring_size)
        for c in LAYOUTS
        if c.placement == "head_first"
    ],
    ids=str,
)
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_bytes_equal_the_formulas(cp: int, hp: int, w: int, kv_heads: int) -> None:
    """The formulas of tests/multi_rank/test_bytes.py, which holds them against what the rings count."""
    seq_len, heads, head_dim, width = 64, 16, 16, 2
    ring, g = cp // hp, max(kv_heads, hp)
    exchange = (hp - 1) * (seq_len // cp) * head_dim * (2 * heads + 2 * g) // hp * width
    block = 2 * (seq_len // ring) * (g // hp) * head_dim
    inner, outer = (w - 1) * (ring // w), ring // w - 1
    forward = {"head": exchange, "inner": inner * block * width, "outer": outer * block * width}
    rows = seq_len // ring * heads // hp
    there, home = min((block * width, block * width), (rows * (2 * head_dim * 2 + 8), rows * head_dim * 2), key=sum)
    backward = {
        "head": exchange,
        "inner": inner * there,
        "outer": outer * there,
        "inner_dkv": inner * home,
        "outer_dkv": outer * home,
    }
    expected = tuple({name: n for name, n in x.items() if n} for x in (forward, backward))
    assert attention_bytes(LoongConfig(cp, hp, w), AttentionShape(seq_len, heads, kv_heads, head_dim)) == expected


@pytest.mark.parametrize("config", LAYOUTS, ids=LoongConfig.describe)
def test_the_simulation_sends_those_bytes(config: LoongConfig) -> None:
    site = Site(PROFILES["a100"], 4)
    for backward, expected in zip((False, True), attention_bytes(config, SHAPE), strict=True):
        assert simulate_pass(config, SHAPE, site, backward=backward).sent_bytes == expected


@pytest.mark.parametrize("config", LAYOUTS, ids=LoongConfig.describe)
def test_free_links_leave_the_computing(config: LoongConfig) -> None:
    """On links that cost nothing a pass takes what its FLOPs take: 2 S^2 h d / ranks forward, 2.5 times backward."""
    flops = 2 * SHAPE.seq_len**2 * SHAPE.heads * SHAPE.head_dim / config.context_parallel_size
    for backward, factor in ((False, 1.0), (True, 2.5)):
        result = simulate_pass(config, SHAPE, Site(ideal(), 4), backward=backward)
        assert result.seconds == pytest.approx(flops * factor / 1e9)
        assert result.exposed_s == pytest.approx(0.0, abs=1e-6)


def test_a_slow_ring_takes_its_hops() -> None:
    """A ring that computing cannot hide: three hops of one block, and the last tile after them."""
    config, shape = LoongConfig(4, 1), AttentionShape(64, 1, 1, 16)
    block_bytes = 16 * 2 * 16 * 2
    hardware = ideal(node_link_bytes_per_s=1e6)
    hop_s, tile_s = block_bytes / 1e6, 4 * 16 * 8 * 16 / 1e9
    result = simulate_pass(config, shape, Site(hardware, 4), backward=False)
    assert result.seconds == pytest.approx(3 * hop_s + tile_s)


@pytest.mark.parametrize("backward", [False, True])
def test_half_of_an_all_to_all_hides_in_two_parts(backward: bool) -> None:
    """Between nodes, where the attention of a part is longer than what it hides; the bytes stay."""
    config, shape = LoongConfig(4, 4), AttentionShape(1 << 16, heads=8, kv_heads=8, head_dim=64)
    site = Site(ideal(nics_per_node=1, nic_bytes_per_s=1e5), 2)
    whole = dataclasses.replace(OURS, in_parts=False)
    parted, at_once = (simulate_pass(config, shape, site, backward=backward, method=m) for m in (OURS, whole))
    assert at_once.exposed_s > 100
    assert parted.exposed_s == pytest.approx(at_once.exposed_s / 2, rel=1e-3)
    assert parted.compute_s == pytest.approx(at_once.compute_s, rel=1e-3)
    assert parted.sent_bytes == at_once.sent_bytes


def test_processors_that_move_bytes_do_not_compute() -> None:
    """Links that cost nothing, and messages that cost each end 1 s and each byte 1 us: nothing hides either."""
    free = ideal()
    busy = ideal(message_busy_s=1.0, node_link_busy_s_per_byte=1e-6)
    shape = AttentionShape(1 << 10, heads=4, kv_heads=4, head_dim=64)
    for config, messages in ((LoongConfig(4, 1), 3), (LoongConfig(4, 4), 2 * 3)):
        without, with_it = (simulate_pass(config, shape, Site(x, 4), backward=False) for x in (free, busy))
        lost = messages + 1e-6 * sum(with_it.sent_bytes.values())
        assert with_it.seconds == pytest.approx(without.seconds + lost)
        assert with_it.exposed_s == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("w", "nics_used"), [(8, 1), (4, 4)], ids=["one ring", "inner rings in the node"])
def test_a_double_ring_sends_on_every_nic(w: int, nics_used: int) -> None:
    """LoongTrain section 4.3: a ring of neighbours leaves a node on one NIC, an outer ring on all of them."""
    result = simulate_pass(LoongConfig(8, 1, w), SHAPE, Site(ideal(), 4), backward=False)
    assert sum(kind == "nic" for kind, _ in result.link_bytes) == nics_used


def test_nics_shared_by_two_gpus_take_twice_as_long() -> None:
    config = LoongConfig(8, 1, 4)
    slow = {"nic_bytes_per_s": 1e3}
    alone, shared = (
        simulate_pass(config, SHAPE, Site(ideal(nics_per_node=nics, **slow), 4), backward=False) for nics in (4, 2)
    )
    message_bytes = SHAPE.seq_len // 8 * 4 * 2 * 128 * 2
    assert shared.seconds - alone.seconds == pytest.approx(message_bytes / 1e3, rel=0.001)


def test_tensor_parallel_neighbours_share_a_nic() -> None:
    config = LoongConfig(4, 1, 2)
    message_bytes = SHAPE.seq_len // 4 * 4 * 2 * 128 * 2
    alone, beside = (
        simulate_pass(config, SHAPE, Site(ideal(nics_per_node=nics, nic_bytes_per_s=1e3), 2, tp), backward=False)
        for nics, tp in ((4, 1), (2, 2))
    )
    assert beside.seconds - alone.seconds == pytest.approx(message_bytes / 1e3, rel=0.001)
    assert beside.link_bytes["nic", 0] == 2 * message_bytes == 2 * alone.link_bytes["nic", 0]


@pytest.mark.parametrize("name", ["a100", "h100"])
@pytest.mark.parametrize("seq_len", [1 << 13, 1 << 17])
def test_no_simulation_beats_its_bound(name: str, seq_len: int) -> None:
    shape = dataclasses.replace(SHAPE, seq_len=seq_len)
    for config, backward, per_node in itertools.product(LAYOUTS, (False, True), (4, 2)):
        site = Site(PROFILES[name], per_node)
        simulated = simulate_pass(config, shape, site, backward=backward).seconds
        bound = pass_bound(config, shape, site, backward=backward).seconds
        least = computing_bound(config, shape, site, backward=backward).seconds
        assert least <= bound + 1e-12, config.describe()
        assert bound <= simulated * (1 + 1e-9), config.describe()


@pytest.mark.parametrize("config", LAYOUTS, ids=LoongConfig.describe)
def test_one_node_stands_for_all(config: LoongConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulating every rank gives what simulating the ranks of one node gives, up to merges (half or all rows)."""
    site = Site(ideal(node_link_bytes_per_s=2e8, nic_bytes_per_s=5e7, nics_per_node=2), 4)
    for backward in (False, True):
        folded = simulate_pass(config, SHAPE, site, backward=backward)
        with monkeypatch.context() as patch:
            patch.setattr(programs.Tokens, "__init__", unbalanced)
            whole = simulate_pass(config, SHAPE, site, backward=backward)
        assert folded.seconds == pytest.approx(whole.seconds, rel=1e-6)


@pytest.mark.parametrize("program", [programs.forward_program, programs.backward_program, LOONGTRAIN.backward_program])
@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (1, 4), (4, 1), (2, 3), (3, 2)])
def test_programs_are_whole(program: Program, outer: int, inner: int) -> None:
    """Every block is computed with once, and nothing is waited for that was not posted before."""
    ops = program(outer, inner)
    parts = {kind: [op.place for op in ops if op.kind == kind] for kind in ("opening", "rest", "tile")}
    assert parts["opening"] == parts["rest"] and parts["rest"] in ([], [OWN])
    tiles = [*parts["tile"], *parts["rest"]]
    assert sorted(tiles) == [Place(j, i) for j in range(outer) for i in range(inner)]
    posted = set()
    for op in ops:
        if op.kind == "post":
            posted.add((op.ring, op.place))
        elif op.kind == "wait":
            posted.remove((op.ring, op.place))


def test_a_shorter_way_home_for_gradients() -> None:
    """Our order of visits saves one hop a ring over the order of the forward, which the others use."""
    count = {
        m.name: sum(op.ring == "inner_dkv" for op in m.backward_program(1, 8) if op.kind == "post")
        for m in (OURS, LOONGTRAIN, MEGATRON_CP)
    }
    assert count == {"loong": 7, "LoongTrain": 8, "Megatron-CP": 8}


def test_spans_of_a_stream_do_not_overlap() -> None:
    result = simulate_pass(LoongConfig(16, 2, 4), SHAPE, Site(PROFILES["a100"], 8), backward=True, trace=True)
    assert {span.stream for span in result.spans} == {"compute", "head", "inner", "outer", "inner_dkv", "outer_dkv"}
    for rank in {span.rank for span in result.spans}:
        spans = sorted((s.start_s, s.end_s) for s in result.spans if s.rank == rank and s.stream == "compute")
        assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(spans))
    assert max(span.end_s for span in result.spans) == pytest.approx(result.seconds)


def test_ranks_that_do_not_fill_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the 8 ranks .* do not fill nodes of 3"):
        simulate_pass(LoongConfig(8), SHAPE, Site(PROFILES["h100"], 3), backward=False)


def test_causal_tiles_add_up_to_the_triangle() -> None:
    config = LoongConfig(8, 2, 2)
    costs = TileCosts(config, SHAPE, ideal(), False, OURS)
    flops = 2 * SHAPE.seq_len**2 * SHAPE.heads * SHAPE.head_dim / 8
    assert [costs.pass_s(rank) for rank in range(4)] == pytest.approx([flops / 1e9] * 4)


@pytest.mark.parametrize("dtype_bytes", [2, 4], ids=["rounded-to-travel", "float32"])
@pytest.mark.parametrize("w", [16, 8, 4, 1])
def test_what_leaves_a_node_is_what_the_ring_sends_out_of_it(w: int, dtype_bytes: int) -> None:
    """A ring of 16 over two nodes. In a single ring 15 blocks leave the last node, and of gradients 64 that go straight
    to their owners, or 15 that go from rank to rank."""
    config, shape = LoongConfig(16, 1, w), AttentionShape(1 << 12, 16, 1, 128, dtype_bytes=dtype_bytes)
    site = Site(PROFILES["h100"], 8)
    layout = zigzag_or_contiguous(config, shape.seq_len)
    schedule = ring_schedule(layout, layout, Mask(right=0), w, "kv", direct_returns=dtype_bytes == 2)
    leaving = {"sends": 0, "return_sends": 0}
    for rank in range(8, 16):
        for step in schedule.steps(rank, backward=True):
            for kind in leaving:
                peers = [peer_rank(rank, hop, w) for hop in getattr(step, kind)]
                leaving[kind] += sum(peer < 8 for peer in peers)
    if w == 16:
        assert leaving == {"sends": 15, "return_sends": 64 if dtype_bytes == 2 else 15}
    there, home = OURS.token_bytes(config, shape, backward=True)
    block = shape.seq_len // 16
    sent = simulate_pass(config, shape, site, backward=True).link_bytes
    nics = sum(count for (kind, _), count in sent.items() if kind == "nic")
    assert nics == block * (there * leaving["sends"] + home * leaving["return_sends"])
