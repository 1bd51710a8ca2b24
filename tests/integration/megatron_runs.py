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
import queue
import random
import runpy
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration import planted
from tests.integration.nursery import nursery_of, serve

REPOSITORY = Path(__file__).resolve().parents[2]
RECORD = "megatron_loong test record: "
RELATIVE_TOLERANCE = 1e-5

#: A model small enough for a core and a half, with what long-context models have: RoPE, GQA, SwiGLU, RMSNorm. SGD,
#: for Adam forgives a gradient that is wrong by a factor. Three steps: the first shows the forward, the others
#: the backward.
TOY_MODEL = tuple(
    """
    --num-layers 2 --hidden-size 64 --num-attention-heads 8 --group-query-attention --num-query-groups 2
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --seq-length 64 --max-position-embeddings 64
    --mock-data --tokenizer-type NullTokenizer --vocab-size 257
    --micro-batch-size 1 --global-batch-size 4 --train-iters 3 --eval-iters 0 --num-workers 0
    --eval-interval 1000 --log-interval 1 --seed 7
    --optimizer sgd --lr 0.1 --lr-decay-style constant
    --attention-dropout 0 --hidden-dropout 0 --no-create-attention-mask-in-dataloader
    """.split()
)


#: A flag that a run may be given, and what of the toy model it takes the place of.
CONTRADICTIONS = {
    "--data-path": "--mock-data",
    "--reset-attention-mask": "--no-create-attention-mask-in-dataloader",
    "--multi-latent-attention": "--group-query-attention --num-query-groups 2",
}


@dataclass(frozen=True)
class Step:
    """What Megatron reports of one training step."""

    lm_loss: float
    grad_norm: float
    ring_forwards: int
    """How often the reporting rank, one of the last stage, ran the forward of a ring since the step before."""
    mtp_loss: float = 0.0
    """Summed over the depths of multi-token prediction."""


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
def train(script: Path, world_size: int, *flags: str, timeout_s: int = 300, fault: str = "") -> list[Step]:
    """Losses and gradient norms of a CPU training run of `script` on `world_size` ranks, one `Step` per step.

    A flag of `CONTRADICTIONS` takes the place of the toy model's own. Remembered for the session: several tests
    share a baseline. `fault`: functions of `planted`, by name, that every rank calls first. Raises `RuntimeError` with
    the end of the log of the rank that failed first.
    """
    model = " ".join(TOY_MODEL)
    for flag, replaced in CONTRADICTIONS.items():
        if flag in flags:
            model = model.replace(replaced, "")
    with tempfile.TemporaryDirectory(prefix="megatron_runs_") as folder:
        logs = _run_ranks([str(script), *model.split(), *flags], world_size, Path(folder), timeout_s, fault)
    records = [line.removeprefix(RECORD) for log in logs for line in log.splitlines() if line.startswith(RECORD)]
    if not records:
        raise RuntimeError(f"{script} ended well but reported no step:\n{_tail(logs[-1])}")
    return [Step(**json.loads(record)) for record in records]


def assert_same_steps(steps: list[Step], expected: list[Step], tolerance: float = RELATIVE_TOLERANCE) -> None:
    """Every loss (MTP's too) and gradient norm within `tolerance` of its size; a failure names step and quantity."""
    assert len(steps) == len(expected)
    for number, (step, wanted) in enumerate(zip(steps, expected, strict=True), start=1):
        for quantity in ("lm_loss", "grad_norm", "mtp_loss"):
            value, reference = getattr(step, quantity), getattr(wanted, quantity)
            error = 0 if value == reference else abs(value - reference) / (abs(reference) or 1)
            assert error <= tolerance, (
                f"{quantity} of step {number}: {value} instead of {reference}, relative error {error:.1e}"
            )


def parameters(checkpoint: Path, iteration: int) -> dict[str, Any]:
    """Whole parameters by name, out of a distributed checkpoint: the same names for every division of a model."""
    import torch
    from torch.distributed import checkpoint as dcp

    reader = dcp.FileSystemReader(checkpoint / f"iter_{iteration:07d}")
    stored = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in stored.items()
        if isinstance(kind, dcp.metadata.TensorStorageMetadata) and kind.properties.dtype.is_floating_point
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _run_ranks(arguments: list[str], world_size: int, folder: Path, timeout_s: int, fault: str) -> list[str]:
    """One process per rank, forked from one that has imported Megatron; their logs when all have ended well."""
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "LOONG_TEST_FAULT": fault,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    }
    logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
    environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    nursery = nursery_of(__file__, Path(arguments[0]).resolve().parent)
    codes = nursery.run(["--cpu", "--cpu", *arguments], environments, logs, timeout_s)
    for rank, code in enumerate(codes):
        if code:
            log = _tail(logs[rank].read_text())
            raise RuntimeError(f"rank {rank} ended with {code}: {' '.join(arguments)}\n{log}")
    if None in codes:
        raise RuntimeError(f"no end after {timeout_s} s; rank 0 came to:\n{_tail(logs[0].read_text())}")
    return [path.read_text() for path in logs]


def _free_port() -> int:
    """A port that nobody listens on, from below those that a system gives to outgoing connections."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port among a hundred between 20000 and 32000")


def _tail(log: str, lines: int = 40) -> str:
    return "\n".join(line[:300] for line in log.splitlines()[-lines:])


def _record_steps() -> None:
    """Wrap Megatron's `training_log`, whose arguments are the numbers before rounding, and count ring forwards."""
    import torch.distributed
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
    from megatron.training import training

    from megatron_loong.attention import call as attention_call

    original, ring_forward = training.training_log, attention_call.ring_forward
    signature = inspect.signature(original)
    ring_forwards, mtp_loss = 0, 0.0
    track_mtp_metrics = MTPLossLoggingHelper.track_mtp_metrics

    def tracked(loss_scale, iteration, writer, wandb_writer, total_loss_dict):
        nonlocal mtp_loss
        step: dict = {}
        track_mtp_metrics(loss_scale, iteration, writer, wandb_writer, step)
        mtp_loss = float(sum(step.values()))
        total_loss_dict.update({name: total_loss_dict.get(name, 0) + loss for name, loss in step.items()})

    MTPLossLoggingHelper.track_mtp_metrics = staticmethod(tracked)

    def counted(*args, **kwargs):
        nonlocal ring_forwards
        ring_forwards += 1
        return ring_forward(*args, **kwargs)

    attention_call.ring_forward = counted

    @functools.wraps(original)
    def training_log(*args, **kwargs):
        nonlocal ring_forwards
        values = signature.bind(*args, **kwargs).arguments
        result = original(*args, **kwargs)
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:  # the last stage has the loss
            step = Step(float(values["loss_dict"]["lm loss"]), float(values["grad_norm"]), ring_forwards, mtp_loss)
            print(f"\n{RECORD}{json.dumps(vars(step))}", flush=True)
        ring_forwards = 0
        return result

    training.training_log = training_log


def _skip_what_takes_seconds() -> None:
    """Two things that each rank of each run would do, and no test looks at."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training.argument_utils import ArgumentGroupFactory

    # Results of a checkpoint's writer travel over a queue that is a process, which imports Megatron again. No run here
    # saves in the background, so that the writer is this process and any queue does.
    filesystem_async._results_queue = queue.Queue()
    # Parsed out of the sources of all configs, for the texts of --help.
    ArgumentGroupFactory._get_field_docstrings = lambda self, src_cfg_class: {}


def _main() -> int:
    """`python -m megatron_loong`, with `_record_steps` slipped in before the script."""
    run_path = runpy.run_path

    def run_path_recorded(*args, **kwargs):
        _record_steps()
        _skip_what_takes_seconds()
        for change in os.environ.get("LOONG_TEST_FAULT", "").split():
            getattr(planted, change)()
        return run_path(*args, **kwargs)

    runpy.run_path = run_path_recorded
    from megatron_loong.__main__ import main

    return main()


if __name__ == "__main__":
    if sys.argv[1] == "--nursery":
        serve(sys.argv[2], _main)
    else:
        sys.exit(_main())
