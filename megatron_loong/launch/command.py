"""The command line of `python -m megatron_loong`: what was asked for, read without torch and without Megatron."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

USAGE = """\
usage: python -m megatron_loong [--cpu] SCRIPT [MEGATRON'S ARGUMENTS ...]
{subcommands}
Runs a Megatron training script (any pretrain_*.py, unedited) with megatron_loong's flags added to Megatron's own:

  torchrun --nproc-per-node 8 -m megatron_loong pretrain_gpt.py \\
      --context-parallel-size 8 --context-parallel-impl loong --loong-head-parallel-size 4 ...

Everything after SCRIPT goes to it as it is; `SCRIPT --help` lists the flags that begin with --loong.

options:
  --cpu   train on the CPU over gloo, without a GPU (slow: for tests and for trying a recipe); the flags that
          a CPU needs are appended unless given. Where a GPU is present, ask twice: --cpu --cpu
  --version, --help

exit status: that of the script or subcommand; 1 where a check says no (doctor, patch --check), 2 where the command line
is wrong.
"""

#: Other things `python -m megatron_loong NAME ...` can do: name -> ("module:function", one line of help).
#: The function takes the remaining arguments as a list and returns an exit code; modules are imported when called.
SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "calibrate": ("megatron_loong.calibration.command:main", "measure this machine for plan"),
    "plan": ("megatron_loong.launch.plan:main", "choose the flags for a model, a cluster and a sequence length"),
    "doctor": ("megatron_loong.integration.doctor:main", "what is installed, which kernels serve, whether flags fit"),
    "sbatch": ("megatron_loong.launch.slurm:main", "write a Slurm batch script"),
    "postmortem": ("megatron_loong.launch.postmortem:main", "which rank was gone or late when communication failed"),
    "patch": ("megatron_loong.launch.patch:main", "put the flag into a Megatron-LM tree, or take it out"),
    "memory": ("megatron_loong.planner.memory_table:main", "the longest sequence that fits, switch by switch"),
}


class UsageError(ValueError):
    """The command line cannot be carried out as written; the message says why."""


@dataclass(frozen=True)
class Command:
    """A parsed command line: a script to run, or (`script` None) only a wish for help."""

    script: str | None
    """Path of the training script as the user wrote it."""

    script_args: tuple[str, ...] = ()
    """What follows the script, untouched."""

    cpu_requests: int = 0
    """How often `--cpu` was given; two means: also where a GPU is present."""


def usage() -> str:
    """The help text, subcommands included."""
    rows = [f"       python -m megatron_loong {name} ...   {text}\n" for name, (_, text) in SUBCOMMANDS.items()]
    return USAGE.format(subcommands="".join(rows))


def parse(argv: list[str]) -> Command:
    """Read the launcher's own options up to the script; the rest belongs to the script.

    Raises `UsageError` for an unknown option, a missing script, or a script that is not a file.

    >>> parse(["--help"]).script is None
    True
    """
    cpu_requests = 0
    for i, word in enumerate(argv):
        if word == "--cpu":
            cpu_requests += 1
        elif word in ("-h", "--help"):
            return Command(script=None)
        elif word.startswith("-"):
            raise UsageError(
                f"{word} is not an option of megatron_loong; it knows --cpu, --version and --help, "
                f"and Megatron's own arguments come after the script"
            )
        elif not os.path.isfile(word):
            expected = f", and the subcommands are {', '.join(SUBCOMMANDS)}" if SUBCOMMANDS else ""
            raise UsageError(f"no such script: {word} (looked in {os.getcwd()}){expected}")
        else:
            return Command(word, tuple(argv[i + 1 :]), cpu_requests)
    raise UsageError("no script was given; name one, such as pretrain_gpt.py, and Megatron's arguments after it")


def take_the_place_of_python(command: Command) -> None:
    """Set `sys.argv` and `sys.path[0]` to what `python SCRIPT ARGS` would have made of them.

    The script's folder comes first: beside pretrain_gpt.py in a Megatron-LM checkout lies a `megatron` package
    that must win over an installed wheel. So this happens before anything imports Megatron.
    """
    assert command.script is not None
    sys.argv = [command.script, *command.script_args]
    # python -P, PYTHONSAFEPATH (3.11 on): Python adds no folder, and neither do we.
    if getattr(sys.flags, "safe_path", False):
        return
    sys.path[0] = os.path.dirname(os.path.realpath(command.script))
    # `python -m` had put the working folder at sys.path[0]; megatron_loong itself may have been found only there,
    # and processes that the script spawns look for it again.
    package_parent = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if package_parent not in (os.path.abspath(entry or ".") for entry in sys.path):
        sys.path.append(package_parent)
