"""The steps of the check for GPU machines find what is wrong, and go on behind it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import simulate
from benchmarks.gpu import (
    checkpoint,
    exact,
    kernels,
    outcome,
    passes,
    ranks,
    self_messages,
    simulated,
    syncs,
    training,
)
from benchmarks.local_copies import init_world_of_one
from benchmarks.record import StepRecord
from megatron_loong.config import LoongConfig
from megatron_loong.kernels.registry import KERNELS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def run_of(check: Callable[..., None], *arguments: Any) -> outcome.Run:
    """A run of a check on the CPU; what fails outside its cases is raised."""
    run = outcome.Run(CPU)
    check(run, *arguments)
    return run


def test_a_check_tells_wrong_from_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A case that fails leaves its traceback; the next one runs, and what was measured is written."""

    def wrong(run: outcome.Run) -> None:
        for name in ("first", "second"):
            with run.case(name):
                run.figures[name] = 1
                assert name == "second", "dk is wrong"

    file = tmp_path / "figures.json"
    assert outcome.main(wrong, ["--cpu", "--json", str(file)]) == outcome.FAILED
    made = json.loads(file.read_text())
    assert made["first"] == made["second"] == 1 and made["reason"] == "first: AssertionError: dk is wrong"
    assert "test_gpu_steps.py" in made["failures"]["first"] and list(made["failures"]) == ["first"]
    said = capsys.readouterr().out
    assert "first ...\nTraceback" in said and "first: FAILED" in said and "second: ok" in said
    assert outcome.main(syncs.check, ["--cpu"]) == outcome.CANNOT
    assert "test_no_syncs.py" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cpu_flash", "reference"])
def test_kernels_agree_with_float64_whole_and_in_blocks(name: str) -> None:
    for dtype, causal in ((torch.float32, False), (torch.bfloat16, True)):
        tensors = exact.inputs(96, (4, 2), (32, 32), dtype, CPU)
        errors = kernels.compare(KERNELS[name], tensors, causal)
        assert max(errors.values()) <= kernels.BOUNDS[dtype]
        assert causal or {"dk of two blocks", "lse of two blocks"} <= set(errors)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one case of two; the other case and the speed are measured all the same."""

    class Wrong:
        def __getattr__(self, name: str) -> Any:
            return getattr(KERNELS["cpu_flash"], name)

        def backward(self, *args: Any, **options: Any) -> Any:
            dq, dk, dv = KERNELS["cpu_flash"].backward(*args, **options)
            return dq, dk * (1.05 if dq.shape[1] == SHORT else 1), dv

    SHORT = kernels.SHAPES[2][2] // kernels.CPU_SHARE
    monkeypatch.setattr(kernels, "SHAPES", kernels.SHAPES[1:3])
    monkeypatch.setattr(kernels, "BOUNDS", {torch.float32: 1e-5})
    monkeypatch.setitem(kernels.KERNELS, "wrong", Wrong())  # type: ignore[arg-type]
    run = run_of(kernels.check, "wrong")
    (label,) = run.failures
    assert (
        label == "wrong, float32 on cpu, heads 8:1, width 128, 96 tokens, full" and "dk 5.0e-02" in run.failures[label]
    )
    assert run.figures["worst_relative_rms"]["float32"] <= 1e-5 and run.figures["forward_tflops"] >= 0


def test_a_failed_case_runs_again_and_those_behind_a_lost_device_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """With launches that block; the device is lost in the second case of four."""
    asked: list[tuple[list[int], dict[str, str]]] = []

    def worst_error(kernel: Any, case: kernels.Case, device: torch.device) -> float:
        if case.length == kernels.SHAPES[1][2]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")
        return 0.0

    def elsewhere(run: outcome.Run, name: str, cases: list[int], **environment: str) -> dict[str, Any]:
        asked.append((cases, environment))
        return {"case": cases}

    shapes = [(*kernels.SHAPES[0][:2], length, True) for length in (1, 2, 3, 4)]
    for name, value in {"SHAPES": shapes, "BOUNDS": {torch.bfloat16: 1.0}, "worst_error": worst_error}.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernels, "in_another_process", elsewhere)
    monkeypatch.setattr(kernels, "_is_lost", lambda device: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setitem(kernels.KERNELS, "broken", SimpleNamespace(why_not=lambda request: None))  # type: ignore[arg-type]
    run = outcome.Run(CPU)
    run.device = CUDA
    kernels.check(run, "broken")
    assert asked == [([1], {"CUDA_LAUNCH_BLOCKING": "1"}), ([2, 3], {})]
    assert (run.figures["again"], run.figures["rest"]) == ({"case": [1]}, {"case": [2, 3]})
    assert len(run.failures) == 1 and run.figures["reason"].endswith("illegal memory access was encountered")


def test_cases_in_another_process_leave_their_figures() -> None:
    run = outcome.Run(CPU)
    figures = kernels.in_another_process(run, "cpu_flash", [14], CUDA_LAUNCH_BLOCKING="1")
    assert list(figures["worst_relative_rms"]) == ["float32"]


def test_passes_over_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(run_of(passes.check).figures["worst_relative_rms"].values()) <= passes.BOUND
    add_rows = passes.row_ops.add_rows
    rounded = lambda into, parts: add_rows(into, [tuple(x.bfloat16() for x in part) for part in parts])  # noqa: E731
    monkeypatch.setattr(passes.row_ops, "add_rows", rounded)
    failures = run_of(passes.check).failures
    assert failures and all(label.startswith("add, ") for label in failures)


def test_all_ranks_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated, "LAYOUTS", [LoongConfig(4, 2, 2)])
    run = run_of(simulated.check)
    assert run.failures == {}
    assert 0 < max(run.figures["max_error_float64"].values()) <= 1e-12
    assert max(run.figures["rms_over_one_call"].values()) <= simulated.MULTIPLE
    monkeypatch.setattr(simulate._Mailbox, "_fill", lambda self, block, peer, box: box.get())
    failures = run_of(simulated.check).failures
    assert len(failures) == 3 and all("cp 4 = head 2 x ring 2" in label for label in failures)


def test_messages_to_oneself_go_through_the_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo has the all-to-all; messages, batched as NCCL's, over copies in the place of a backend."""
    run = run_of(self_messages.check)
    assert run.failures == {} and run.figures["messages"] == "gloo has no messages to oneself"
    init_world_of_one(0, 1)
    try:
        transport = self_messages.transport_to_oneself("batched")
        pair = self_messages.blocks(CPU)
        pair[0][1] = pair[0][0]  # the copies know the last block alone
        self_messages.check_numbers(self_messages.messages_of(transport), pair)
        monkeypatch.setattr(transport, "post", lambda messages: lambda: None)
        with pytest.raises(AssertionError, match="what came is not what was sent"):
            self_messages.check_numbers(self_messages.messages_of(transport), self_messages.blocks(CPU))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("version", "gpus", "may"), [((2, 28, 9), 1, False), ((2, 30, 1), 1, True), ((2, 28, 9), 4, True)]
)
def test_ranks_share_a_gpu_where_nccl_allows_it(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], gpus: int, may: bool
) -> None:
    monkeypatch.setattr(ranks.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(ranks.nccl, "version", lambda: version)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    reason = ranks.fault("nccl", "cuda")
    assert (reason is None) == may and (may or "takes (2, 30) or 4 GPUs" in str(reason))
    assert ranks.fault("gloo", "cpu") is None and "needs a CUDA device" in str(ranks.fault("nccl", "cpu"))


def test_recomputing_the_ring_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "selective_checkpoint", checkpoint._full)
    with pytest.raises(AssertionError, match="ring forwards: 4, 4"):
        run_of(checkpoint.check)


@pytest.mark.parametrize(("loss", "step_s"), [(4.0001, 1.5), (4.1, 1.0)])
def test_training_is_judged_by_its_losses(monkeypatch: pytest.MonkeyPatch, loss: float, step_s: float) -> None:
    """The ratio of step times is a figure."""

    def train(script: Path, device: torch.device, plugin: str) -> list[StepRecord]:
        own = (loss, step_s) if plugin == "with" else (4.0, 1.0)
        return [StepRecord(i, 9, own[0], 50.0 if i <= training.SKIPPED else own[1]) for i in range(1, 10)]

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setenv("MEGATRON_LM_PATH", "somewhere")
    run = outcome.Run(torch.device("cpu"))
    run.device = CUDA
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with contextlib.nullcontext() if loss < 4.1 else pytest.raises(AssertionError, match="losses differ by 2.5e-02"):
        training.check(run)
    assert run.figures["with_over_without"] == pytest.approx(step_s) and len(run.figures["losses_with"]) == 9
