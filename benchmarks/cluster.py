"""What an emulated cluster is made of: namespaces, links, routes and rates, as commands of `ip` and `tc`. Pure.

                     node 0                                         node 1
    rank 0 -- eth0 --+      +-- nic0 (tbf) -- p0.0 (tbf) --+        (the same)
    rank 1 -- eth0 --+ node +-- nic1 (tbf) -- p0.1 (tbf) --+ switch
    rank 2 -- eth0 --+                                     +------- p1.0, p1.1 ...

What a rank sends to another node leaves by NIC `local_rank % K` of its node and arrives by the NIC of its receiver, as
it does where every GPU has its NIC; inside a node it goes from memory to memory. Each rank has a network namespace of
its own: gloo does not bind its outgoing connections, so in a shared one the kernel could not tell whose they are.
Each direction of a NIC has the whole rate. Queues are long enough never to drop, as in lossless fabrics, and serve in
order. So that acknowledgements and the small messages by which gloo's two ends agree do not stand behind megabytes of
data, as they would in no fabric, a connection between nodes has only a small window under way; and its receiver
acknowledges at once, not after the 40 ms for which TCP may hold an acknowledgement back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PREFIX = "loong"
MTU_BYTES = 9000
# One segment of offloaded TCP is up to 64 KiB: a smaller bucket would have the kernel cut it up.
BURST_BYTES = 128 * 1024
QUEUE_BYTES = 256 * 1024 * 1024
# Of a connection between nodes; 72 KB fill 10 Gbit/s at the round trip of an empty link, 50 microseconds.
WINDOW_SEGMENTS = 8
# Of each socket, in and out: a whole message. The kernel sends it, as a NIC would, though no process gets to run.
SOCKET_BYTES = 8 * 1024 * 1024
GATEWAY, SWITCH = "10.78.0.1", "10.78.0.2"


@dataclass(frozen=True)
class Cluster:
    """Nodes, ranks and NICs of one emulated cluster, and the names of its parts.

    Raises `ValueError` for sizes that cannot be laid out.
    """

    nodes: int
    ranks_per_node: int
    nics_per_node: int
    nic_rate: str
    """As tc writes rates: `400mbit`, `1gbit`."""
    run_id: int
    """Process that owns the namespaces; they are named after it."""

    def __post_init__(self) -> None:
        if not (1 <= self.nodes <= 200 and 1 <= self.ranks_per_node <= 200):
            raise ValueError(
                f"NODES={self.nodes} and RANKS_PER_NODE={self.ranks_per_node}: each must be between 1 and 200"
            )
        if not 1 <= self.nics_per_node <= self.ranks_per_node:
            raise ValueError(
                f"--nics-per-node {self.nics_per_node}: a NIC without a rank carries nothing; "
                f"use 1 to {self.ranks_per_node} with RANKS_PER_NODE={self.ranks_per_node}"
            )
        if not re.fullmatch(r"\d+(\.\d+)?[kmgt]?bit", self.nic_rate):
            raise ValueError(f"--nic {self.nic_rate!r} is not a rate of tc; write it like 400mbit or 1gbit")

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def switch(self) -> str:
        """Namespace that joins the nodes."""
        return f"{PREFIX}{self.run_id}-sw"

    def node(self, node: int) -> str:
        """Namespace that holds the NICs of a node."""
        return f"{PREFIX}{self.run_id}-n{node}"

    def rank(self, rank: int) -> str:
        """Namespace in which a rank runs."""
        node, local_rank = divmod(rank, self.ranks_per_node)
        return f"{PREFIX}{self.run_id}-n{node}r{local_rank}"

    def address(self, rank: int) -> str:
        """IPv4 address of a rank.

        >>> Cluster(2, 4, 2, "400mbit", run_id=7).address(5)
        '10.77.1.2'
        """
        node, local_rank = divmod(rank, self.ranks_per_node)
        return f"10.77.{node}.{local_rank + 1}"

    def nic(self, local_rank: int) -> int:
        """Number of the NIC by which a rank of a node sends to other nodes and hears from them."""
        return local_rank % self.nics_per_node

    @property
    def namespaces(self) -> list[str]:
        """All of them, the switch first."""
        nodes = [self.node(i) for i in range(self.nodes)]
        return [self.switch, *nodes, *(self.rank(r) for r in range(self.world_size))]

    def environment(self, rank: int) -> dict[str, str]:
        """What torchrun would set for a rank, and the interface for gloo and NCCL."""
        node, local_rank = divmod(rank, self.ranks_per_node)
        values = {
            "RANK": rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": self.ranks_per_node,
            "GROUP_RANK": node,
            "GROUP_WORLD_SIZE": self.nodes,
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": 29500,
            "GLOO_SOCKET_IFNAME": "eth0",
            "NCCL_SOCKET_IFNAME": "eth0",
        }
        return {name: str(value) for name, value in values.items()}


def build_commands(cluster: Cluster) -> list[str]:
    """Commands of `ip` and `tc` that lay out the cluster, in order."""
    commands = []
    for name in cluster.namespaces:
        commands += [f"ip netns add {name}", f"ip -n {name} link set lo up"]
    for rank in range(cluster.world_size):
        commands += _rank_commands(cluster, rank)
    for node in range(cluster.nodes):
        for nic in range(cluster.nics_per_node):
            commands += _nic_commands(cluster, node, nic)
        commands += _routes_of_node(cluster, node)
    return commands


def forwarding_commands(cluster: Cluster) -> list[str]:
    """Commands that let the nodes and the switch pass packets on."""
    routers = [cluster.switch, *(cluster.node(i) for i in range(cluster.nodes))]
    settings = "net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0"
    return [f"ip netns exec {name} sysctl -qw {settings}" for name in routers]


def transport_commands(cluster: Cluster) -> list[str]:
    """Commands for a TCP that fills its link at once: BBR, some machines' default, paces and pauses; Reno, which sees
    no loss here, does not. What stood still for a moment starts again at full rate."""
    settings = ["tcp_congestion_control=reno", "tcp_slow_start_after_idle=0"]
    settings += [f"tcp_{side}='4096 {SOCKET_BYTES} {SOCKET_BYTES}'" for side in ("wmem", "rmem")]
    words = " ".join(f"net.ipv4.{setting}" for setting in settings)
    ranks = [cluster.rank(rank) for rank in range(cluster.world_size)]
    return [f"ip netns exec {name} sysctl -qw {words}" for name in ranks]


def _rank_commands(cluster: Cluster, rank: int) -> list[str]:
    node, local_rank = divmod(rank, cluster.ranks_per_node)
    home, name, address, link = cluster.node(node), cluster.rank(rank), cluster.address(rank), f"r{local_rank}"
    return [
        f"ip link add {link} netns {home} mtu {MTU_BYTES} type veth peer name eth0 netns {name} mtu {MTU_BYTES}",
        f"ip -n {home} addr add {GATEWAY}/32 dev {link}",
        f"ip -n {home} link set {link} up",
        f"ip -n {home} route add {address} dev {link}",
        f"ip -n {name} addr add {address}/32 dev eth0",
        f"ip -n {name} link set eth0 up",
        f"ip -n {name} route add 10.77.{node}.0/24 via {GATEWAY} dev eth0 onlink",
        f"ip -n {name} route add default via {GATEWAY} dev eth0 onlink cwnd lock {WINDOW_SEGMENTS} quickack 1",
    ]


def _nic_commands(cluster: Cluster, node: int, nic: int) -> list[str]:
    home, switch, port = cluster.node(node), cluster.switch, f"p{node}.{nic}"
    shape = f"root tbf rate {cluster.nic_rate} burst {BURST_BYTES} limit {QUEUE_BYTES}"
    return [
        f"ip link add nic{nic} netns {home} mtu {MTU_BYTES} type veth peer name {port} netns {switch} mtu {MTU_BYTES}",
        f"ip -n {home} addr add {GATEWAY}/32 dev nic{nic}",
        f"ip -n {home} link set nic{nic} up",
        f"ip -n {switch} addr add {SWITCH}/32 dev {port}",
        f"ip -n {switch} link set {port} up",
        f"ip -n {home} route add default via {SWITCH} dev nic{nic} onlink table {_table(nic)}",
        f"tc -n {home} qdisc add dev nic{nic} {shape}",
        f"tc -n {switch} qdisc add dev {port} {shape}",
    ]


def _routes_of_node(cluster: Cluster, node: int) -> list[str]:
    """What stays in the node goes straight to its rank; the rest leaves by the NIC of the rank that sent it."""
    home = cluster.node(node)
    commands = [f"ip -n {home} rule add to 10.77.{node}.0/24 lookup main pref 50"]
    for local_rank in range(cluster.ranks_per_node):
        nic, address = cluster.nic(local_rank), cluster.address(node * cluster.ranks_per_node + local_rank)
        commands += [
            f"ip -n {home} rule add from {address} lookup {_table(nic)} pref 100",
            f"ip -n {cluster.switch} route add {address} via {GATEWAY} dev p{node}.{nic} onlink",
        ]
    return commands


def _table(nic: int) -> int:
    return 100 + nic
