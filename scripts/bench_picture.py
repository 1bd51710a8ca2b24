#!/usr/bin/env python3
"""Draw records of scripts/bench_attention.py, one panel each, fastest on top, and print their tables.

python scripts/bench_picture.py runs/bench/mha.json runs/bench/gqa.json --picture docs/images/bench.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.report import markdown

OURS, RIVAL, BOUND, INK = "#1f4e79", "#f2a154", "#9aa5ae", "#b03a2e"


def draw(record: dict[str, Any], axes: Any) -> None:
    """Bars of forward (pale) and forward + backward, the quartiles, and the bounds of machine and network."""
    rows = record["results"]
    for place, row in enumerate(rows):
        colour = OURS if row["package"] == "megatron-loong" else BOUND if row["name"] == "compute alone" else RIVAL
        low, high = (1e3 * x for x in row["quartiles_s"])
        total, forward = 1e3 * row["forward_backward_s"], 1e3 * row["forward_s"]
        axes.barh(place, total, color=colour, height=0.72)
        axes.barh(place, forward, color="white", alpha=0.45, height=0.72)
        axes.plot([low, high], [place, place], color="black", linewidth=0.8)
        axes.text(max(total, high), place, f" {total:.0f}", va="center", fontsize=7)
        if row.get("busiest_nic_s"):
            network = 1e3 * row["busiest_nic_s"]
            axes.plot([network, network], [place - 0.42, place + 0.42], color=INK, linewidth=2)
    alone = next((row for row in rows if row["name"] == "compute alone"), None)
    if alone is not None:
        axes.axvline(1e3 * alone["forward_backward_s"], color=BOUND, linestyle="--", linewidth=1, zorder=0)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7.5)
    axes.invert_yaxis()
    axes.set_title(title(record), fontsize=9)
    axes.set_xlabel("ms: forward (pale) + backward, slowest rank, median of rounds; line: quartiles", fontsize=7.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=7.5)


def title(record: dict[str, Any]) -> str:
    """Where and on what."""
    cluster = record["cluster"]
    where = f"one machine, {record['ranks']} ranks"
    if cluster:
        nics = "one NIC" if cluster["nics_per_node"] == 1 else f"{cluster['nics_per_node']} NICs"
        where = f"{cluster['nodes']} nodes x {cluster['ranks_per_node']} ranks, {nics} of {cluster['nic_rate']} a node"
    return f"{where}\n{record['shape']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--picture", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    records = [json.loads(path.read_text()) for path in args.records]
    columns = min(2, len(records))
    lines = -(-len(records) // columns)
    tallest = max(len(record["results"]) for record in records)
    size = (6.4 * columns, lines * (0.21 * tallest + 1.1) + 0.4)
    figure, panels = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for panel in panels.flat[len(records) :]:
        panel.set_visible(False)
    for record, panel in zip(records, panels.flat, strict=False):
        draw(record, panel)
    keys: list[Any] = [Patch(color=OURS, label="megatron_loong"), Patch(color=RIVAL, label="rivals")]
    keys += [Patch(color=BOUND, label="compute alone, nothing sent")]
    if any(record["cluster"] for record in records):
        keys.append(Line2D([], [], color=INK, linewidth=2, label="bytes of the busiest NIC / its measured bandwidth"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=8)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=110)
    for record in records:
        print(f"### {title(record)}\n\n{markdown(record)}\n".replace("\nS ", ", S "))
    print(f"picture: {args.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
