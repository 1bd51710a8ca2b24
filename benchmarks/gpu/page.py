"""docs/gpu.md, made from the records: what has been proven on which GPU, and what has not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.steps import STEPS, Step

_HEAD = """# GPUs: what has been proven

<!-- Made by `scripts/gpu_check.sh --docs` from benchmarks/records/; do not edit. -->

On a machine with PyTorch and one NVIDIA GPU, in this checkout, without a network:

```bash
scripts/gpu_check.sh --limit 520 --out gpu_run      # --commit $(git rev-parse HEAD) where .git did not come along
```

It ends within `--limit` seconds, and leaves two files: `gpu_run/record.json`, written anew after every step (device,
driver, versions, commit; of each step the result, the figures, the traceback of what failed), and `gpu_run/log.txt`,
all output as it came. A check that is killed leaves what it had. Each step, and each kernel, is a process with a time
limit of its own. A kernel that fails is not used by later steps, nor Triton if its passes fail; the record says so
(`switches`).

Without `--out` both go to a folder of `benchmarks/records/`, from which `scripts/gpu_check.sh --docs` makes this page.
Send yours. `--cpu` runs what a CPU can run of it; `--list` shows the commands, each of which runs by itself too.

The two steps of Megatron need megatron-core 0.17 or newer on `PYTHONPATH` (or a Megatron-LM checkout there and in
`MEGATRON_LM_PATH`); other people's rings need yunchang and ring-flash-attn. A step that lacks what it needs says so.
"""


_NEEDS_MORE = """What takes several GPUs is in no step, and unproven: NCCL between devices.
"""

_STEPS = [step for step in STEPS if step.on_gpu is not None]


def render(records: Sequence[dict[str, Any]]) -> str:
    """The page; `records` with the latest first."""
    parts = [_HEAD, _proven(records), _NEEDS_MORE, *(_one(record) for record in records)]
    return "\n".join(parts)


def _proven(records: Sequence[dict[str, Any]]) -> str:
    if not records:
        lines = ["**Nothing has been proven on a GPU yet**: there is no record. Unproven is each of these:", ""]
        return "\n".join([*lines, *(f"- {step.name}: {step.proves}" for step in _STEPS), ""])
    lines = ["| step | shows that | passed on | failed on |", "|---|---|---|---|"]
    for step in _STEPS:
        cells = [_devices(records, step, "passed"), _devices(records, step, "failed", "timed out")]
        lines.append(f"| {step.name} | {step.proves} | {cells[0] or '**nothing yet**'} | {cells[1]} |")
    return "\n".join([*lines, ""])


def _devices(records: Sequence[dict[str, Any]], step: Step, *statuses: str) -> str:
    """Devices whose latest record of a step has one of these statuses."""
    latest: dict[str, str] = {}
    for record in records:
        for result in reversed(record["steps"]):  # one that was run again counts as it ended
            if result["name"] == step.name and result["status"] not in ("cannot run here", "not reached"):
                latest.setdefault(record["device"], result["status"])
    return ", ".join(sorted(device for device, status in latest.items() if status in statuses))


def _one(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    driver, capability = (record.get(name, "unknown") for name in ("driver", "compute_capability"))
    lines = [
        f"## {record['device']}, {record['date']}",
        "",
        f"*Measured* by `scripts/gpu_check.sh` at commit {record['commit'][:8]}: driver {driver}, compute capability "
        f"{capability}, {versions}.",
        "",
        *table(record["steps"]),
        "",
    ]
    for shape in _shapes(record):
        lines += [*_efficiencies(shape), ""]
    return "\n".join(lines)


def table(steps: Sequence[dict[str, Any]]) -> list[str]:
    """What came of each step, as the check prints it too."""
    lines = ["| step | result | s | |", "|---|---|---|---|"]
    for result in steps:
        said = " ".join([*(f"{x}={y}" for x, y in result["switches"].items()), result["reason"]])
        said = said.strip().replace("\n", " ").replace("|", "/")
        said = said if len(said) <= 160 else said[:157] + "..."
        lines.append(f"| {result['name']} | {result['status']} | {result['seconds']:.0f} | {said} |")
    return lines


def _shapes(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [shape for result in record["steps"] for shape in result["figures"].get("shapes", [])]


def _efficiencies(shape: dict[str, Any]) -> list[str]:
    lines = [
        f"Efficiency of one rank, {shape['shape']}, {shape['layout']}, kernel {shape['kernel']}:",
        "",
        "| implementation | forward | forward + backward |",
        "|---|---|---|",
    ]
    for row in shape["results"]:
        lines.append(f"| {row['name']} | {row['forward_efficiency']:.3f} | {row['efficiency']:.3f} |")
    return lines
