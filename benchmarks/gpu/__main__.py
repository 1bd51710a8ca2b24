"""Run the check: `python -m benchmarks.gpu`, or scripts/gpu_check.sh.

Exit code 0: nothing failed (what cannot run here is said); 1: a step failed or ran out of time; 2: no GPU here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import child, outcome, page, records
from benchmarks.gpu.records import ROOT, StepResult
from benchmarks.gpu.steps import KERNEL, PASSES, STEPS, Step
from megatron_loong.kernels.registry import in_fp8

#: Within which a killed process is gone; and the least time that a step is begun with.
END_S, LEAST_S = 5.0, 5.0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=__doc__)
    add = parser.add_argument
    add("--limit", type=float, default=520.0, metavar="S", help="seconds for all of it (default 520)")
    add("--out", type=Path, metavar="FOLDER", help="for record.json, written anew after every step, and log.txt; "
        "default: a folder in benchmarks/records/, in /tmp with --cpu or --only")  # fmt: skip
    add("--cpu", action="store_true", help="what a CPU can run of it, which proves nothing about a GPU")
    add("--only", nargs="+", metavar="WORD", help="steps whose name has one of these words in it")
    add("--commit", help="for the record, where the checkout came without .git")
    add("--docs", action="store_true", help="make docs/gpu.md from benchmarks/records/ and end")
    add("--list", action="store_true", help="show the commands and end")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    # Importing PyTorch takes seconds, of which the script knows.
    started = time.monotonic() - max(0.0, time.time() - float(os.environ.get("GPU_CHECK_STARTED", time.time())))
    if args.docs:
        (ROOT / "docs" / "gpu.md").write_text(page.render(records.read_all()))
        return 0
    steps = [x for x in STEPS if not args.only or any(word in x.name for word in args.only)]
    if not steps:
        print(f"--only {' '.join(args.only)} matches no step; there are: {'; '.join(x.name for x in STEPS)}")
        return 2
    if args.list:
        for step in steps:
            print(f"{step.name}:\n  {shlex.join(['python', *step.arguments(args.cpu, 'FILE')])}")
        return 0
    if not args.cpu and not torch.cuda.is_available():
        print("There is no CUDA device here, so nothing was checked. --cpu runs what a CPU can run of it.")
        return 2
    machine = records.describe_machine(args.cpu, args.commit)
    if args.out is None:
        partial = args.cpu or args.only
        args.out = Path(tempfile.mkdtemp(prefix="gpu_check_")) if partial else records.folder_of(machine)
    results = Check(machine, args.cpu, args.out, started + args.limit).run_all(steps)
    return 1 if any(result.is_failure for result in results) else 0


class Check:
    """One run of the check: its record and its log, which are written as things happen."""

    def __init__(self, machine: dict[str, Any], cpu: bool, folder: Path, end: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._cpu, self._end, self._folder = cpu, end, folder
        self._log = folder / "log.txt"
        self._log.write_text("")
        self._unseen = self._log.open(encoding="utf-8", errors="replace")
        self.machine, self.results = machine, list[StepResult]()

    def run_all(self, steps: Sequence[Step]) -> list[StepResult]:
        """Every step after the other, and the record after each; those for which no time is left are `not reached`.

        A step that failed before something was found that it can do without is run again without it.
        """
        self._say(json.dumps(self.machine))
        waiting = deque(steps)
        while waiting:
            step, before = waiting.popleft(), switches(self.results)
            self._say(f"== {step.name}: {step.proves}" + (f" {before}" if before else ""))
            self.results.append(self._result(step, before))
            self._save(finished=False)
            result = self.results[-1]
            self._say(f"   {result.status}, {result.seconds:.0f} s. {result.reason}")
            if switches(self.results) != before:
                failed = {x.name for x in self.results if x.is_failure and not x.name.startswith((KERNEL, PASSES))}
                waiting.extendleft(x for x in reversed(steps) if x.name in failed)
        self._save(finished=True)
        lines = ["", f"{self.machine['device']}, commit {self.machine['commit'][:8]}"]
        lines += page.table([dataclasses.asdict(x) for x in self.results])
        self._say("\n".join([*lines, f"{self._folder}: record.json and log.txt"]))
        return self.results

    def _result(self, step: Step, environment: dict[str, str]) -> StepResult:
        left_s = self._end - time.monotonic() - END_S
        if (step.on_cpu if self._cpu else step.on_gpu) is None:
            return StepResult(step.name, "cannot run here", 0.0, f"is for a {'GPU' if self._cpu else 'CPU'}")
        try:
            fault = step.fault("cpu" if self._cpu else "cuda")
        except Exception:  # the step itself will say more
            fault = None
        if fault is not None:
            return StepResult(step.name, "cannot run here", 0.0, fault)
        if left_s < LEAST_S:
            return StepResult(step.name, "not reached", 0.0, "the check's time was over")
        return self.run_step(step, min(step.limit_s, left_s), environment)

    def run_step(self, step: Step, limit_s: float, environment: dict[str, str]) -> StepResult:
        """One step in a process of its own, with all that it starts; its output goes to the log as it comes."""
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder, self._log.open("ab") as log:
            file = Path(folder) / "figures.json"
            process = subprocess.Popen(
                child.command(limit_s, step.arguments(self._cpu, str(file))),
                cwd=ROOT,
                env={**os.environ, **_for_children(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            while process.poll() is None and time.monotonic() < start + limit_s:
                time.sleep(0.05)
                self._show()
            code = process.poll()
            _end(process)
            self._show()
            figures = json.loads(file.read_text()) if file.exists() else {}
        seconds = time.monotonic() - start
        if code is None:
            reason = "; ".join(filter(None, [f"no end after {limit_s:.0f} s", figures.pop("reason", "")]))
            return StepResult(step.name, "timed out", seconds, reason, figures, environment)
        return dataclasses.replace(judge(step, code, seconds, figures), switches=environment)

    def _save(self, finished: bool) -> None:
        steps = [dataclasses.asdict(x) for x in self.results]
        outcome.write_json(self._folder / "record.json", {**self.machine, "finished": finished, "steps": steps})

    def _say(self, text: str) -> None:
        with self._log.open("a") as log:
            log.write(text + "\n")
        self._show()

    def _show(self) -> None:
        """Print what is new in the log: all that is said goes there first."""
        print(self._unseen.read(), end="", flush=True)


def switches(results: Sequence[StepResult]) -> dict[str, str]:
    """Environment variables for the steps to come, so that what failed does not take them with it."""
    failed = {x.name for x in results if x.is_failure}
    found = {"LOONG_TRITON": "0"} if PASSES in failed else {}
    kernels = [x for x in results if x.name.startswith(KERNEL)]
    names = [x.name.removeprefix(KERNEL) for x in kernels if x.status == "passed"]
    useful = [x for x in names if x != "reference" and not in_fp8(x)]
    if useful and any(x.is_failure and not in_fp8(x.name.removeprefix(KERNEL)) for x in kernels):
        found["LOONG_KERNEL"] = useful[0]
    return found


def _for_children() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}


def _end(process: subprocess.Popen) -> None:
    """Kill what is left of a step and of all that it started, and wait a little until it is gone."""
    end = time.monotonic() + END_S
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        while time.monotonic() < end:
            process.poll()
            os.killpg(process.pid, 0)  # raises when nobody is left
            time.sleep(0.05)


def judge(step: Step, code: int, seconds: float, figures: dict[str, Any]) -> StepResult:
    """What an exit code and figures mean. A step that ends well and leaves no figures has not shown anything."""
    reason = str(figures.pop("reason", ""))
    if code == outcome.PASSED and figures:
        return StepResult(step.name, "passed", seconds, "", figures)
    if code == outcome.CANNOT:
        return StepResult(step.name, "cannot run here", seconds, reason)
    reason = reason or ("it left no figures" if code == outcome.PASSED else f"ended with {code}; see log.txt")
    return StepResult(step.name, "failed", seconds, reason, figures)


if __name__ == "__main__":
    sys.exit(main())
