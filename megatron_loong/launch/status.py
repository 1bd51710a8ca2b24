"""How a job ended: done, out of memory, timeout, or failed on rank N, read off what its ranks left behind.

Run by a job script when its ranks have ended: `python -m megatron_loong.launch.status RUN_DIR --exit-code N`. Reads
`exit.<rank>` (time in ns, exit code) and `rank<rank>.log` in RUN_DIR, and writes RUN_DIR/status.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

#: What a log says when memory was short: torch on a GPU, cuDNN or NCCL below it, Python, Slurm for the host.
OUT_OF_MEMORY = (
    "OutOfMemoryError",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "ncclSystemError: out of memory",
    "MemoryError",
    "oom-kill",
    "oom_kill",
    "Out Of Memory",
)
#: Exit codes with which the victims of another rank's end leave: SIGINT, SIGKILL, SIGTERM, as a shell reports them.
KILLED = (130, 137, 143)
#: Only the end of a log is read.
TAIL_BYTES = 65536


@dataclass(frozen=True)
class Status:
    """What status.json holds."""

    status: str
    """`done`, `out of memory`, `timeout` or `failed`."""
    rank: int | None
    """The rank that failed first, where a rank did."""
    exit_code: int
    """Of that rank; of the whole step where no rank is to blame."""
    attempt: int
    """0 the first time, then the number of restarts."""
    ended: str
    """UTC, ISO 8601."""
    last_lines: tuple[str, ...] = ()
    """The end of that rank's log."""


def first_failure(run_dir: Path) -> tuple[int, int] | None:
    """(rank, exit code) of the rank that failed first, and of its own accord if any did; None when none failed."""
    failures = []
    for path in run_dir.glob("exit.*"):
        words = path.read_text().split()
        if len(words) == 2 and words[1] != "0":
            time_ns, code = map(int, words)
            failures.append((code in KILLED, time_ns, int(path.suffix[1:]), code))
    return min(failures)[2:] if failures else None


def tail(path: Path) -> str:
    """The end of a log; empty when there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def judge(run_dir: Path, exit_code: int, *, attempt: int, timed_out: bool) -> Status:
    """The status of a step that ended with `exit_code`. A time limit comes before what its signals made ranks do."""
    ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if timed_out:
        return Status("timeout", None, exit_code, attempt, ended)
    failure = first_failure(run_dir)
    if failure is None and exit_code == 0:
        return Status("done", None, 0, attempt, ended)
    logs = {path: tail(path) for path in run_dir.glob("rank*.log")}
    short_of_memory = sorted(
        int(path.stem.removeprefix("rank")) for path, log in logs.items() if any(s in log for s in OUT_OF_MEMORY)
    )
    rank, code = failure or (None, exit_code)
    if short_of_memory:
        rank = rank if rank in short_of_memory else short_of_memory[0]
    last_lines = () if rank is None else tuple(logs.get(run_dir / f"rank{rank}.log", "").splitlines()[-20:])
    return Status("out of memory" if short_of_memory else "failed", rank, code, attempt, ended, last_lines)


def main(argv: list[str]) -> int:
    """Write status.json and print one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--exit-code", type=int, required=True, help="of the whole job step")
    parser.add_argument("--attempt", type=int, default=0, help="restarts so far")
    parser.add_argument("--timed-out", action="store_true", help="the time limit came first")
    args = parser.parse_args(argv)
    status = judge(args.run_dir, args.exit_code, attempt=args.attempt, timed_out=args.timed_out)
    (args.run_dir / "status.json").write_text(json.dumps(asdict(status), indent=1) + "\n")
    on = "" if status.rank is None else f" on rank {status.rank}"
    print(f"megatron_loong: {status.status}{on}, exit code {status.exit_code}; see {args.run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
