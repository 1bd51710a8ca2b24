"""Flight recorder: this rank's last communication, written to a file when some of it fails.

`megatron-loong postmortem FOLDER` (launch/postmortem.py) reads the files of all ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

KEPT = 256
_number = itertools.count().__next__
_started = time.time()


@dataclass(slots=True)
class Operation:
    """A message or a collective, from where it was posted until this rank no longer waits for it. Times in s, UTC."""

    number: int
    """Counts the operations of this rank."""
    operation: str
    """`send`, `receive`, `all-to-all` or `collective`."""
    what: str
    """What it carries, such as the block of which ring rank: that names the step."""
    group: str
    ranks: tuple[int, ...]
    """Global ranks of the group."""
    peer: int | None
    """Global rank of the other end of a message; None: all of the group."""
    bytes: int
    posted: float
    waited: float | None = None
    """When this rank began to wait for it."""
    done: float | None = None
    """When the wait ended. With NCCL that means only that the GPU's stream waits from then on."""


# Appending to a full one drops the oldest. The autograd thread appends too: one call, so that no lock is needed.
_last: deque[Operation] = deque(maxlen=KEPT)


def begin(
    operation: str, what: str, group: str, ranks: Sequence[int], peer: int | None = None, size: int = 0
) -> Operation:
    """Note that an operation is posted now."""
    begun = Operation(_number(), operation, what, group, tuple(ranks), peer, size, time.time())
    _last.append(begun)
    return begun


def wait(operations: Iterable[Operation]) -> None:
    """Note that this rank waits from now on."""
    now = time.time()
    for x in operations:
        x.waited = x.waited or now


def done(operations: Iterable[Operation]) -> None:
    """Note that the wait is over."""
    now = time.time()
    for x in operations:
        x.done = now


def folder() -> Path:
    """Where files go: LOONG_FLIGHT_FOLDER, else the folder that torchrun was told to log to, else ./loong_flight."""
    if chosen := os.environ.get("LOONG_FLIGHT_FOLDER"):
        return Path(chosen)
    # LOG_DIR/RUN_ID_random/attempt_N/LOCAL_RANK/error.json; without --log-dir, in a temporary torchelastic_random/.
    logs = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents
    if len(logs) > 4 and logs[1].name.startswith("attempt_") and not logs[3].name.startswith("torchelastic_"):
        return logs[1]
    return Path("loong_flight")


def write(error: object) -> Path | None:
    """Write this rank's last operations; where, or None if that failed. Never raises: an error is on its way already.

    A file is complete or is not there, for the launcher may end this process at any moment.
    """
    temporary = None
    try:
        rank = dist.get_rank() if dist.is_initialized() else 0
        record: dict[str, Any] = {"rank": rank, "started": _started, "failed": time.time(), "error": str(error)}
        record["operations"] = [asdict(x) for x in list(_last)]
        path = (folder() / f"loong_flight.rank{rank}.json").absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(record), encoding="utf-8")
        return temporary.replace(path)
    except Exception:
        with contextlib.suppress(Exception):
            if temporary is not None:
                temporary.unlink(missing_ok=True)
        return None
