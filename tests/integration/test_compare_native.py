"""scripts/compare_native.py on a CPU: a real pair of runs, its reports and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.integration import megatron_runs


def compare_on_cpu(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = megatron_runs.own_script() or megatron_runs.checkout_script()
    if script is None:
        pytest.skip("needs MEGATRON_LM_PATH, or megatron-core 0.17 or newer, whose wheel brings megatron.training")
    command = [sys.executable, str(megatron_runs.REPOSITORY / "scripts" / "compare_native.py"), "--ranks", "2", "--cpu"]
    training = [str(script), *megatron_runs.TOY_MODEL, "--context-parallel-size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(megatron_runs.REPOSITORY)}
    return subprocess.run(
        [*command, *options, "--", *training], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.nightly
def test_it_reports_agreement_and_its_thresholds_can_fail(tmp_path: Path) -> None:
    reports = ("--junit", str(tmp_path / "out.xml"), "--markdown", str(tmp_path / "out.md"))
    ended = compare_on_cpu(tmp_path, *reports)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "out.md").read_text().startswith("Native context parallelism needs a GPU; compared with one")
    suite = ElementTree.parse(tmp_path / "out.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "0")
    assert compare_on_cpu(tmp_path, "--loss", "-1").returncode == 1
    assert compare_on_cpu(tmp_path, "--loong", "--loong-head-parallel-size 3").returncode == 2
