"""The pictures of a plan are drawn from what was simulated."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_loong.__main__ import main
from megatron_loong.planner.candidate import Limits, Workload
from megatron_loong.planner.model import MODELS
from megatron_loong.planner.pictures import longest_sequence
from megatron_loong.planner.profiles import PROFILES
from megatron_loong.planner.search import search

PLAN = "plan --hardware a100 --gpus 16 --model llama2-7b-gqa --seq-length 128K --global-batch-size 16".split()


def test_three_pictures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main([*PLAN, "--context-parallel-size", "16", "--pictures", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().err
    for name in ("timeline", "layouts", "longest_sequence"):
        path = tmp_path / "new" / f"{name}.png"
        assert path.stat().st_size > 10_000 and f"wrote {path}" in said


def test_without_matplotlib_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*PLAN, "--context-parallel-size", "16", "--pictures", str(tmp_path)]) == 2
    assert "--pictures needs matplotlib" in capsys.readouterr().err


def test_longer_sequences_fit_more_gpus_and_more_recomputation() -> None:
    work, hardware = Workload(MODELS["llama2-7b-gqa"], 16, 1 << 17, 16), PROFILES["a100"]
    candidate = search(work, hardware, limits=Limits(context=16)).plans[0].candidate
    by_mode = {
        mode: [longest_sequence(candidate, context, mode, work, hardware) or 0 for context in (4, 8, 16, 32)]
        for mode in ("none", "selective", "full")
    }
    for lengths in by_mode.values():
        assert lengths == sorted(lengths)
    assert by_mode["none"][-1] < by_mode["selective"][-1] <= by_mode["full"][-1]
