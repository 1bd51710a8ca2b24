"""How much slower the planner's layout is than the best one, where every layout has been measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_loong.bench.rivals.ours import Loong
from megatron_loong.config import LoongConfig
from megatron_loong.planner.hardware import Hardware
from megatron_loong.planner.links import Site
from megatron_loong.planner.simulate import simulate_pass
from megatron_loong.planner.traffic import AttentionShape


@dataclass(frozen=True)
class Network:
    """An emulated cluster, as scripts/emulate_cluster.sh takes it."""

    nodes: int
    ranks_per_node: int
    nic: str
    nics_per_node: int

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"{self.nodes}x{self.ranks_per_node}-{self.nics_per_node}x{self.nic}"


class Heads(NamedTuple):
    """The attention of one case; heads are 64 wide, activations bfloat16."""

    seq_len: int
    heads: int
    kv_heads: int


NETWORKS = (
    Network(2, 4, "400mbit", 1),
    Network(2, 4, "100mbit", 1),
    Network(2, 4, "100mbit", 4),
    Network(4, 2, "200mbit", 2),
)
SHAPES = (Heads(4096, 8, 8), Heads(4096, 8, 2), Heads(8192, 8, 1))
HEAD_DIM = 64


class Regret(NamedTuple):
    """One case: what the planner took, and what was best."""

    chosen: str
    chosen_s: float
    best: str
    best_s: float

    @property
    def share(self) -> float:
        """How much slower the chosen layout is: 0.05 is 5%."""
        return self.chosen_s / self.best_s - 1


def simulated_s(config: LoongConfig, network: Network, shape: Heads, hardware: Hardware) -> float:
    """Forward and backward of one layer as the cost model has it."""
    attention = AttentionShape(*shape, HEAD_DIM, dtype_bytes=hardware.dtype_bytes)
    site = Site(hardware, network.ranks_per_node)
    return sum(simulate_pass(config, attention, site, backward=b).seconds for b in (False, True))


def regret(
    results: list[Mapping[str, Any]], layouts: list[LoongConfig], network: Network, shape: Heads, hardware: Hardware
) -> Regret:
    """The planner's choice among the layouts that were measured, by `name` and `forward_backward_s` of `results`.

    `ValueError` when none of the layouts was measured.
    """
    measured = {str(row["name"]): float(row["forward_backward_s"]) for row in results}
    predicted = {
        name: simulated_s(config, network, shape, hardware)
        for config in layouts
        if (name := Loong(config).name) in measured
    }
    if not predicted:
        raise ValueError(f"none of our layouts is among the results: {', '.join(measured)}")
    chosen = min(predicted, key=predicted.__getitem__)
    best = min(predicted, key=measured.__getitem__)
    return Regret(chosen, measured[chosen], best, measured[best])
