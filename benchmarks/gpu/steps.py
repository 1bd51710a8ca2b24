"""The steps of the check: what each proves, by which command, and how long it may take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.gpu import kernels, ranks, training
from megatron_loong.kernels.registry import KERNELS, in_fp8

_CHECK = "benchmarks.gpu."
KERNEL, PASSES = "kernel ", "passes over memory"


def _no_fault(device_type: str) -> str | None:
    return None


@dataclass(frozen=True)
class Step:
    """One command of its own process. It writes figures to the file that `{json}` names and ends with an exit code
    of `outcome`."""

    name: str
    proves: str
    command: tuple[str, ...]
    """Arguments of Python; `{json}` stands for a file."""
    limit_s: float
    on_gpu: tuple[str, ...] | None = ()
    """Further arguments on a GPU; None: it is for a CPU alone."""
    on_cpu: tuple[str, ...] | None = ("--cpu",)
    """Further arguments on a CPU; None: it is for a GPU alone."""
    fault: Callable[[str], str | None] = _no_fault
    """Why it cannot run on a device of this type, found without a process; None where it can."""

    def arguments(self, cpu: bool, json: str) -> list[str]:
        """What Python is given."""
        words = [*self.command, *((self.on_cpu if cpu else self.on_gpu) or ())]
        return [x.replace("{json}", json) for x in words]


def _check(
    name: str,
    module: str,
    proves: str,
    limit_s: float,
    *arguments: str,
    on_cpu: bool = True,
    fault: Callable[[str], str | None] = _no_fault,
) -> Step:
    command = ("-m", _CHECK + module, *arguments, "--json", "{json}")
    return Step(name, proves, command, limit_s, on_cpu=("--cpu",) if on_cpu else None, fault=fault)


def _kernel(name: str) -> Step:
    within = "stays within e4m3's error of" if in_fp8(name) else "agrees with"
    proves = f"it {within} float64, whole and in blocks; its speed"
    step = _check(KERNEL + name, "kernels", proves, 60, name, fault=functools.partial(kernels.fault, name))
    return replace(step, on_gpu=None) if name == "cpu_flash" else step


def _ranks(backend: str, name: str, proves: str) -> Step:
    fault = functools.partial(ranks.fault, backend)
    return _check(name, "ranks", proves, ranks.LIMIT_S + 20, "--backend", backend, fault=fault)


def _rank_alone(tokens: int, aim: float, limit_s: float, on_cpu: tuple[str, ...] | None) -> Step:
    return Step(
        f"one rank against its kernel, {tokens // 1024}K",
        f"efficiency of a rank's whole schedule at {tokens} tokens a rank; aim {aim:g} on H100 and H200",
        ("scripts/bench_rank.py", "--json", "{json}"),
        limit_s,
        on_gpu=("--tokens-per-rank", str(tokens)),
        on_cpu=on_cpu,
    )


#: What is worth most when time runs out comes first. The limits add up to more than the whole check may take, which
#: has a limit of its own.
STEPS = (
    *(_kernel(name) for name in KERNELS),
    _rank_alone(8192, 0.95, 90, on_cpu=("--cpu",)),
    _check(PASSES, "passes", "merging, adding up and packing agree with float64, by Triton", 60),
    Step(
        "copy rates",
        "merging, adding up and packing beside the card's copy bandwidth; aim 85%",
        ("-m", "benchmarks.copy_rate", "--json", "{json}"),
        60,
        on_cpu=("--device", "cpu", "--tokens", "64", "--copy-bytes", "65536"),
    ),
    _check(
        "no synchronisation, CUDA graphs",
        "syncs",
        "attention never makes the host wait, and a layer can be captured in a graph",
        60,
        on_cpu=False,
    ),
    _check(
        "all ranks on one device",
        "simulated",
        "attention of 8 ranks in one process is exact in float64, and in bfloat16 as accurate as one call",
        90,
    ),
    _rank_alone(32768, 0.97, 120, on_cpu=None),
    Step(
        "other people's rings",
        "efficiency of yunchang's and ring-flash-attn's rings over the same kernel, 64:8 and 32:32 heads",
        ("scripts/bench_rank.py", "--rivals", "--json", "{json}"),
        120,
    ),
    _check(
        "NCCL, one rank",
        "self_messages",
        "messages and all-to-all to oneself: numbers, no wait of the host, beside a computation, in a CUDA graph",
        60,
    ),
    _ranks("nccl", "4 processes, NCCL", "ranks that share a GPU agree, over NCCL, where it allows that"),
    _ranks("gloo", "4 processes, staged gloo", "ranks that share a GPU agree, over gloo"),
    _check("Selective Checkpoint++", "checkpoint", "its gradients are those of full recomputation, bit for bit", 40),
    Step(
        "Megatron's layer",
        "the plugin's core attention on 4 ranks in one process beside Megatron's own on one",
        ("scripts/check_core_attention.py", "--json", "{json}"),
        60,
        fault=lambda device_type: training.not_installed("megatron.core"),
    ),
    _check(
        "Megatron training, one rank",
        "training",
        "losses with and without the plugin are equal; the ratio of step times",
        2 * training.LIMIT_S + 10,
        fault=lambda device_type: training.fault(),
    ),
)
