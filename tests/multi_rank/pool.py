"""Worker processes that stay alive between tests: one gloo world of eight ranks per test session."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

from torch.distributed import TCPStore

WORLD_SIZE = 8
TASK_TIMEOUT_S = 240
COLLECTIVE_TIMEOUT_S = 60

#: Modules imported once for all workers. A test module adds what its workers would each import; some may be missing.
PRELOAD = ["torch", "torch.distributed", "megatron_loong.attention.attention_2d"]


class WorkerFailure(AssertionError):
    """A task raised on at least one rank; the message has each rank's traceback, `results` what every rank gave."""

    def __init__(self, errors: list[str], results: list[Any]) -> None:
        super().__init__("\n".join(errors))
        self.results = results


def _serve(rank: int, world_size: int, port: int, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    pipe.send(("ready", None))
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            pipe.send(("ok", function(rank, *args)))
        except BaseException as error:  # the parent decides what it means
            pipe.send(("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


class WorkerPool:
    """`world_size` ranks that run module-level functions `f(rank, *args)` at the same time."""

    def __init__(self, world_size: int = WORLD_SIZE) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.world_size = world_size
        self._start()

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.pipes, self.processes = [], []
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, self.store.port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self._collect()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(rank, *args)` on every rank; results in rank order. `WorkerFailure` when any rank raised."""
        if not all(process.is_alive() for process in self.processes):
            self._start()  # a failure before this one broke them
        for pipe in self.pipes:
            pipe.send((function, args))
        return self._collect()

    def _collect(self) -> list[Any]:
        results, errors = [], []
        deadline = time.monotonic() + TASK_TIMEOUT_S
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                errors.append(f"rank {rank}: no answer within {TASK_TIMEOUT_S} s")
                results.append(None)
                continue
            try:
                status, value = pipe.recv()
            except EOFError:
                status, value = "error", "the process died"
            if status == "error":
                errors.append(f"rank {rank}: {value}")
            results.append(value)
        if errors:
            self.stop()
            raise WorkerFailure(errors, results)
        return results

    def stop(self) -> None:
        """End the workers."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
