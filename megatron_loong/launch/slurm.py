"""`megatron-loong sbatch`: a Slurm batch script from flags or from a plan. Plain text work, free of torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import megatron_loong
from megatron_loong.planner.flags import connections, flag_value

TEMPLATES = Path(__file__).resolve().parent / "templates"

#: What Megatron, NCCL and the rings want, and why. Set only where the cluster has not set it already.
ENVIRONMENT = (
    ("OMP_NUM_THREADS", "1", "else each rank's CPU work would take every core"),
    ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "long sequences fragment the allocator's memory"),
    ("NCCL_CROSS_NIC", "0", "a ring stays on the NIC of its own GPU; set 1 where the network has no rails"),
    ("NCCL_DEBUG", "WARN", "say why a communicator failed"),
)
#: With Megatron-FSDP or torch's, which refuse 1, and without, where TP and CP ask for it (before Blackwell).
UNSET_CONNECTIONS = """\
# FSDP refuses 1; unset, CUDA has 8
[ "${CUDA_DEVICE_MAX_CONNECTIONS:-}" != 1 ] || unset CUDA_DEVICE_MAX_CONNECTIONS"""
SET_CONNECTIONS = """\
# Megatron asserts it for TP and CP on GPUs before Blackwell
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}"""

#: Values that stand on #SBATCH lines, and what they may hold: sbatch and bash read such a line by rules of their own.
NAMES = {
    "name": (r"[\w .,:+@=-]+", "letters, digits, spaces and .,:+@=-_"),
    "partition": (r"[\w.,-]+", "letters, digits and .,-_"),
    "account": (r"[\w.,:+@-]+", "letters, digits and .,:+@-_"),
    "time": (r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", "days-hours:minutes:seconds, such as 1-12:00:00"),
    "interface": (r"[\w=^,:.-]+", "interfaces as NCCL_SOCKET_IFNAME takes them, such as bond0 or =eth0,eth1"),
    "hca": (r"[\w=^,:.-]+", "adapters as NCCL_IB_HCA takes them, such as =mlx5_0:1,mlx5_1:1"),
}

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
        for name in ("nodes", "ranks_per_node", "cpus_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{_flag(name)} {value} must be at least 1")
        if self.max_restarts < 0:
            raise ValueError(f"--max-restarts {self.max_restarts} must be at least 0")
        self._check_text()
        self._check_checkpoint()
        self._check_world_size()

    def _check_text(self) -> None:
        """What reaches the script is a name of a known form, or a word that is quoted and has no line break."""
        for name, (form, words) in NAMES.items():
            value = getattr(self, name)
            if value is not None and not re.fullmatch(form, value):
                raise ValueError(f"{_flag(name)} {value!r} is not of its form: {words}")
        for name in ("script", "log_dir", "python", "plan"):
            value = getattr(self, name)
            # rank.sh is written by a here-document, which a line of its own could end.
            if value is not None and (not value or not value.isprintable()):
                raise ValueError(f"{_flag(name)} {value!r} must be a word without line breaks and control characters")

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
            if value.isdecimal() and int(value) == 0:
                raise ValueError(f"{flag} {value} must be at least 1")
            product *= int(value) if value.isdecimal() else 1  # what is no number, Megatron's parser refuses
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


def _flag(field: str) -> str:
    return "SCRIPT" if field == "script" else "--" + field.replace("_", "-")


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
    lines.append(UNSET_CONNECTIONS if connections(job.arguments) is None else SET_CONNECTIONS)
    # In quotes that these two, being of the form in NAMES, cannot end; bare, one that begins with = looks like a test.
    if job.interface:
        lines += [f"export {name}='{job.interface}'" for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")]
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
    """Megatron's flags out of a plan: JSON with `flags`, and `model_flags` before them; each a list of words or one
    string. `ValueError` otherwise."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        parts = [plan.get("model_flags", []), plan["flags"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--plan {path}: not a JSON file with an entry 'flags' ({type(error).__name__}: {error})"
        ) from None
    return [str(word) for part in parts for word in (shlex.split(part) if isinstance(part, str) else part)]


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
