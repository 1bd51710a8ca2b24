"""Run the check: `python -m megatron_loong.bench.gpu`, or scripts/gpu_check.sh.

Exit code 0: nothing failed (what cannot run here is said); 1: a step failed or ran out of time; 2: no GPU here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_loong.bench.gpu import outcome, page, records
from megatron_loong.bench.gpu.records import ROOT, StepResult
from megatron_loong.bench.gpu.steps import STEPS, Step

TOTAL_LIMIT_S = 590.0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="what a CPU can run of it; leaves no record")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="steps whose name has one of these words in it")
    parser.add_argument("--json", type=Path, help="write the record here too")
    parser.add_argument("--docs", action="store_true", help="make docs/gpu.md from benchmarks/records/ and end")
    parser.add_argument("--list", action="store_true", help="show the commands and end")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.docs:
        (ROOT / "docs" / "gpu.md").write_text(page.render(records.read_all()))
        return 0
    steps = [x for x in STEPS if not args.only or any(word in x.name for word in args.only)]
    if not steps:
        print(f"--only {' '.join(args.only)} matches no step; there are: {'; '.join(x.name for x in STEPS)}")
        return 2
    if args.list:
        for step in steps:
            print(f"{step.name}:\n  {shlex.join(['python', *step.command]).replace('{json}', 'FILE')}")
        return 0
    if not args.cpu and not torch.cuda.is_available():
        print("There is no CUDA device here, so nothing was checked. --cpu runs what a CPU can run of it.")
        return 2
    machine = records.describe_machine(args.cpu)
    results = run_all(steps, args.cpu, TOTAL_LIMIT_S)
    record = records.make_record(machine, results)
    print("\n".join(["", f"{machine['device']}, commit {machine['commit'][:8]}", *page.table(record["steps"])]))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.cpu:
        print("On a CPU: no record is kept, and nothing about a GPU is shown.")
    elif args.only:
        print("Some steps only: no record is kept.")
    else:
        print(f"record: {records.write(record)}; scripts/gpu_check.sh --docs makes docs/gpu.md from it")
    return 1 if any(result.is_failure for result in results) else 0


def run_all(steps: Sequence[Step], cpu: bool, total_limit_s: float) -> list[StepResult]:
    """Every step after the other; those for which no time is left are `not reached`."""
    end, results = time.monotonic() + total_limit_s, []
    for step in steps:
        left_s = end - time.monotonic()
        print(f"== {step.name}: {step.proves}", flush=True)
        if cpu and not step.on_cpu:
            result = StepResult(step.name, "cannot run here", 0.0, "needs a GPU")
        elif step.missing:
            result = StepResult(step.name, "cannot run here", 0.0, f"{step.missing} is missing")
        elif left_s < 1:
            result = StepResult(step.name, "not reached", 0.0, f"the check's {total_limit_s:g} s were over")
        else:
            result = run_step(step, cpu, min(step.limit_s, left_s))
        results.append(result)
        print(f"   {result.status}, {result.seconds:.0f} s. {result.reason}", flush=True)
    return results


def run_step(step: Step, cpu: bool, limit_s: float) -> StepResult:
    """One step in a process of its own, with all that it starts; its output goes where this one's goes."""
    with tempfile.TemporaryDirectory(prefix="loong_gpu_check_") as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, *(x.replace("{json}", str(file)) for x in step.command), *(["--cpu"] if cpu else [])]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            _end(process)
            return StepResult(step.name, "timed out", time.monotonic() - start, f"no end after {limit_s:.0f} s")
        figures = json.loads(file.read_text()) if file.exists() else {}
    return judge(step, code, time.monotonic() - start, figures)


def _end(process: subprocess.Popen) -> None:
    """End a step and all that it started. torchrun's workers lead sessions of their own, so it gets time for them."""
    for sign, patience_s in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
            end = time.monotonic() + patience_s
            while time.monotonic() < end:
                process.poll()
                os.killpg(process.pid, 0)  # raises when nobody is left
                time.sleep(0.05)
    process.wait()


def judge(step: Step, code: int, seconds: float, figures: dict[str, Any]) -> StepResult:
    """What an exit code and figures mean. A step that ends well and leaves no figures has not shown anything."""
    reason = str(figures.pop("reason", ""))
    if code == outcome.PASSED and figures:
        return StepResult(step.name, "passed", seconds, "", figures)
    if code == outcome.CANNOT:
        return StepResult(step.name, "cannot run here", seconds, reason)
    reason = reason or ("it left no figures" if code == outcome.PASSED else f"ended with {code}; see its output above")
    return StepResult(step.name, "failed", seconds, reason, figures)


if __name__ == "__main__":
    sys.exit(main())
