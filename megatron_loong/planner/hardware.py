"""What the planner has to know of a machine: rates, links, NICs; named profiles, and files written by `calibrate`.

Every number of a named profile has its published source in `Hardware.sources` (`profiles.py`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Curve:
    """A rate over block length (tokens): straight lines in the logarithm of the length, level outside."""

    points: tuple[tuple[int, float], ...]
    """(tokens, operations per second), ascending."""

    def __post_init__(self) -> None:
        lengths = [length for length, _ in self.points]
        if not lengths or lengths != sorted(set(lengths)) or lengths[0] < 1:
            raise ValueError(f"a rate curve needs points of ascending positive length, not {list(self.points)}")
        if any(not rate > 0 for _, rate in self.points):
            raise ValueError(f"a rate curve needs positive rates, not {list(self.points)}")

    def at(self, length: float) -> float:
        """Operations per second for a block of `length` tokens.

        >>> Curve(((1024, 100.0), (4096, 200.0))).at(2048)
        150.0
        """
        if length <= self.points[0][0]:
            return self.points[0][1]
        for (x0, y0), (x1, y1) in zip(self.points, self.points[1:], strict=False):
            if length <= x1:
                return y0 + (y1 - y0) * math.log(length / x0) / math.log(x1 / x0)
        return self.points[-1][1]

    def scaled(self, factor: float) -> Curve:
        """The same curve, every rate times `factor`."""
        return Curve(tuple((length, rate * factor) for length, rate in self.points))


@dataclass(frozen=True)
class Hardware:
    """One kind of node and the network between nodes. Rates are what is achieved, except `peak_flops_per_s`.

    Raises `ValueError` from the constructor for numbers that cannot be.
    """

    name: str
    gpus_per_node: int
    peak_flops_per_s: float
    """Data sheet, dense bf16: the denominator of MFU."""
    memory_bytes: int
    """Of one GPU."""
    memory_bytes_per_s: float
    """Streaming, read plus written."""
    matmul_flops_per_s: float
    """Large bf16 matrix products."""
    attention_forward: Curve
    """Tile without a mask, over the geometric mean of its query and KV lengths; counts the tile's own FLOPs."""
    attention_forward_causal: Curve
    """Tile with the diagonal in it; counts half of the square."""
    attention_backward: Curve
    attention_backward_causal: Curve
    node_link_bytes_per_s: float
    """From one GPU to the others of its node (NVLink), one direction."""
    node_link_latency_s: float
    nics_per_node: int
    nic_bytes_per_s: float
    """One NIC, one direction."""
    nic_latency_s: float
    nic_order: str = "block"
    """`block`: neighbouring GPUs share a NIC; `cyclic`: GPU i uses NIC i % nics_per_node."""
    node_fabric_bytes_per_s: float | None = None
    """What all ranks of a node move together at most, where they share one bus (processes over loopback); None: no
    such limit."""
    message_busy_s: float = 0.0
    """Computing that a rank loses to a message that it sends and one that it receives, whatever their size: processors
    that move messages do not compute. 0 where links work alone."""
    node_link_busy_s_per_byte: float = 0.0
    """Computing that it loses besides to each byte of them, inside the node."""
    nic_busy_s_per_byte: float = 0.0
    """The same between nodes."""
    host_memory_bytes: int = 2 * 10**12
    """Of one node, what its GPUs offload to."""
    host_link_bytes_per_s: float = 25e9
    """Between one GPU and host memory, one direction."""
    kernel_overhead_s: float = 5e-6
    """Time between two dependent kernels."""
    training_efficiency: float = 1.0
    """Share of the rates of matrix products and memory that whole training steps reach outside of attention: launch
    gaps, small kernels, narrow matrices, clocks under load, slow ranks."""
    dtype_bytes: int = 2
    """Width of activations: 2 for bf16; `calibrate` on a CPU measures 4."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Field -> where its number was published, or how it was measured."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            free = "_busy_s" in item.name and value == 0
            if isinstance(value, bool) or (isinstance(value, (int, float)) and not value > 0 and not free):
                raise ValueError(f"hardware {self.name!r}: {item.name}={value} must be above 0")
        if self.training_efficiency > 1:
            raise ValueError(
                f"hardware {self.name!r}: training_efficiency={self.training_efficiency} must be at most 1"
            )
        if self.nic_order not in ("block", "cyclic"):
            raise ValueError(f"hardware {self.name!r}: nic_order={self.nic_order!r} is unknown; use block or cyclic")
        if self.gpus_per_node % self.nics_per_node and self.nics_per_node % self.gpus_per_node:
            raise ValueError(
                f"hardware {self.name!r}: nics_per_node={self.nics_per_node} and gpus_per_node={self.gpus_per_node} "
                "must divide one another, so that every GPU has its NIC"
            )

    def attention_flops_per_s(self, query_len: int, kv_len: int, *, causal: bool, backward: bool) -> float:
        """Rate of one attention tile; see the curves.

        A triangle longer than was measured is two of half its length and the square between them, half the area each.
        """
        full = self.attention_backward if backward else self.attention_forward
        length = math.sqrt(query_len * kv_len)
        if not causal:
            return full.at(length)
        triangle, halvings = self.attention_backward_causal if backward else self.attention_forward_causal, 0
        while length > triangle.points[-1][0]:
            length, halvings = length / 2, halvings + 1
        seconds = 1 / triangle.at(length)
        for doubling in range(halvings):
            seconds = (seconds + 1 / full.at(length * 2**doubling)) / 2
        return 1 / seconds

    def nic_of(self, gpu: int) -> int:
        """The NIC that a GPU of a node uses.

        >>> from megatron_loong.planner.profiles import PROFILES
        >>> [PROFILES["a100"].nic_of(gpu) for gpu in range(8)]    # two GPUs behind one PCIe switch
        [0, 0, 1, 1, 2, 2, 3, 3]
        """
        if self.nic_order == "cyclic":
            return gpu % self.nics_per_node
        return gpu * self.nics_per_node // self.gpus_per_node

    def with_network(
        self, *, nics_per_node: int | None = None, nic_gbit_per_s: float | None = None, efficiency: float = 0.9
    ) -> Hardware:
        """This node behind other NICs; `nic_gbit_per_s` is the line rate, of which `efficiency` is achieved."""
        changes: dict[str, Any] = {}
        if nics_per_node is not None:
            changes["nics_per_node"] = nics_per_node
        if nic_gbit_per_s is not None:
            changes["nic_bytes_per_s"] = nic_gbit_per_s * 1e9 / 8 * efficiency
        return dataclasses.replace(self, **changes)


CURVES = ("attention_forward", "attention_forward_causal", "attention_backward", "attention_backward_causal")
"""Fields of `Hardware` that are curves."""


def hardware_to_text(hardware: Hardware) -> str:
    """The profile as a file: JSON, which is YAML too."""
    values = dataclasses.asdict(hardware)
    for name in CURVES:
        values[name] = {str(length): rate for length, rate in getattr(hardware, name).points}
    values["sources"] = dict(hardware.sources)
    return json.dumps(values, indent=2) + "\n"
