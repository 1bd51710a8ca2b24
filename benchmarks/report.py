"""The comparison as a record (JSON) and as a table (Markdown): times, bytes, operations and memory side by side."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.compare import Entry
from benchmarks.rivals.interface import Shape
from benchmarks.timing import ratio_to, summarise, whole_s

OURS, BOUND = "megatron-loong", "compute alone"


def busiest_nic_bytes(traffic: Sequence[Sequence[int]], ranks_per_node: int, nics_per_node: int) -> int:
    """Bytes over the NIC direction that carries most, of `traffic[sender][receiver]`.

    A rank uses NIC `local_rank % nics_per_node` of its node, as on the emulated cluster.

    >>> ring = [[0, 8, 0, 0], [0, 0, 8, 0], [0, 0, 0, 8], [8, 0, 0, 0]]
    >>> busiest_nic_bytes(ring, ranks_per_node=2, nics_per_node=1)  # one hop of four crosses each boundary
    8
    """
    load: dict[tuple[str, int, int], int] = {}
    for sender, row in enumerate(traffic):
        for receiver, sent in enumerate(row):
            if sender // ranks_per_node == receiver // ranks_per_node:
                continue
            for way, rank in (("out", sender), ("in", receiver)):
                node, local_rank = divmod(rank, ranks_per_node)
                nic = (way, node, local_rank % nics_per_node)
                load[nic] = load.get(nic, 0) + sent
    return max(load.values(), default=0)


def make_record(
    entries: Sequence[Entry],
    left_out: Sequence[tuple[str, str]],
    shape: Shape,
    cluster: dict[str, Any] | None,
    conditions: dict[str, Any],
) -> dict[str, Any]:
    """Everything worth keeping of one comparison, ready for JSON. Times in s, sizes in bytes, per rank the largest."""
    timed = [entry for entry in entries if entry.rounds]
    rows = [_row(entry, cluster) for entry in timed]
    refused = [(entry.name, str(entry.refused)) for entry in entries if entry.refused]
    packages = sorted({entry.package for entry in entries} | {"torch"})
    return {
        "shape": shape.describe(),
        "ranks": len(timed[0].rounds[0]) if timed else 0,
        "cluster": cluster,
        "conditions": conditions,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "results": sorted(rows, key=lambda row: row["forward_backward_s"]),
        "verdict": _verdict(timed, rows),
        "left_out": [{"name": name, "reason": reason} for name, reason in [*refused, *left_out]],
    }


def _row(entry: Entry, cluster: dict[str, Any] | None) -> dict[str, Any]:
    timing = summarise(entry.rounds)
    flops = [one.flops for one in entry.counts]
    row = {
        "name": entry.name,
        "package": entry.package,
        "forward_s": timing.forward_s,
        "forward_backward_s": timing.forward_backward_s,
        "quartiles_s": timing.spread_s,
        "cpu_s": timing.cpu_s,
        "main_cpu_s": timing.main_cpu_s,
        "idle_share": timing.idle_share,
        "attention_cpu_s": statistics.median(one.attention_cpu_s for one in entry.counts),
        "rounds_s": whole_s(entry.rounds),
        "forward_sent_bytes": max(sum(one.forward_sent_bytes) for one in entry.counts),
        "sent_bytes": max(sum(one.sent_bytes) for one in entry.counts),
        "peak_live_bytes": max(one.peak_live_bytes for one in entry.counts),
        "flops": max(flops),
        "flops_balance": max(flops) / statistics.mean(flops),
        "attention_calls": max(one.attention_calls for one in entry.counts),
        "error_multiple": entry.error_multiple,
    }
    if cluster and cluster.get("inter_bytes_per_s"):
        carried = busiest_nic_bytes(entry.traffic, cluster["ranks_per_node"], cluster["nics_per_node"])
        row |= {"busiest_nic_bytes": carried, "busiest_nic_s": carried / cluster["inter_bytes_per_s"]}
    return row


def _verdict(timed: Sequence[Entry], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Our best layout against the best rival and against the bounds; empty where one side is missing."""
    by_name = {row["name"]: row for row in rows}
    rounds = {entry.name: entry.rounds for entry in timed}

    def best(names: list[str]) -> str | None:
        return min(names, key=lambda name: by_name[name]["forward_backward_s"], default=None)

    ours = best([row["name"] for row in rows if row["package"] == OURS])
    rival = best([row["name"] for row in rows if row["package"] != OURS and row["name"] != BOUND])
    verdict: dict[str, Any] = {"ours": ours, "rival": rival}
    if ours and rival:
        verdict["ours_over_rival"] = ratio_to(rounds[ours], rounds[rival])
        for size in ("sent_bytes", "peak_live_bytes"):
            least = min(row[size] for row in rows if row["package"] != OURS and row["name"] != BOUND)
            verdict[f"{size}_over_least_rival"] = by_name[ours][size] / least
    if ours and BOUND in by_name:
        network_s = by_name[ours].get("busiest_nic_s", 0.0)
        verdict["ours_over_compute_alone"] = ratio_to(rounds[ours], rounds[BOUND])
        verdict["ours_over_bound"] = ratio_to(rounds[ours], rounds[BOUND], at_least_s=network_s)
    return verdict


def conditions(rounds: int, warmups: int, load_average_at_start: float) -> dict[str, Any]:
    """What the machine was and how busy."""
    return {
        "cpus": os.cpu_count(),
        "load_average_at_start": load_average_at_start,
        "load_average_at_end": os.getloadavg()[0],
        "rounds": rounds,
        "warmups": warmups,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "this checkout" if package == OURS else "unknown"


def markdown(record: dict[str, Any]) -> str:
    """The record as a table, fastest first, then who was left out and why."""
    networked = any("busiest_nic_s" in row for row in record["results"])
    head = ["implementation", "forward ms", "f+b ms", "quartiles", "CPU ms", "idle %"]
    head += ["sent MiB f+b", "live MiB", "balance"]
    head += ["busiest NIC ms"] if networked else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in record["results"]:
        low, high = row["quartiles_s"]
        forward, total = row["forward_sent_bytes"], row["sent_bytes"]
        cells = [
            f"**{row['name']}**" if row["package"] == OURS else row["name"],
            f"{row['forward_s'] * 1e3:.0f}",
            f"{row['forward_backward_s'] * 1e3:.0f}",
            f"{low * 1e3:.0f}-{high * 1e3:.0f}",
            f"{row['cpu_s'] * 1e3:.0f}",
            f"{row['idle_share'] * 100:.0f}",
            f"{forward / 2**20:.2f}+{(total - forward) / 2**20:.2f}",
            f"{row['peak_live_bytes'] / 2**20:.1f}",
            f"{row['flops_balance']:.2f}",
        ]
        cells += [f"{row['busiest_nic_s'] * 1e3:.0f}" if "busiest_nic_s" in row else ""] if networked else []
        lines.append("| " + " | ".join(cells) + " |")
    verdict = record["verdict"]
    if "ours_over_rival" in verdict:
        lines += ["", f"{verdict['ours']} takes {verdict['ours_over_rival']:.2f}x the time of {verdict['rival']}."]
    if "ours_over_bound" in verdict:
        lines.append(f"It takes {verdict['ours_over_bound']:.2f}x of max(compute alone, its busiest NIC).")
    if record["left_out"]:
        lines += ["", "Left out:", *(f"- {one['name']}: {one['reason']}" for one in record["left_out"])]
    return "\n".join(lines)
