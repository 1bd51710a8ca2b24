"""The steps of the check: what each proves, by which command, and how long it may take."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

_CHECK = "megatron_loong.bench.gpu."


@dataclass(frozen=True)
class Step:
    """One command of its own process. It writes figures to the file that `{json}` names and ends with an exit code
    of `outcome`."""

    name: str
    proves: str
    command: tuple[str, ...]
    """Arguments of Python; `{json}` stands for a file."""
    limit_s: float
    on_cpu: bool = True
    """Whether it has a small mode for a CPU (`--cpu`)."""

    @property
    def missing(self) -> str | None:
        """The module that the command runs, when it is not there; else None."""
        if self.command[0] != "-m" or importlib.util.find_spec(self.command[1]) is not None:
            return None
        return self.command[1]


def _check(name: str, module: str, proves: str, limit_s: float, *arguments: str, on_cpu: bool = True) -> Step:
    return Step(name, proves, ("-m", _CHECK + module, *arguments, "--json", "{json}"), limit_s, on_cpu)


#: In this order: what is wrong matters more than what is slow. The limits add up to more than the whole check may
#: take, which has a limit of its own.
STEPS = (
    _check("kernels", "kernels", "every kernel that serves this device agrees with float64; its speed", 120),
    _check(
        "attention in fp8",
        "fp8",
        "kernels with a forward in fp8 stay within e4m3's error of float64, heads of unequal size and many keys too",
        60,
        on_cpu=False,
    ),
    _check("passes over memory", "passes", "merging, adding up and packing agree with float64, by Triton", 60),
    _check(
        "all ranks on one device",
        "simulated",
        "attention of 8 ranks in one process is exact in float64, and in bfloat16 as accurate as one call",
        60,
    ),
    _check("4 processes, staged gloo", "ranks", "ranks that share a GPU agree, over gloo", 90, "--backend", "gloo"),
    _check("4 processes, NCCL", "ranks", "the same over NCCL, where it allows that", 90, "--backend", "nccl"),
    _check(
        "no synchronisation, CUDA graphs",
        "syncs",
        "attention never makes the host wait, and a layer can be captured in a graph",
        60,
        on_cpu=False,
    ),
    _check("Selective Checkpoint++", "checkpoint", "its gradients are those of full recomputation, bit for bit", 60),
    _check(
        "Megatron training, one rank",
        "training",
        "losses with and without the plugin are equal, step times within 1%",
        150,
    ),
    Step(
        "copy rates",
        "merging, adding up and packing at 85% of the card's copy bandwidth",
        ("-m", "megatron_loong.bench.copy_rate", "--json", "{json}"),
        90,
        on_cpu=False,
    ),
    Step(
        "one rank against its kernel",
        "efficiency of a rank's whole schedule: 0.95 at 8K tokens a rank, 0.97 at 32K, on H100 and H200",
        ("scripts/bench_rank.py", "--json", "{json}"),
        180,
    ),
)
