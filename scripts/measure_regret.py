#!/usr/bin/env python3
"""How far the planner's layout is from the best of an exhaustive sweep, on emulated clusters. Needs root and iproute2.

sudo scripts/measure_regret.py                       # every network and shape, twelve cases
sudo scripts/measure_regret.py --only 2x4-1x400mbit  # one network

For each network: `calibrate` on it, then scripts/bench_attention.py with all of our layouts for each shape. What was
measured stays in runs/regret, and a case that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from megatron_loong.bench.regret import HEAD_DIM, NETWORKS, SHAPES, Heads, Network, Regret, regret
from megatron_loong.bench.rivals.ours import Loong
from megatron_loong.bench.rivals.registry import all_contestants
from megatron_loong.planner.hardware import load_hardware

ROOT = Path(__file__).resolve().parents[1]


def on_cluster(network: Network, *command: str) -> None:
    """Run a command once per rank of the emulated cluster; `CalledProcessError` when it fails."""
    emulate = [str(ROOT / "scripts" / "emulate_cluster.sh"), str(network.nodes), str(network.ranks_per_node)]
    nics = ["--nic", network.nic, "--nics-per-node", str(network.nics_per_node)]
    subprocess.run([*emulate, *nics, "--", sys.executable, *command], check=True, cwd=ROOT)


def calibrated(network: Network, folder: Path) -> Path:
    """The profile of a network, measured once."""
    path = folder / f"{network.name}.json"
    if not path.exists():
        options = ["--nics-per-node", str(network.nics_per_node), "--nic-order", "cyclic"]
        options += ["--heads", "4", "--head-dim", str(HEAD_DIM), "--seconds", "0.3"]
        on_cluster(network, "-m", "megatron_loong", "calibrate", "--output", str(path), *options)
    return path


def measured(network: Network, shape: Heads, folder: Path, rounds: int) -> Regret:
    """One case."""
    path = folder / f"{network.name}-{'-'.join(map(str, shape))}.json"
    if not path.exists():
        sizes = ["--seq-len", shape.seq_len, "--heads", shape.heads, "--kv-heads", shape.kv_heads]
        options = [*sizes, "--head-dim", HEAD_DIM, "--only", "loong*", "--rounds", rounds, "--json", path]
        on_cluster(network, "scripts/bench_attention.py", *map(str, options))
    hardware = load_hardware(str(calibrated(network, folder)))
    contestants = all_contestants(network.nodes * network.ranks_per_node)
    layouts = [one.config for one in contestants if isinstance(one, Loong)]
    return regret(json.loads(path.read_text())["results"], layouts, network, shape, hardware)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[n.name for n in NETWORKS], default=[n.name for n in NETWORKS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "regret")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for network in NETWORKS:
        if network.name not in args.only:
            continue
        calibrated(network, args.folder)
        for shape in SHAPES:
            case = measured(network, shape, args.folder, args.rounds)
            rows.append(case.share)
            heads = f"S {shape.seq_len}, heads {shape.heads}:{shape.kv_heads}"
            print(
                f"{network.name}, {heads}: planner {case.chosen} {1e3 * case.chosen_s:.0f} ms, best {case.best} "
                f"{1e3 * case.best_s:.0f} ms, regret {100 * case.share:.1f}%",
                flush=True,
            )
    within = sum(share <= 0.05 for share in rows)
    print(f"{within} of {len(rows)} cases within 5%; the largest regret is {100 * max(rows):.1f}%")
    return 0 if within == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
