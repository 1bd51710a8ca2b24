"""A run of the check as a record: what machine, what versions, what came of each step."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks" / "records"
PACKAGES = ("megatron-core", "flash-attn", "flash-attn-3", "flash-attn-4", "transformer-engine", "triton", "yunchang",
            "ring-flash-attn")  # fmt: skip


@dataclass(frozen=True)
class StepResult:
    """What came of one step."""

    name: str
    status: str
    """`passed`, `failed`, `timed out`, `cannot run here` or `not reached`."""
    seconds: float
    reason: str = ""
    """Why it did not pass."""
    figures: dict[str, Any] = field(default_factory=dict)
    switches: dict[str, str] = field(default_factory=dict)
    """Environment variables that kept it from what had failed before."""

    @property
    def is_failure(self) -> bool:
        """Whether something is wrong, rather than missing."""
        return self.status in ("failed", "timed out")


def describe_machine(cpu: bool, commit: str | None = None) -> dict[str, Any]:
    """Device, driver, versions and commit (by default that of the checkout)."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    date = time.strftime("%Y-%m-%d %H:%M", time.gmtime())  # UTC
    machine: dict[str, Any] = {"date": date, "device": "CPU", "commit": commit or _commit(), "versions": versions}
    if not cpu:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        if dist.is_nccl_available():
            versions["nccl"] = ".".join(map(str, nccl.version()))
        machine |= {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        }
    return machine


def folder_of(machine: dict[str, Any]) -> Path:
    """Where a whole run on a GPU goes unless it is told: among the records, under device, date and commit."""
    words = (machine["device"], re.sub(r"\D", "", machine["date"]), machine["commit"][:8])
    return RECORDS / re.sub(r"[^a-z0-9]+", "_", "_".join(words).lower()).strip("_")


def read_all(folder: Path = RECORDS) -> list[dict[str, Any]]:
    """All records, the latest first; `ValueError` for that of a CPU."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*/record.json"))]
    if any(record["device"] == "CPU" for record in records):
        raise ValueError(f"a CPU's record proves nothing about a GPU and does not belong in {folder}")
    return sorted(records, key=lambda record: record["date"], reverse=True)


def _commit() -> str:
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return (commit or "unknown") + ("-changed" if changed else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
