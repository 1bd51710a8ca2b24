"""One process of the check: `python -m benchmarks.gpu.child LIMIT_S (-m MODULE | FILE) [ARGUMENTS]`.

Ten seconds before its limit it prints where all its threads are, and it ends with the process that started it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
#: Between the traceback and the limit.
MARGIN_S = 10.0


def command(limit_s: float, arguments: Sequence[str]) -> list[str]:
    """The command of such a process; `arguments` are Python's."""
    return [sys.executable, "-m", __spec__.name, f"{limit_s:.1f}", *arguments]


def main() -> None:
    """Become the program that the arguments name."""
    limit_s = float(sys.argv[1])
    faulthandler.dump_traceback_later(max(limit_s - MARGIN_S, limit_s / 2))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    del sys.argv[:2]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as Python does, for what lies beside a script
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
