"""Processes that start with Megatron already imported: forked from one that did it once. A helper, and no tests.

Importing torch and Megatron takes each rank about four seconds of a core, the toy training that the tests look at
less than two. So one process imports both, in CPU mode, and every rank of every run is a fork of it.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: What a rank would import after it has begun: the tokenizers bring transformers, the hooks torch's compiler.
IMPORTED_LATE = ("megatron.core.tokenizers.text", "megatron_loong.integration.hooks")


class Nursery:
    """One process with Megatron imported as a script in `folder` would find it; `run` forks ranks from it."""

    def __init__(self, program: str, folder: Path, environment: Mapping[str, str]) -> None:
        """`program`: a Python file that calls `serve(sys.argv[2], ...)` when its first argument is `--nursery`."""
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", program, "--nursery", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            text=True,
        )
        atexit.register(self.process.kill)

    def run(
        self, arguments: Sequence[str], environments: Sequence[Mapping[str, str]], logs: Sequence[Path], timeout_s: int
    ) -> list[int | None]:
        """One fork per environment, its output in its log. Exit codes; None for a rank that had to be killed.

        Ranks are killed when another one fails, for they would wait for it, or after `timeout_s`.
        """
        request = {
            "arguments": list(arguments),
            "environments": [dict(environment) for environment in environments],
            "logs": list(map(str, logs)),
            "timeout_s": timeout_s,
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that has Megatron imported ended with {self.process.wait()}")
        return json.loads(answer)


@functools.cache
def nursery_of(program: str, folder: Path) -> Nursery:
    """The nursery for the scripts in `folder`, started when first needed and kept until the tests end."""
    repository = str(Path(program).resolve().parents[2])
    path = os.pathsep.join(filter(None, [repository, os.environ.get("PYTHONPATH")]))
    return Nursery(program, folder, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path})


def serve(folder: str, main: Callable[[], int]) -> None:
    """Import Megatron, then answer requests on stdin until it closes. `main` is what a rank runs, with `sys.argv`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Megatron prints while it is imported
    sys.path[0] = folder
    from megatron_loong.integration import cpu_mode

    cpu_mode.enable(allow_with_gpu=True)
    for module in ("megatron.training", *IMPORTED_LATE):
        importlib.import_module(module)
    for line in sys.stdin:
        answers.write(json.dumps(_run(json.loads(line), main)) + "\n")
        answers.flush()


def _run(request: Mapping[str, Any], main: Callable[[], int]) -> list[int | None]:
    children = [
        _fork(request["arguments"], environment, log, main)
        for environment, log in zip(request["environments"], request["logs"], strict=True)
    ]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + request["timeout_s"]
    while len(codes) < len(children) and not any(codes.values()) and time.monotonic() < deadline:
        for child in set(children) - set(codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for child in set(children) - set(codes):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [codes.get(child) for child in children]


def _fork(arguments: Sequence[str], environment: Mapping[str, str], log: str, main: Callable[[], int]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(os.path.dirname(log))
        sys.argv = [sys.argv[0], *arguments]
        code = main()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # as an interpreter that ends does; what it would do besides belongs to the parent
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
