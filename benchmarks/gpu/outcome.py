"""How a check says what came of it: figures in JSON as they come, a line around each case, an exit code."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

#: Exit codes; anything else is a crash, and a crash is a failure.
PASSED, FAILED, CANNOT = 0, 1, 3


class CannotRunError(Exception):
    """What a check needs is not here; the message says what."""


class Run:
    """One run of a check on one device: its figures, and what failed."""

    def __init__(self, device: torch.device, file: Path | None = None) -> None:
        self.device, self._file = device, file
        self.figures: dict[str, Any] = {}
        self.failures: dict[str, str] = {}
        """Traceback by case."""
        self._reasons: list[str] = []

    @contextlib.contextmanager
    def case(self, label: str) -> Iterator[None]:
        """A line before and after; what raises leaves its traceback, and the next case runs."""
        print(f"{label} ...", flush=True)
        start = time.perf_counter()
        try:
            yield
            # Kernels run later than they are called: their errors must be this case's.
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except CannotRunError:
            raise
        except Exception as error:
            self.failures[label] = traceback.format_exc()
            first_line = (str(error).splitlines() or [""])[0]
            self._reasons.append(f"{label}: {type(error).__name__}: {first_line}")
            print(f"{self.failures[label]}{label}: FAILED, {time.perf_counter() - start:.2f} s", flush=True)
        else:
            print(f"{label}: ok, {time.perf_counter() - start:.2f} s", flush=True)
        self.save()

    def save(self) -> None:
        """Write what there is so far, so that it outlasts a crash of this process."""
        if self.failures:
            self.figures |= {"failures": self.failures, "reason": "; ".join(self._reasons)}
        if self._file:
            write_json(self._file, self.figures)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of every check."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--cpu", action="store_true", help="what of it a CPU can run, in a small size")
    made.add_argument("--json", type=Path, help="where its figures go")
    return made


def main(check: Callable[[Run], object], argv: list[str] | None = None) -> int:
    """`run` of a check that has no arguments of its own."""
    return run(check, parser(check.__doc__).parse_args(argv))


def run(check: Callable[[Run], object], args: argparse.Namespace) -> int:
    """Run `check` on the GPU (--cpu: on the CPU), write its figures to --json; returns the exit code.

    A check raises `AssertionError` for a wrong result and `CannotRunError` for what is missing.
    """
    torch.manual_seed(0)
    this = Run(torch.device("cpu"), args.json)
    try:
        if not args.cpu:
            if not torch.cuda.is_available():
                raise CannotRunError("no CUDA device here")
            this.device = torch.device("cuda", torch.cuda.current_device())
        with this.case("whole check"):
            check(this)
    except CannotRunError as error:
        this.figures["reason"] = str(error)
        this.save()
        print(error, flush=True)
        return CANNOT
    print(json.dumps(this.figures, indent=1), flush=True)
    return FAILED if this.failures else PASSED


def write_json(file: Path, value: Any) -> None:
    """Replace a file as a whole: whoever reads it meets the old one or the new one."""
    beside = file.with_name(file.name + ".new")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(beside, file)
