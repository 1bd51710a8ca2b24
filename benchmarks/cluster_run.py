"""Run a command once per rank on an emulated cluster (`bench.cluster`), and leave nothing behind.

    scripts/emulate_cluster.sh 2 4 --nic 400mbit --nics-per-node 4 -- python train.py

Each rank finds in its environment what torchrun would have set (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
GROUP_RANK, MASTER_ADDR, MASTER_PORT), the interface for gloo and NCCL, and in LOONG_EMULATED_CLUSTER the sizes and
measured bandwidths as JSON. Before the command the bandwidths are printed, after it the bytes that each NIC sent.
Needs root, and `ip` and `tc` of iproute2; works inside a container that has CAP_SYS_ADMIN and CAP_NET_ADMIN.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import link_speed
from benchmarks.cluster import PREFIX, Cluster, build_commands, forwarding_commands, transport_commands

_NAMESPACES = Path("/run/netns")
_OURS = re.compile(rf"{PREFIX}(\d+)-(sw|n\d+(r\d+)?)")
_GRACE_S = 5.0
_PROBE_S = 0.4


class ClusterError(RuntimeError):
    """The cluster could not be laid out, or its links not measured; the message has the command that failed."""


def why_not() -> str | None:
    """None when this process can lay out a cluster here, else what is missing."""
    if os.geteuid() != 0:
        return "laying out network namespaces takes root: run it with sudo"
    missing = [name for name in ("ip", "tc", "sysctl") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install iproute2 and procps"
    probe = f"{PREFIX}{os.getpid()}-sw"
    try:
        _run(f"ip netns add {probe}")
        _run(f"ip -n {probe} link add probe0 type veth peer name probe1")
        _run(f"tc -n {probe} qdisc add dev probe0 root tbf rate 1mbit burst 128k limit 1mb")
    except ClusterError as error:
        return f"this machine cannot emulate a cluster: {error}"
    finally:
        subprocess.run(["ip", "netns", "del", probe], stderr=subprocess.DEVNULL)
    return None


def _run(command: str) -> str:
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"`{command}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


def remove_namespaces(names: list[str]) -> None:
    """End what still runs in these namespaces of ours and delete them; unknown names are skipped."""
    present = [name for name in names if (_NAMESPACES / name).exists()]
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        pids = [int(pid) for name in present for pid in _pids(name)]
        for pid in pids:
            _send(pid, signal_number)
        deadline = time.monotonic() + _GRACE_S
        while pids and time.monotonic() < deadline:
            time.sleep(0.05)
            pids = [pid for pid in pids if _runs(pid)]
    for name in present:
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def _pids(name: str) -> list[str]:
    return subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()


def _runs(pid: int) -> bool:
    """Whether a process is still there and not only waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _send(pid: int, signal_number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal_number)


def stale_namespaces() -> list[str]:
    """Namespaces of runs whose process is gone, killed before it could clean up."""
    found = [path.name for path in _NAMESPACES.glob(f"{PREFIX}*")] if _NAMESPACES.is_dir() else []
    owners = {name: match[1] for name in found if (match := _OURS.fullmatch(name))}
    return sorted(name for name, pid in owners.items() if not _is_emulation(pid))


def _is_emulation(pid: str) -> bool:
    try:
        return b"cluster_run" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def apply_windows(cluster: Cluster) -> None:
    """Have the window of connections between nodes apply to all of them alike.

    Linux takes it from a route only for addresses that a connection has ended with before: here every pair has one.
    """
    listening = []
    for rank in range(cluster.world_size):
        with _inside(cluster.rank(rank)):
            listening.append(socket.create_server((cluster.address(rank), 0)))
    for rank, server in enumerate(listening):
        for other in range(rank // cluster.ranks_per_node * cluster.ranks_per_node):
            with _inside(cluster.rank(other)), socket.create_connection(server.getsockname(), timeout=10) as one:
                with server.accept()[0] as end:
                    one.sendall(b".")
                    end.recv(1)
    for server in listening:
        server.close()


@contextlib.contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """Sockets that this thread makes belong to a network namespace."""
    clone_newnet, libc = 0x40000000, ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as before, (_NAMESPACES / namespace).open() as other:
        if libc.setns(other.fileno(), clone_newnet):
            raise ClusterError(f"entering namespace {namespace}: {os.strerror(ctypes.get_errno())}")
        try:
            yield
        finally:
            libc.setns(before.fileno(), clone_newnet)


def measure(cluster: Cluster) -> dict[str, float]:
    """Bandwidths in bytes per second and round trips in s: inside a node, by one NIC, by all NICs of a node at once.

    What the cluster does not have (one rank a node, one node) is left out.
    """
    measured: dict[str, float] = {}
    per_node = cluster.ranks_per_node
    if per_node > 1:
        (inside,) = _probe(cluster, [(1, 0)])
        measured |= {"intra_bytes_per_s": inside["bytes_per_s"], "intra_round_trip_s": inside["round_trip_s"]}
    if cluster.nodes > 1:
        (one,) = _probe(cluster, [(per_node, 0)])
        measured |= {"inter_bytes_per_s": one["bytes_per_s"], "inter_round_trip_s": one["round_trip_s"]}
    if cluster.nodes > 1 and cluster.nics_per_node > 1:
        pairs = [(per_node + i, i) for i in range(cluster.nics_per_node)]
        measured["all_nics_bytes_per_s"] = sum(one["bytes_per_s"] for one in _probe(cluster, pairs))
    return measured


def _probe(cluster: Cluster, pairs: list[tuple[int, int]]) -> list[dict[str, float]]:
    """`link_speed` from each (sending rank, receiving rank), all at the same time."""

    def start(rank: int, *words: str) -> subprocess.Popen[str]:
        command = ["ip", "netns", "exec", cluster.rank(rank), sys.executable, link_speed.__file__, *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    receivers = [start(receiver, "receive", cluster.address(receiver)) for _, receiver in pairs]
    senders = [start(sender, "send", cluster.address(receiver), str(_PROBE_S)) for sender, receiver in pairs]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in receivers]
        if any(process.wait(timeout=10) for process in [*receivers, *senders]):
            raise ClusterError("the ranks of the cluster do not reach each other; the reason is above")
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"measuring the links took over {error.timeout:.0f} s: is --nic too slow?") from error
    return [json.loads(output) for output in outputs]


def nic_bytes(cluster: Cluster) -> list[list[int]]:
    """Bytes sent so far by each NIC of each node."""
    counted = []
    for node in range(cluster.nodes):
        links = json.loads(_run(f"ip -n {cluster.node(node)} -j -s link show"))
        sent = {link["ifname"]: int(link["stats64"]["tx"]["bytes"]) for link in links}
        counted.append([sent[f"nic{i}"] for i in range(cluster.nics_per_node)])
    return counted


def describe(cluster: Cluster, measured: dict[str, float]) -> str:
    """The cluster and its measured links in a few lines."""
    lines = [
        f"{cluster.nodes} nodes x {cluster.ranks_per_node} ranks, {cluster.nics_per_node} NIC(s) of "
        f"{cluster.nic_rate} a node; measured:"
    ]
    for name, words in (("intra", "inside a node"), ("inter", "between nodes, one NIC"), ("all_nics", "all NICs")):
        if f"{name}_bytes_per_s" in measured:
            line = f"  {words:23s} {measured[f'{name}_bytes_per_s'] / 1e6:8.1f} MB/s"
            if f"{name}_round_trip_s" in measured:
                line += f", round trip {measured[f'{name}_round_trip_s'] * 1e3:.2f} ms"
            lines.append(line)
    if "intra_bytes_per_s" in measured and "inter_bytes_per_s" in measured:
        lines[-1] += f"; inside : between = {measured['intra_bytes_per_s'] / measured['inter_bytes_per_s']:.0f} : 1"
    return "\n".join(lines)


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def run_ranks(cluster: Cluster, command: list[str], extra_environment: dict[str, str]) -> int:
    """`command` once per rank; 0 when all of them ended well, else the exit code of the first that did not.

    When one fails, the others are ended.
    """
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", cluster.rank(rank), *command],
            # The namespaces have no names for their addresses, of which torch would warn once per connection.
            env={"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, **cluster.environment(rank), **extra_environment},
            preexec_fn=_die_with_parent,
        )
        for rank in range(cluster.world_size)
    ]
    waiting = dict(enumerate(processes))
    while waiting:
        for rank, process in list(waiting.items()):
            code = process.poll()
            if code is not None:
                del waiting[rank]
            if code:
                say(f"rank {rank} ended with exit code {code}; ending the others")
                return code if code > 0 else 128 - code
        time.sleep(0.02)
    return 0


def say(text: str) -> None:
    """A line of this program's own among the output of the ranks."""
    print(f"== {text}".replace("\n", "\n== "), file=sys.stderr, flush=True)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options and the command behind `--`."""
    parser = argparse.ArgumentParser(
        prog="emulate_cluster.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nodes", metavar="NODES", type=int)
    parser.add_argument("ranks_per_node", metavar="RANKS_PER_NODE", type=int)
    parser.add_argument("--nic", default="400mbit", metavar="RATE", help="rate of one NIC, as tc writes it (400mbit)")
    parser.add_argument("--nics-per-node", type=int, default=1, metavar="K", help="rank uses NIC local_rank %% K (1)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write sizes, bandwidths and bytes sent as JSON")
    split = argv.index("--") if "--" in argv else len(argv)
    args, command = parser.parse_args(argv[:split]), argv[split + 1 :]
    if not command:
        parser.error("no command: put it after --, such as -- python train.py")
    return args, command


def main(argv: list[str] | None = None) -> int:
    """Lay out, measure, run, count, clean up; the exit code of the command, or 2 when there was no way to run it."""
    args, command = parse(sys.argv[1:] if argv is None else argv)
    try:
        cluster = Cluster(args.nodes, args.ranks_per_node, args.nics_per_node, args.nic, os.getpid())
    except ValueError as error:
        say(str(error))
        return 2
    if reason := why_not():
        say(reason)
        return 2
    if leftovers := stale_namespaces():
        say(f"removing {len(leftovers)} namespaces of a run that was killed")
        remove_namespaces(leftovers)
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, _raise_exit)
    try:
        return _lay_out_and_run(cluster, command, args.report)
    except ClusterError as error:
        say(str(error))
        return 2
    finally:
        for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signal_number, signal.SIG_IGN)
        remove_namespaces(cluster.namespaces)


def _raise_exit(signal_number: int, _frame: Any) -> None:
    raise SystemExit(128 + signal_number)


def _lay_out_and_run(cluster: Cluster, command: list[str], report: Path | None) -> int:
    for line in [*build_commands(cluster), *forwarding_commands(cluster), *transport_commands(cluster)]:
        _run(line)
    apply_windows(cluster)
    measured = measure(cluster)
    say(describe(cluster, measured))
    facts: dict[str, Any] = {
        "nodes": cluster.nodes,
        "ranks_per_node": cluster.ranks_per_node,
        "nics_per_node": cluster.nics_per_node,
        "nic_rate": cluster.nic_rate,
        **measured,
    }
    before, started = nic_bytes(cluster), time.perf_counter()
    code = run_ranks(cluster, command, {"LOONG_EMULATED_CLUSTER": json.dumps(facts)})
    facts["command_s"] = time.perf_counter() - started
    sent = [
        [now - then for now, then in zip(*node, strict=True)] for node in zip(nic_bytes(cluster), before, strict=True)
    ]
    facts["nic_sent_bytes"] = sent
    for node, counts in enumerate(sent):
        say(f"node {node} sent " + ", ".join(f"{count / 2**20:.2f} MiB by nic{i}" for i, count in enumerate(counts)))
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(facts, indent=2) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
