"""How much slower the planner's layout is than the best one, where every layout has been measured."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_loong.config import LoongConfig
from megatron_loong.planner.choose import best_layout
from megatron_loong.planner.links import Site
from megatron_loong.planner.profiles import hardware_from_mapping
from megatron_loong.planner.search import layouts
from megatron_loong.planner.simulate import simulate_pass
from megatron_loong.planner.traffic import AttentionShape

HEAD_DIM = 64
#: What the planner's choice may be slower than the best layout.
AIM = 0.05


@dataclass(frozen=True)
class Network:
    """An emulated cluster, as scripts/emulate_cluster.sh takes it."""

    nodes: int
    ranks_per_node: int
    nics_per_node: int
    nic: str

    @property
    def name(self) -> str:
        """For files and tables.

        >>> Network.parse("2x4-1x400mbit").name
        '2x4-1x400mbit'
        """
        return f"{self.nodes}x{self.ranks_per_node}-{self.nics_per_node}x{self.nic}"

    @classmethod
    def parse(cls, name: str) -> Network:
        """The inverse of `name`; `ValueError` for anything else."""
        found = re.fullmatch(r"(\d+)x(\d+)-(\d+)x(\w+)", name)
        if found is None:
            raise ValueError(f"network {name!r} is not written like 2x4-1x400mbit: nodes x ranks - NICs x rate")
        return cls(int(found[1]), int(found[2]), int(found[3]), found[4])


class Heads(NamedTuple):
    """The attention of one case; heads are 64 wide, activations bfloat16."""

    seq_len: int
    heads: int
    kv_heads: int

    @classmethod
    def parse(cls, text: str) -> Heads:
        """`4096-8-2`: tokens, query heads, KV heads."""
        return cls(*map(int, text.split("-")))


class Layout(NamedTuple):
    """What a layout is called in a record."""

    head_parallel_size: int
    inner_ring_size: int
    placement: str

    @classmethod
    def of(cls, config: LoongConfig) -> Layout:
        """That of a configuration."""
        return cls(config.head_parallel_size, config.inner_ring_size or 1, config.placement)

    @property
    def words(self) -> str:
        """For tables: head-parallel size, inner ring size, placement.

        >>> Layout(2, 4, "head_first").words
        'hp 2, w 4, head_first'
        """
        return f"hp {self.head_parallel_size}, w {self.inner_ring_size}, {self.placement}"


class Case(NamedTuple):
    """One network and one attention."""

    network: Network
    shape: Heads

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.network.name}-{'-'.join(map(str, self.shape))}"


def _cases() -> list[Case]:
    shapes = {
        "1x4-1x1gbit": ("4096-8-8", "4096-8-1"),
        "1x8-1x1gbit": ("4096-8-8", "4096-8-2"),
        "2x2-1x100mbit": ("2048-8-8", "4096-8-2"),
        "2x2-2x200mbit": ("4096-8-8", "4096-8-1"),
        "2x4-1x100mbit": ("2048-8-8", "4096-8-2"),
        "2x4-1x400mbit": ("2048-8-8", "4096-8-2"),
        "2x4-4x100mbit": ("4096-8-8", "2048-8-1"),
        "4x2-2x200mbit": ("2048-8-8", "4096-8-2"),
        "4x2-1x1gbit": ("4096-8-8", "4096-8-1"),
    }
    return [Case(Network.parse(name), Heads.parse(shape)) for name, some in shapes.items() for shape in some]


def layouts_of(case: Case) -> list[LoongConfig]:
    """Every layout that the planner's search knows for this case; inside one node all placements are the same."""
    found = list(layouts(case.network.nodes * case.network.ranks_per_node, case.shape.heads))
    if case.network.nodes > 1:
        return found
    first = {(x.head_parallel_size, x.inner_ring_size): x for x in reversed(found)}
    return list(reversed(first.values()))


def fastest(rounds: Mapping[Layout, list[float]]) -> Layout:
    """The layout with the least median."""
    return min(rounds, key=lambda layout: statistics.median(rounds[layout]))


class Regret(NamedTuple):
    """One case: what the planner took, and what was best; medians of the rounds."""

    case: Case
    load_average: float
    layouts: int
    chosen: Layout
    chosen_s: float
    modelled_s: float
    """What the planner expected of its choice."""
    best: Layout
    best_s: float

    @property
    def share(self) -> float:
        """How much slower the chosen layout is: 0.05 is 5%."""
        return self.chosen_s / self.best_s - 1


def regret(record: Mapping[str, Any]) -> Regret:
    """From what was measured of one case, and what today's planner chooses from the profile calibrated beside it.

    `ValueError` when that layout was not measured.
    """
    case = Case(Network.parse(record["network"]), Heads(*record["shape"]))
    hardware = hardware_from_mapping(record["profile"], case.name)
    rounds = {Layout(*layout): times for *layout, times in record["rounds_s"]}
    attention = AttentionShape(*case.shape, HEAD_DIM, dtype_bytes=hardware.dtype_bytes)
    site = Site(hardware, case.network.ranks_per_node)
    config = best_layout(case.network.nodes * case.network.ranks_per_node, attention, site)
    chosen, best = Layout.of(config), fastest(rounds)
    if chosen not in rounds:
        raise ValueError(f"{case.name}: the planner chooses {chosen}, which was not measured; measure the case again")
    modelled_s = sum(simulate_pass(config, attention, site, backward=b).seconds for b in (False, True))
    chosen_s, best_s = (statistics.median(rounds[layout]) for layout in (chosen, best))
    return Regret(case, record["load_average"], len(rounds), chosen, chosen_s, modelled_s, best, best_s)


def table(records: Sequence[Mapping[str, Any]], conditions: str) -> str:
    """The section of docs/planner.md; `ValueError` when there are no records."""
    if not records:
        raise ValueError("no case was measured")
    cases = [regret(record) for record in records]
    within = sum(one.share <= AIM for one in cases)
    lines = [
        f"**{within} of {len(cases)} cases within {100 * AIM:.0f}%**, median regret "
        f"{100 * statistics.median(one.share for one in cases):.1f}%, largest {100 * max(c.share for c in cases):.1f}%",
        f"(*measured*: {conditions}).",
        "",
        "| nodes x ranks | NICs a node | S, heads | layouts | planner takes | modelled ms | ms | best | ms | regret |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in cases:
        network, shape = one.case
        times = [f"{1e3 * s:.0f}" for s in (one.modelled_s, one.chosen_s, one.best_s)]
        lines.append(
            f"| {network.nodes} x {network.ranks_per_node} | "
            f"{f'{network.nics_per_node} x {network.nic}' if network.nodes > 1 else ''} | "
            f"{shape.seq_len}, {shape.heads}:{shape.kv_heads} | {one.layouts} | {one.chosen.words} | {times[0]} | "
            f"{times[1]} | {one.best.words} | {times[2]} | {100 * one.share:.1f}% |"
        )
    return "\n".join(lines) + "\n"


CASES = _cases()
