"""How a check says what came of it: an exit code for the one that ran it, and figures in JSON."""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: Exit codes; anything else is a crash, and a crash is a failure.
PASSED, FAILED, CANNOT = 0, 1, 3


class CannotRunError(Exception):
    """What a check needs is not here; the message says what."""


def main(check: Callable[[torch.device], dict[str, Any]], argv: list[str] | None = None) -> int:
    """Run `check` on the GPU (--cpu: on the CPU), print its figures and write them to --json; returns the exit code.

    A check raises `AssertionError` for a wrong result and `CannotRunError` for what is missing.
    """
    parser = argparse.ArgumentParser(description=check.__doc__)
    parser.add_argument("--cpu", action="store_true", help="what of it a CPU can run, in a small size")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    code, result = _run(check, args.cpu)
    for name, value in result.items():
        print(f"{name}: {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return code


def _run(check: Callable[[torch.device], dict[str, Any]], cpu: bool) -> tuple[int, dict[str, Any]]:
    try:
        if not cpu and not torch.cuda.is_available():
            raise CannotRunError("no CUDA device here")
        return PASSED, check(torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device()))
    except CannotRunError as error:
        return CANNOT, {"reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        return FAILED, {"reason": f"{type(error).__name__}: {error}"}
