"""Which link a message takes: NVLink inside a node, the sender's NIC between nodes, shared where they are shared."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

from megatron_loong.config import LoongConfig
from megatron_loong.planner.hardware import Hardware

Link = tuple[str, int]
"""(what, which of the node): `node link` by sender, `nic`, or the one `fabric`."""


@dataclass(frozen=True)
class Site:
    """Where one context-parallel group stands: its ranks fill nodes one after another, TP ranks beside each."""

    hardware: Hardware
    cp_ranks_in_node: int
    """Ranks of the group on one node; at most the size of the group."""
    tensor_parallel_size: int = 1

    def gpu_of(self, place: int) -> int:
        """GPU of the group's `place`-th rank on a node (its first TP rank)."""
        return place * self.tensor_parallel_size % self.hardware.gpus_per_node

    @property
    def nic_sharers(self) -> int:
        """TP ranks that send the same amount at the same time through one NIC."""
        return min(self.tensor_parallel_size, max(1, self.hardware.gpus_per_node // self.hardware.nics_per_node))


@dataclass
class Links:
    """The links of a site as resources that serve one message after another, in the order in which they come."""

    site: Site
    every_node: bool = False
    """Keep the links of all nodes apart; else those of one node stand for all."""
    free_at_s: dict[Link, float] = field(default_factory=dict)
    sent_bytes: dict[Link, int] = field(default_factory=dict)
    """Per link; a NIC's include what TP neighbours send."""
    _routes: dict[tuple[int, int], tuple[Link, float, float]] = field(default_factory=dict)

    def idle_at(self, sender: int, receiver: int) -> float:
        """When the link between two ranks has nothing under way, latency included."""
        link, _, latency_s = self.route(sender, receiver)
        return self.free_at_s.get(link, 0.0) + latency_s

    def route(self, sender: int, receiver: int) -> tuple[Link, float, float]:
        """(link, bytes per second, latency in seconds) between two ranks of the group."""
        known = self._routes.get((sender, receiver))
        if known is None:
            known = self._routes[sender, receiver] = self._route(sender, receiver)
        return known

    def _route(self, sender: int, receiver: int) -> tuple[Link, float, float]:
        hardware, per_node = self.site.hardware, self.site.cp_ranks_in_node
        node, place = divmod(sender, per_node) if self.every_node else (0, sender % per_node)
        if sender // per_node == receiver // per_node:
            if hardware.node_fabric_bytes_per_s is not None:
                return ("fabric", node), hardware.node_fabric_bytes_per_s, hardware.node_link_latency_s
            link = ("node link", node * per_node + place)
            return link, hardware.node_link_bytes_per_s, hardware.node_link_latency_s
        link = ("nic", node * hardware.nics_per_node + hardware.nic_of(self.site.gpu_of(place)))
        return link, hardware.nic_bytes_per_s / self.site.nic_sharers, hardware.nic_latency_s

    def busy_s(self, sender: int, receiver: int, message_bytes: int) -> float:
        """Computing that a rank loses to a message that it receives and one as large that it sends."""
        per_node, hardware = self.site.cp_ranks_in_node, self.site.hardware
        inside = sender // per_node == receiver // per_node
        per_byte = hardware.node_link_busy_s_per_byte if inside else hardware.nic_busy_s_per_byte
        return hardware.message_busy_s + message_bytes * per_byte

    def send(self, ready_s: float, sender: int, receiver: int, message_bytes: int) -> tuple[float, float]:
        """(start, arrival) of a message that both ends are ready for at `ready_s`."""
        link, bytes_per_s, latency_s = self.route(sender, receiver)
        start = max(ready_s, self.free_at_s.get(link, 0.0))
        self.free_at_s[link] = end = start + message_bytes / bytes_per_s
        carried = message_bytes * (self.site.nic_sharers if link[0] == "nic" else 1)
        self.sent_bytes[link] = self.sent_bytes.get(link, 0) + carried
        return start, end + latency_s


@functools.lru_cache(maxsize=4096)
def _size_and_stride(config: LoongConfig, axis: str) -> tuple[int, int]:
    sizes = {"head": config.head_parallel_size, "outer": config.outer_ring_size, "inner": config.inner_ring_size or 1}
    before = config.axis_order[: config.axis_order.index(axis)]  # type: ignore[arg-type]
    return sizes[axis], math.prod(sizes[faster] for faster in before)


def next_on(config: LoongConfig, cp_rank: int, axis: str, step: int = 1) -> int:
    """The rank `step` places further on one axis, round the ring: `layout.ranks` in one line, for speed.

    >>> next_on(LoongConfig(8, 2, 4), 6, "inner"), next_on(LoongConfig(8, 2, 4), 0, "inner", -1)
    (0, 6)
    """
    size, stride = _size_and_stride(config, axis)
    place = cp_rank // stride % size
    return cp_rank + ((place + step) % size - place) * stride
