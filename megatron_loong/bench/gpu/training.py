"""Megatron's training loop on one rank with and without the plugin: the same losses, and step times within 1%."""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_loong.bench.gpu.outcome import CannotRunError, main
from megatron_loong.bench.record import StepRecord, parse_log, relative_differences

ROOT = Path(__file__).resolve().parents[3]
#: Largest difference of step times, and the steps at the start that do not count.
TOLERANCE, SKIPPED = 0.01, 3
#: Largest relative difference of a loss. A GPU adds up in another order each time, in bfloat16 and over 33 steps.
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
    "--max-position-embeddings 2048 --global-batch-size 4 --train-iters 33",
}


def check(device: torch.device) -> dict[str, Any]:
    """Megatron's training loop on one rank with and without the plugin: the same losses, and step times within 1%."""
    script = training_script()
    runs: dict[str, list[list[StepRecord]]] = {"without": [], "with": []}
    # Twice each in turn, so that a clock that settles settles for both.
    for plugin in ("without", "with", "with", "without")[: 4 if device.type == "cuda" else 2]:
        runs[plugin].append(train(script, device, plugin))
    differences = [max(relative_differences(*pair)) for pair in zip(runs["with"], runs["without"], strict=True)]
    step_s = {
        plugin: min(statistics.median(x.step_time_s for x in log[SKIPPED:]) for log in logs)
        for plugin, logs in runs.items()
    }
    ratio = step_s["with"] / step_s["without"]
    assert max(differences) <= LOSS_TOLERANCE[device.type], (
        f"losses differ by {max(differences):.1e} where nothing is distributed"
    )
    if device.type == "cuda":
        assert abs(ratio - 1) <= TOLERANCE, f"a step takes {ratio:.3f} times that without the plugin ({step_s})"
    return {
        "script": script.name,
        "steps": len(runs["with"][0]),
        "step_s": step_s,
        "with_over_without": ratio,
        "time_judged": device.type == "cuda",
        "largest_loss_difference": max(differences),
        "last_loss": runs["with"][0][-1].loss,
    }


def training_script() -> Path:
    """pretrain_gpt.py of the checkout in MEGATRON_LM_PATH, or this repository's; `CannotRunError` when neither."""
    checkout = os.environ.get("MEGATRON_LM_PATH")
    if checkout:
        return Path(checkout).resolve() / "pretrain_gpt.py"
    try:
        found = importlib.util.find_spec("megatron.training")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise CannotRunError("megatron.training is not importable: put megatron-core 0.17 or newer on PYTHONPATH")
    return ROOT / "scripts" / "pretrain_gpt.py"


def train(script: Path, device: torch.device, plugin: str) -> list[StepRecord]:
    """The steps of one run; `AssertionError` with the end of its log when it fails.

    On a CPU Megatron runs through the plugin's launcher alone, so that both runs are `with` it there.
    """
    launcher, device_flags = ["-m", "megatron_loong"], []
    if device.type == "cpu":
        launcher += ["--cpu", "--cpu"]
        device_flags = ["--distributed-backend", "gloo", "--use-cpu-initialization"]
    elif plugin == "without":
        launcher = []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    ended = subprocess.run(
        [*torchrun, *launcher, str(script), *MODEL, *SIZES[device.type].split(), *device_flags],
        env={**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = "\n".join(ended.stdout.splitlines()[-30:])
    assert ended.returncode == 0, f"the run {plugin} the plugin ended with {ended.returncode}:\n{end}"
    steps = parse_log(ended.stdout.splitlines())
    assert steps, f"the run {plugin} the plugin logged no step:\n{end}"
    return steps


if __name__ == "__main__":
    sys.exit(main(check))
