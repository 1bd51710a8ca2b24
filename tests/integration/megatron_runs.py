"""Train a toy GPT with Megatron's own loop on the CPU and hand back its losses. Helpers, and no tests.

Run as a program, this file is `python -m megatron_loong` that also prints every step in full precision: Megatron's
log rounds a gradient norm to three decimals, which hides the mistakes looked for here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RECORD = "megatron_loong test record: "

#: A model small enough for a core and a half, with what long-context models have: RoPE, GQA, SwiGLU, RMSNorm. SGD,
#: for Adam forgives a gradient that is wrong by a factor. Three steps: the first shows the forward, the others
#: the backward.
TOY_MODEL = tuple(
    """
    --num-layers 2 --hidden-size 64 --num-attention-heads 8 --group-query-attention --num-query-groups 2
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --seq-length 64 --max-position-embeddings 64
    --mock-data --tokenizer-type NullTokenizer --vocab-size 257
    --micro-batch-size 1 --global-batch-size 4 --train-iters 3 --eval-iters 0
    --eval-interval 1000 --log-interval 1 --seed 7
    --optimizer sgd --lr 0.1 --lr-decay-style constant
    --attention-dropout 0 --hidden-dropout 0 --no-create-attention-mask-in-dataloader
    """.split()
)


@dataclass(frozen=True)
class Step:
    """What Megatron reports of one training step."""

    lm_loss: float
    grad_norm: float
    ring_forwards: int
    """How often the reporting rank, one of the last stage, ran the forward of a ring since the step before."""


def checkout_script() -> Path | None:
    """pretrain_gpt.py of the Megatron-LM checkout that MEGATRON_LM_PATH names, if it is set."""
    path = os.environ.get("MEGATRON_LM_PATH")
    return Path(path).resolve() / "pretrain_gpt.py" if path else None


def own_script() -> Path | None:
    """scripts/pretrain_gpt.py, if the installed megatron-core brings the training loop (0.17 on)."""
    try:
        found = importlib.util.find_spec("megatron.training") is not None
    except ModuleNotFoundError:
        found = False
    return REPOSITORY / "scripts" / "pretrain_gpt.py" if found else None


@functools.cache
def train(script: Path, world_size: int, *flags: str, timeout_s: int = 300) -> list[Step]:
    """Losses and gradient norms of a CPU training run of `script` on `world_size` ranks, one `Step` per step.

    Remembered for the session: several tests share a baseline. Raises `RuntimeError` with the end of the log of
    the rank that failed first.
    """
    with tempfile.TemporaryDirectory(prefix="megatron_runs_") as folder:
        logs = _run_ranks([str(script), *TOY_MODEL, *flags], world_size, Path(folder), timeout_s)
    records = [line.removeprefix(RECORD) for log in logs for line in log.splitlines() if line.startswith(RECORD)]
    if not records:
        raise RuntimeError(f"{script} ended well but reported no step:\n{_tail(logs[-1])}")
    return [Step(**json.loads(record)) for record in records]


def _run_ranks(arguments: list[str], world_size: int, folder: Path, timeout_s: int) -> list[str]:
    """Start one process per rank, wait for all, return their logs; what a launcher does, without its start-up time."""
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    }
    paths = [folder / f"rank{rank}.log" for rank in range(world_size)]
    with contextlib.ExitStack() as cleanup:
        ranks = []
        for rank, path in enumerate(paths):
            process = subprocess.Popen(
                [sys.executable, __file__, "--cpu", *arguments],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=folder,
                stdout=cleanup.enter_context(path.open("w")),
                stderr=subprocess.STDOUT,
            )
            cleanup.callback(process.wait)
            cleanup.callback(process.kill)  # a rank that waits for one that failed would wait for ever
            ranks.append(process)
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in ranks) and not any(process.poll() for process in ranks):
            if time.monotonic() > deadline:
                raise RuntimeError(f"no end after {timeout_s} s; rank 0 came to:\n{_tail(paths[0].read_text())}")
            time.sleep(0.1)
        for rank, process in enumerate(ranks):
            if process.poll():
                log = _tail(paths[rank].read_text())
                raise RuntimeError(f"rank {rank} ended with {process.returncode}: {' '.join(arguments)}\n{log}")
    return [path.read_text() for path in paths]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tail(log: str, lines: int = 40) -> str:
    return "\n".join(line[:300] for line in log.splitlines()[-lines:])


def _record_steps() -> None:
    """Wrap Megatron's `training_log`, whose arguments are the numbers before rounding, and count ring forwards."""
    import torch.distributed
    from megatron.training import training

    from megatron_loong.attention import attention_2d

    original, ring_forward = training.training_log, attention_2d.ring_forward
    signature = inspect.signature(original)
    ring_forwards = 0

    def counted(*args, **kwargs):
        nonlocal ring_forwards
        ring_forwards += 1
        return ring_forward(*args, **kwargs)

    attention_2d.ring_forward = counted

    @functools.wraps(original)
    def training_log(*args, **kwargs):
        nonlocal ring_forwards
        values = signature.bind(*args, **kwargs).arguments
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:  # the last stage has the loss
            step = Step(float(values["loss_dict"]["lm loss"]), float(values["grad_norm"]), ring_forwards)
            print(f"\n{RECORD}{json.dumps(vars(step))}", flush=True)
        ring_forwards = 0
        return original(*args, **kwargs)

    training.training_log = training_log


def _main() -> int:
    """`python -m megatron_loong`, with `_record_steps` slipped in before the script."""
    run_path = runpy.run_path

    def run_path_recorded(*args, **kwargs):
        _record_steps()
        return run_path(*args, **kwargs)

    runpy.run_path = run_path_recorded
    from megatron_loong.__main__ import main

    return main()


if __name__ == "__main__":
    sys.exit(_main())
