#!/usr/bin/env python3
"""How far the planner's layout is from the best of an exhaustive sweep, on emulated clusters. Needs root and iproute2.

sudo scripts/measure_regret.py --record              # every case, then docs/planner.md; it needs a quiet machine
sudo scripts/measure_regret.py --only 2x4-1x400mbit  # one network
scripts/measure_regret.py --record --minutes 0       # measure nothing; write what there is into the documentation

For each network: `benchmarks.regret_run` on it, which calibrates and measures all layouts in one run. What
was measured stays in runs/regret, and a case that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.regret import AIM, CASES, Case, Network, regret, table

ROOT = Path(__file__).resolve().parents[1]
RECORDS, PAGE = ROOT / "docs" / "benchmarks" / "regret.json", ROOT / "docs" / "planner.md"
BEGIN, END = "<!-- regret: written by scripts/measure_regret.py -->\n", "<!-- end of regret -->\n"


def measure(network: Network, cases: list[Case], folder: Path, seconds: float) -> None:
    """Every rank of the emulated cluster measures these cases; `CalledProcessError` when that fails."""
    shapes = ["-".join(map(str, case.shape)) for case in cases]
    run = [sys.executable, "-m", "benchmarks.regret_run", network.name, *shapes]
    emulate = [str(ROOT / "scripts" / "emulate_cluster.sh"), str(network.nodes), str(network.ranks_per_node)]
    nics = ["--nic", network.nic, "--nics-per-node", str(network.nics_per_node)]
    command = [*emulate, *nics, "--", *run, "--folder", str(folder), "--seconds", str(seconds)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHON": sys.executable}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


def write_records(records: list[dict[str, object]]) -> None:
    """The recorded results, one case a line, and the section of docs/planner.md that shows them."""
    lines = ",\n".join(json.dumps(record) for record in records)
    RECORDS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + section(records) + END + rest.split(END)[1], encoding="utf-8")


def section(records: list[dict[str, object]]) -> str:
    """What stands between the two marks of the page."""
    loads = [float(str(record["load_average"])) for record in records]
    conditions = f"{records[0]['conditions']}; load average before a case {min(loads)} to {max(loads)}"
    return table(records, conditions)


def main() -> int:
    names = list(dict.fromkeys(case.network.name for case in CASES))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NETWORK", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=12.0, help="for the last rounds of a case (default 12)")
    parser.add_argument("--minutes", type=float, default=25.0, help="no network is begun after these (default 25)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "regret")
    parser.add_argument("--record", action="store_true", help="write what was measured into docs/")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    finish = time.monotonic() + 60 * args.minutes
    for network, cases in itertools.groupby(CASES, key=lambda case: case.network):
        missing = [case for case in cases if not (args.folder / f"{case.name}.json").exists()]
        if network.name in args.only and missing and time.monotonic() < finish:
            try:
                measure(network, missing, args.folder, args.seconds)
            except subprocess.CalledProcessError as error:
                print(f"{network.name}: not measured, exit code {error.returncode}", file=sys.stderr)
    paths = [args.folder / f"{case.name}.json" for case in CASES]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    if not records:
        print("no case was measured", file=sys.stderr)
        return 1
    if args.record:
        write_records(records)
    print(section(records))
    return 0 if all(regret(record).share <= AIM for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
