"""`megatron-loong sbatch`: a Slurm batch script from flags or from a plan. Plain text work, free of torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import megatron_loong

TEMPLATES = Path(__file__).resolve().parent / "templates"

#: What Megatron, NCCL and the rings want, and why. Set only where the cluster has not set it already.
ENVIRONMENT = (
    ("CUDA_DEVICE_MAX_CONNECTIONS", "1", "Megatron asserts it for TP and CP on GPUs before Blackwell"),
    ("OMP_NUM_THREADS", "1", "else each rank's CPU work would take every core"),
    ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "long sequences fragment the allocator's memory"),
    ("NCCL_CROSS_NIC", "0", "a ring stays on the NIC of its own GPU; set 1 where the network has no rails"),
    ("NCCL_DEBUG", "WARN", "say why a communicator failed"),
)


GPU_BINDING = """
# A task keeps the cores next to it, and sees all GPUs of its node: NCCL finds the NIC next to each by itself, which it
# cannot when each task is shown one GPU alone."""


@dataclass(frozen=True)
class Job:
    """What a batch script is made from. `ValueError` from the constructor names the flag."""

    script: str
    arguments: tuple[str, ...]
    """Megatron's, the flags of megatron_loong among them."""
    nodes: int = 1
    ranks_per_node: int = 8
    cpu: bool = False
    """Train on the CPU over gloo: no GPUs are asked for."""
    name: str = "megatron-loong"
    time: str = "24:00:00"
    log_dir: str = "runs"
    cpus_per_task: int | None = None
    partition: str | None = None
    account: str | None = None
    interface: str | None = None
    """Network interface of the host for rendezvous, gloo and NCCL's sockets: NCCL_SOCKET_IFNAME."""
    hca: str | None = None
    """InfiniBand or RoCE adapters, as NCCL_IB_HCA takes them."""
    max_restarts: int = 0
    """Requeue a job that failed or met its time limit at most so often; it resumes from its checkpoint."""
    setup: tuple[str, ...] = ()
    """Shell lines run before anything else, such as 'module load cuda'."""
    python: str = "python3"
    plan: str | None = None
    """The plan that the flags came from, kept beside the logs."""

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.hca is not None and not re.fullmatch(r"[\w=^,:.-]+", self.hca):
            raise ValueError(
                f"--hca {self.hca!r} is not a list of adapters as NCCL_IB_HCA takes it, such as =mlx5_0:1,mlx5_1:1"
            )
        if self.max_restarts < 0:
            raise ValueError(f"--max-restarts {self.max_restarts} must be at least 0")
        if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time):
            raise ValueError(
                f"--time {self.time} is not a Slurm time; use days-hours:minutes:seconds, such as 1-12:00:00"
            )
        self._check_checkpoint()
        self._check_world_size()

    def _check_checkpoint(self) -> None:
        if self.max_restarts and "--save" not in self.arguments:
            raise ValueError(
                f"--max-restarts {self.max_restarts} resumes from a checkpoint, but Megatron's arguments have "
                "no --save; add --save DIR and --save-interval N after the script"
            )

    def _check_world_size(self) -> None:
        """A world that the model-parallel sizes do not divide would fail only after a wait in the queue."""
        product = 1
        for flag in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"):
            value = flag_value(self.arguments, flag) or "1"
            product *= int(value) if value.isdigit() else 1  # what is no number, Megatron's parser refuses
        world = self.nodes * self.ranks_per_node
        if world % product:
            raise ValueError(
                f"--nodes {self.nodes} x --ranks-per-node {self.ranks_per_node} = {world} ranks are not a multiple of "
                f"TP x PP x CP = {product}; change --nodes, or the parallel sizes after the script"
            )

    @property
    def kind(self) -> str:
        """Which of the three templates this is: `single node`, `multi node` or `requeue`."""
        return "requeue" if self.max_restarts else "multi node" if self.nodes > 1 else "single node"

    @property
    def resumed_arguments(self) -> tuple[str, ...]:
        """Megatron's arguments, with what resuming needs when a requeue is asked for."""
        if not self.max_restarts:
            return self.arguments
        extra = [] if "--load" in self.arguments else ["--load", flag_value(self.arguments, "--save") or ""]
        if "--exit-signal-handler" not in self.arguments:
            extra.append("--exit-signal-handler")  # save on SIGTERM, which comes before the time limit
        return (*self.arguments, *extra)


def flag_value(arguments: Sequence[str], flag: str) -> str | None:
    """The word after the last `flag`, or None.

    >>> flag_value(["--context-parallel-size", "4", "--bf16"], "--context-parallel-size")
    '4'
    """
    found = None
    for i, word in enumerate(arguments):
        if word == flag:
            found = arguments[i + 1] if i + 1 < len(arguments) else None
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def header(job: Job) -> str:
    """The #SBATCH lines."""
    options: dict[str, object] = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.ranks_per_node,
        "gpus-per-node": None if job.cpu else job.ranks_per_node,
        "cpus-per-task": job.cpus_per_task,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "output": "%x-%j.out",  # where sbatch was called: Slurm makes no folders
        "open-mode": "append",
        "signal": "B:USR1@120",  # two minutes before the time limit, to the batch script
    }
    lines = [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return "\n".join([*lines, f"#SBATCH --{'requeue' if job.max_restarts else 'no-requeue'}"])


def environment(job: Job) -> str:
    """`export` lines: defaults that a user's own environment overrides, and the NICs that were named."""
    lines = []
    for name, value, reason in ENVIRONMENT:
        if not (job.cpu and name.startswith(("NCCL", "PYTORCH_CUDA"))):
            lines += [f"# {reason}", f"export {name}=${{{name}:-{value}}}"]
    if job.interface:
        lines += [
            f"export {name}={shlex.quote(job.interface)}" for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        ]
    if job.hca:
        lines.append(f"export NCCL_IB_HCA='{job.hca}'")
    return "\n".join(lines)


def render(job: Job) -> str:
    """The batch script as text."""
    setup = "\n".join(job.setup)
    requeue = fill((TEMPLATES / "requeue.sh").read_text(), {"max_restarts": str(job.max_restarts)})
    arguments = "\n".join(f"    {shlex.quote(word)}" for word in job.resumed_arguments)
    values = {
        "header": header(job),
        "version": megatron_loong.__version__,
        "log_dir": shlex.quote(job.log_dir),
        "script": shlex.quote(job.script),
        "arguments": f"\n{arguments}\n" if arguments else "",
        "setup": f"\n# ---- setup\n{setup}\n" if setup else "",
        "plan": f'cp {shlex.quote(job.plan)} "$run_dir/plan.json"' if job.plan else "# no plan: sizes came from flags",
        "environment": environment(job),
        "ranks_per_node": str(job.ranks_per_node),
        "srun_options": "--cpu-bind=none " if job.cpu else "--cpu-bind=cores --gpu-bind=none ",
        "binding": "" if job.cpu else GPU_BINDING,
        "mode": "--cpu " if job.cpu else "",
        "python": shlex.quote(job.python),
        "requeue": requeue if job.max_restarts else "",
    }
    return fill((TEMPLATES / "job.sbatch").read_text(), values)


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace `{{name}}`; a name without a value is a `KeyError`.

    >>> fill("#SBATCH --nodes={{nodes}}", {"nodes": "2"})
    '#SBATCH --nodes=2'
    """
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)


def flags_of_plan(path: Path) -> list[str]:
    """Megatron's flags out of a plan: JSON with `flags`, a list of words or one string. `ValueError` otherwise."""
    try:
        flags = json.loads(path.read_text(encoding="utf-8"))["flags"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"--plan {path}: not a JSON file with an entry 'flags' ({type(error).__name__}: {error})"
        ) from None
    return shlex.split(flags) if isinstance(flags, str) else [str(word) for word in flags]


def parser() -> argparse.ArgumentParser:
    """The command line; its options are the fields of `Job`."""
    parser = argparse.ArgumentParser(
        prog="megatron-loong sbatch",
        description="Write a Slurm batch script to stdout. What follows SCRIPT goes to it as it is.",
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1)
    add("--ranks-per-node", type=int, default=8, help="GPUs of a node; with --cpu, processes (default 8)")
    add("--cpu", action="store_true", help="train on the CPU over gloo, for trying a recipe; asks for no GPU")
    add("--name", default="megatron-loong", help="of the job")
    add("--time", default="24:00:00", help="limit, days-hours:minutes:seconds (default 24:00:00)")
    add("--log-dir", default="runs", help="each job makes a folder with its number in here (default runs)")
    add("--cpus-per-task", type=int)
    add("--partition")
    add("--account")
    add("--interface", help="network interface for rendezvous and sockets (NCCL_SOCKET_IFNAME)")
    add("--hca", help="InfiniBand or RoCE adapters (NCCL_IB_HCA), such as =mlx5_0,mlx5_1")
    add("--max-restarts", type=int, default=0, help="requeue a failed job at most so often, and resume (needs --save)")
    add("--setup", action="append", default=[], metavar="LINE", help="shell line to run first; may be repeated")
    add("--python", default="python3", help="interpreter with megatron_loong (default python3)")
    add("--plan", type=Path, help="a plan as JSON: its 'flags' come before the arguments given here")
    add("script", help="training script, such as pretrain_gpt.py")
    add("arguments", nargs=argparse.REMAINDER, help="Megatron's")
    return parser


def main(argv: list[str]) -> int:
    """`megatron-loong sbatch [options] SCRIPT ...`: the script on stdout. 2: what was asked for does not fit."""
    given = vars(parser().parse_args(argv))
    try:
        planned = flags_of_plan(given["plan"]) if given["plan"] else []
        given.update(arguments=(*planned, *given["arguments"]), setup=tuple(given["setup"]))
        given["plan"] = str(given["plan"]) if given["plan"] else None
        job = Job(**{field.name: given[field.name] for field in dataclasses.fields(Job)})
    except ValueError as error:
        print(f"megatron_loong: {error}", file=sys.stderr)
        return 2
    print(render(job), end="")
    return 0
