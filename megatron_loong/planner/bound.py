"""A lower bound of a simulated pass in closed form, so that the search simulates only what may still win."""

from __future__ import annotations

import functools
from collections import defaultdict

from megatron_loong.config import LoongConfig
from megatron_loong.planner.links import Link, Links, Site, next_on
from megatron_loong.planner.methods import OURS, Method
from megatron_loong.planner.simulate import PassTime
from megatron_loong.planner.tile_costs import TileCosts
from megatron_loong.planner.traffic import AttentionShape, exchange_bytes


def pass_bound(
    config: LoongConfig, shape: AttentionShape, site: Site, *, backward: bool, method: Method = OURS
) -> PassTime:
    """No pass is faster than the all-to-all of its first part, and after it its computing or its busiest link."""
    parts = method.parts(config, shape, site)
    costs = TileCosts(config, shape, site.hardware, backward, method)
    ring_s, copies_s = _ring_and_copies_s(costs)
    link_s = _busiest_link_s(config, shape, site, backward, method, costs.block_tokens)
    before, after = reversed(exchange_bytes(config, shape)) if backward else exchange_bytes(config, shape)
    shared_s, alone_s = _exchange_s_per_byte(config, site)
    first = 1 / parts
    # The last part's all-to-all back may hide behind the unpacking of the others'.
    exchange_s = first * before * shared_s + (after * alone_s if first == 1 else 0)
    return PassTime(
        exchange_s + first * copies_s + max(ring_s + (1 - first) * copies_s, link_s),
        ring_s + copies_s,
    )


def computing_bound(config: LoongConfig, shape: AttentionShape, site: Site, *, backward: bool) -> PassTime:
    """What no inner ring and no placement can get under: the computing alone."""
    costs = TileCosts(config, shape, site.hardware, backward, OURS)
    seconds = sum(_ring_and_copies_s(costs))
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
    links, load = Links(site), defaultdict[Link, float](float)
    there, home = method.token_bytes(config, shape, backward)
    outer, inner = config.outer_ring_size, config.ring_size // config.outer_ring_size
    direct = method.direct_returns(shape)
    for axis, size, rounds in (("inner", inner, outer), ("outer", outer, 1)):
        for rank in range(site.cp_ranks_in_node):
            for shift, token_bytes, hops in _hops(size, home if backward else 0, there, direct):
                link, rate, _ = links.route(rank, next_on(config, rank, axis, shift))
                load[link] += rounds * hops * block_tokens * token_bytes / rate
    return max(load.values(), default=0.0)


def _hops(size: int, home: int, there: int, direct_returns: bool) -> list[tuple[int, int, int]]:
    """(places further, bytes of a token, how often) of what a rank sends on one ring; a forward-order backward sends
    more. In closed form, for programs are made for what is simulated.
    """
    if not direct_returns:
        return [(1, there + home, size - 1)]
    return [(1, there, size - 1), *((-i, home, 1) for i in range(1, size))]


@functools.lru_cache(maxsize=4096)
def _exchange_s_per_byte(config: LoongConfig, site: Site) -> tuple[float, float]:
    """Seconds per byte that a rank sends, of the rank that is through first: (all of a node at once, it alone)."""
    hp = config.head_parallel_size
    if hp == 1:
        return 0.0, 0.0
    links, own = Links(site), []
    load = defaultdict[Link, float](float)
    for rank in range(site.cp_ranks_in_node):
        mine = defaultdict[Link, float](float)
        for step in range(1, hp):
            link, rate, _ = links.route(rank, next_on(config, rank, "head", step))
            mine[link] += 1 / (hp - 1) / rate
        own.append(mine)
        for link, seconds in mine.items():
            load[link] += seconds
    return min(max(load[link] for link in one) for one in own), min(max(one.values()) for one in own)
