"""`calibrate` measures this machine and writes a profile that `plan` reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_loong.__main__ import main
from megatron_loong.planner.profiles import load_hardware


def calibrate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_loong", "calibrate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_calibrated_profile_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "here" / "profile.yaml"
    done = calibrate("--output", str(path), "--ranks", "2", "--seconds", "0.02", "--lengths", "128", "256")
    assert done.returncode == 0, done.stderr
    hardware = load_hardware(str(path))
    assert [length for length, _ in hardware.attention_backward.points] == [128, 256]
    assert (hardware.gpus_per_node, hardware.nics_per_node) == (2, 1)
    assert hardware.node_fabric_bytes_per_s == pytest.approx(2 * hardware.node_link_bytes_per_s)
    assert hardware.kernel_overhead_s < 0.1 and "measured" in hardware.sources["all"]
    model = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 --vocab-size 256".split()
    work = ["--gpus", "2", "--seq-length", "4K", "--global-batch-size", "2"]
    # The reserve of the memory model is a GPU's; a machine with little memory for two ranks fits nothing.
    assert main(["plan", "--hardware", str(path), *work, *model]) in (0, 1)
    assert "calibrated" in "".join(capsys.readouterr())


def test_a_machine_without_a_launcher_needs_an_output() -> None:
    done = calibrate()
    assert done.returncode == 2 and "--output" in done.stderr
