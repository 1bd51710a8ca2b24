"""`python -m megatron_loong [--cpu] SCRIPT ...`: run a Megatron training script with megatron_loong installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import signal
import sys

import megatron_loong
from megatron_loong.launch import command as command_line

_WITHOUT_TORCH = (
    f"torch is not installed in {sys.executable}; install it with `pip install torch`, or take the Python that has it "
    "(plan, memory, sbatch, postmortem and patch need none)"
)


def main(argv: list[str] | None = None) -> int:
    """Run a script or a subcommand; return the exit code. 2: the command line was wrong, and stderr says how."""
    argv = sys.argv[1:] if argv is None else argv
    is_subcommand = bool(argv) and argv[0] in command_line.SUBCOMMANDS
    if argv[is_subcommand : is_subcommand + 1] == ["--version"]:
        print(f"megatron_loong {megatron_loong.__version__}")
        return 0
    if is_subcommand:
        return _run_subcommand(*argv)
    try:
        command = command_line.parse(argv)
    except command_line.UsageError as error:
        if not argv and int(os.environ.get("RANK", "0")) == 0:
            print(command_line.usage(), file=sys.stderr)
        return _refuse(error)
    if command.script is None:
        print(command_line.usage())
        return 0
    command_line.take_the_place_of_python(command)
    if importlib.util.find_spec("torch") is None:
        return _refuse(ModuleNotFoundError(_WITHOUT_TORCH))
    if command.cpu_requests:
        from megatron_loong.integration import cpu_mode

        script_args = list(command.script_args)
        try:
            cpu_mode.enable(allow_with_gpu=command.cpu_requests > 1, argv=script_args)
        except ValueError as error:
            return _refuse(error)
        sys.argv[1:] = script_args
    from megatron_loong.integration import install

    install()
    runpy.run_path(command.script, run_name="__main__")
    return 0


def _run_subcommand(name: str, *argv: str) -> int:
    """Its exit code; what the machine refuses (a file, a missing torch) is one line, and `| head` is no error."""
    module, _, function = command_line.SUBCOMMANDS[name][0].partition(":")
    try:
        code = getattr(importlib.import_module(module), function)([*argv])
        sys.stdout.flush()  # here, where a reader that has gone is no traceback
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return 128 + signal.SIGPIPE
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        return _refuse(ModuleNotFoundError(f"{name}: {_WITHOUT_TORCH}"))
    except OSError as error:
        if error.filename is None:
            raise
        return _refuse(error)


def _refuse(error: Exception) -> int:
    """Say why on one rank; end all of them alike."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"megatron_loong: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
