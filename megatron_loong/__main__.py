"""`python -m megatron_loong [--cpu] SCRIPT ...`: run a Megatron training script with megatron_loong installed."""

from __future__ import annotations

import importlib
import os
import runpy
import sys

from megatron_loong.launch import command as command_line


def main(argv: list[str] | None = None) -> int:
    """Run a script or a subcommand; return the exit code. 2: the command line was wrong, and stderr says how."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in command_line.SUBCOMMANDS:
        module, _, function = command_line.SUBCOMMANDS[argv[0]][0].partition(":")
        return getattr(importlib.import_module(module), function)(argv[1:])
    try:
        command = command_line.parse(argv)
    except command_line.UsageError as error:
        return _refuse(error)
    if command.script is None:
        print(command_line.usage())
        return 0
    command_line.take_the_place_of_python(command)
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


def _refuse(error: ValueError) -> int:
    """Say why on one rank; end all of them alike."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"megatron_loong: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
