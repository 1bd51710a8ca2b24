"""A lower bound of a simulated pass in closed form, so that the search simulates only what may still win."""

from __future__ import annotations

from collections import Counter, defaultdict

from megatron_loong.config import LoongConfig
from megatron_loong.planner.links import Link, Links, Site, next_on
from megatron_loong.planner.methods import OURS, Method
from megatron_loong.planner.simulate import PassTime
from megatron_loong.planner.tile_costs import TileCosts
from megatron_loong.planner.traffic import AttentionShape, exchange_bytes, hop_bytes


def pass_bound(
    config: LoongConfig, shape: AttentionShape, site: Site, *, backward: bool, method: Method = OURS
) -> PassTime:
    """No pass is faster than its all-to-all, and after it its computing or its busiest link."""
    costs = TileCosts(config, shape, site.hardware, backward, method)
    ring_s, copies_s = _ring_and_copies_s(costs)
    link_s = _busiest_link_s(config, shape, site, backward, method, costs.block_tokens)
    before, after = reversed(exchange_bytes(config, shape)) if backward else exchange_bytes(config, shape)
    exchange_s = _exchange_s(config, site, before, shared=True) + _exchange_s(config, site, after, shared=False)
    return PassTime(exchange_s + copies_s + max(ring_s, link_s), ring_s + copies_s)


def computing_bound(config: LoongConfig, shape: AttentionShape, site: Site, *, backward: bool) -> PassTime:
    """What no inner ring and no placement can get under: the computing alone."""
    seconds = sum(_ring_and_copies_s(TileCosts(config, shape, site.hardware, backward, OURS)))
    return PassTime(seconds, seconds)


def _ring_and_copies_s(costs: TileCosts) -> tuple[float, float]:
    """Of the last ring rank; the copies are those of the two all-to-alls."""
    config, copies_s = costs.config, 0.0
    if config.head_parallel_size > 1:
        copies_s = 2 * sum(costs.copy_s(part) for part in exchange_bytes(config, costs.shape))
    return costs.pass_s(config.ring_size - 1), copies_s


def _busiest_link_s(
    config: LoongConfig, shape: AttentionShape, site: Site, backward: bool, method: Method, block_tokens: int
) -> float:
    """Time for which the busiest link of a node carries ring hops."""
    outer, inner = config.outer_ring_size, config.ring_size // config.outer_ring_size
    program = method.backward_program if backward else method.forward_program
    posts = Counter(op.ring for op in program(outer, inner) if op.kind == "post")
    links, load = Links(site), defaultdict[Link, float](float)
    for ring, hops in posts.items():
        width = method.gradient_width(shape) if ring.endswith("dkv") else shape.dtype_bytes
        message = hop_bytes(config, shape, block_tokens, width)
        for rank in range(site.cp_ranks_in_node):
            link, rate, _ = links.route(rank, next_on(config, rank, ring.removesuffix("_dkv")))
            load[link] += hops * message / rate
    return max(load.values(), default=0.0)


def _exchange_s(config: LoongConfig, site: Site, rank_bytes: int, *, shared: bool) -> float:
    """An all-to-all of the rank that is done with it first; `shared`: while all ranks of the node are at it."""
    hp = config.head_parallel_size
    if hp == 1:
        return 0.0
    links, ranks = Links(site), range(site.cp_ranks_in_node)
    own = [defaultdict[Link, float](float) for _ in ranks]
    for rank in ranks:
        for step in range(1, hp):
            link, rate, _ = links.route(rank, next_on(config, rank, "head", step))
            own[rank][link] += rank_bytes // (hp - 1) / rate
    load = Counter[Link]()
    for one in own:
        load.update(one)  # type: ignore[arg-type]
    return min(max(load[link] if shared else one[link] for link in one) for one in own)
