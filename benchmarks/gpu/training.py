"""Megatron's training loop on one rank with and without the plugin: the same losses, and the ratio of step times."""

from __future__ import annotations

import importlib.util
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu import child
from benchmarks.gpu.outcome import CannotRunError, Run, main
from benchmarks.record import StepRecord, parse_log, relative_differences

ROOT = Path(__file__).resolve().parents[2]
#: Steps at the start whose time does not count.
SKIPPED = 2
#: Of one run; then the traceback of all its threads is printed.
LIMIT_S = 60.0
#: Largest relative difference of a loss. A GPU adds up in another order each time, in bfloat16 and over 12 steps.
LOSS_TOLERANCE = {"cpu": 0.0, "cuda": 1e-3}
MODEL = """
    --transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion
    --no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --mock-data --tokenizer-type NullTokenizer --vocab-size 257
    --micro-batch-size 1 --eval-iters 0 --num-workers 0 --eval-interval 100000 --log-interval 1 --seed 7
    --optimizer sgd --lr 0.01 --lr-decay-style constant --attention-dropout 0 --hidden-dropout 0
    --no-create-attention-mask-in-dataloader
""".split()
SIZES = {
    "cpu": "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--global-batch-size 1 --train-iters 4",
    "cuda": "--num-layers 4 --hidden-size 1024 --num-attention-heads 8 --seq-length 2048 --bf16 "
    "--max-position-embeddings 2048 --global-batch-size 4 --train-iters 12",
}


def check(run: Run) -> None:
    """Megatron's training loop on one rank with and without the plugin: the same losses; the ratio of step times."""
    script, device = training_script(), run.device
    run.figures["script"] = script.name
    steps: dict[str, list[StepRecord]] = {}
    for plugin in ("without", "with"):
        with run.case(f"{plugin} the plugin"):
            steps[plugin] = train(script, device, plugin)
            run.figures[f"losses_{plugin}"] = [x.loss for x in steps[plugin]]
            # The first steps make what is made once.
            run.figures[f"step_s_{plugin}"] = statistics.median(x.step_time_s for x in steps[plugin][SKIPPED:])
    if len(steps) < 2:
        return
    run.figures["with_over_without"] = run.figures["step_s_with"] / run.figures["step_s_without"]
    difference = run.figures["largest_loss_difference"] = max(relative_differences(steps["with"], steps["without"]))
    assert difference <= LOSS_TOLERANCE[device.type], f"losses differ by {difference:.1e} where nothing is distributed"


def fault() -> str | None:
    """Why Megatron cannot train here; None where it can."""
    return None if os.environ.get("MEGATRON_LM_PATH") else not_installed("megatron.training")


def not_installed(module: str) -> str | None:
    """That a part of Megatron is not here; None where it is."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    return None if found else f"{module} is not installed: put megatron-core 0.17 or newer on PYTHONPATH"


def training_script() -> Path:
    """pretrain_gpt.py of the checkout in MEGATRON_LM_PATH, or this repository's; `CannotRunError` when neither."""
    reason = fault()
    if reason is not None:
        raise CannotRunError(reason)
    checkout = os.environ.get("MEGATRON_LM_PATH")
    return (Path(checkout).resolve() if checkout else ROOT / "scripts") / "pretrain_gpt.py"


def train(script: Path, device: torch.device, plugin: str) -> list[StepRecord]:
    """The steps of one run, its output passed on as it comes; `AssertionError` when it fails.

    On a CPU Megatron runs through the plugin's launcher alone, so that both runs are `with` it there.
    """
    launcher, device_flags = ["-m", "megatron_loong"], []
    if device.type == "cpu":
        launcher += ["--cpu", "--cpu"]
        device_flags = ["--distributed-backend", "gloo", "--use-cpu-initialization"]
    elif plugin == "without":
        launcher = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    # Megatron compiles dozens of functions with torch.compile: minutes, of a check that has few.
    rest = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCHDYNAMO_DISABLE": "1"}
    lines = []
    with subprocess.Popen(
        child.command(LIMIT_S, [*launcher, str(script), *MODEL, *SIZES[device.type].split(), *device_flags]),
        env={**os.environ, **one_rank, **rest, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    assert process.returncode == 0, f"the run {plugin} the plugin ended with {process.returncode}; see its output above"
    steps = parse_log(lines)
    assert steps, f"the run {plugin} the plugin logged no step"
    return steps


if __name__ == "__main__":
    sys.exit(main(check))
