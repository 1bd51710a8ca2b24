"""A run of the check as a record: what machine, what versions, what came of each step."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
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

    @property
    def is_failure(self) -> bool:
        """Whether something is wrong, rather than missing."""
        return self.status in ("failed", "timed out")


def describe_machine(cpu: bool) -> dict[str, Any]:
    """Device, driver, versions and commit."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine: dict[str, Any] = {"device": "CPU", "commit": _commit(), "versions": versions}
    if not cpu:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        machine |= {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        }
    return machine


def make_record(machine: dict[str, Any], results: list[StepResult]) -> dict[str, Any]:
    """Ready for JSON; the date is UTC."""
    date = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    return {"date": date, **machine, "steps": [asdict(result) for result in results]}


def write(record: dict[str, Any], folder: Path = RECORDS) -> Path:
    """Write a GPU's record to `folder`, under a name that says device, date and commit. `ValueError` for a CPU's."""
    if record["device"] == "CPU":
        raise ValueError("a CPU's record proves nothing about a GPU and does not belong among the records")
    folder.mkdir(parents=True, exist_ok=True)
    words = (record["device"], re.sub(r"\D", "", record["date"]), record["commit"][:8])
    path = folder / (re.sub(r"[^a-z0-9]+", "_", "_".join(words).lower()).strip("_") + ".json")
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def read_all(folder: Path = RECORDS) -> list[dict[str, Any]]:
    """All records, the latest first."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
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
