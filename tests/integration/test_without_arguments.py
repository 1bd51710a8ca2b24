"""scripts/train_without_arguments.py as it stands: over ranks as on one, and what happens when it forgets something."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "train_without_arguments.py"


def run(script: Path, ranks: int) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


def numbers(done: subprocess.CompletedProcess[str]) -> list[float]:
    assert done.returncode == 0, done.stderr[-4000:]
    return [float(x) for pair in re.findall(r"step \d: loss (\S+), gradient norm (\S+)", done.stdout) for x in pair]


def test_two_ranks_print_what_one_rank_prints() -> None:
    one, two = numbers(run(SCRIPT, 1)), numbers(run(SCRIPT, 2))
    assert len(one) == 6 and two == pytest.approx(one, rel=2e-5)  # six decimals are printed


def test_a_forgotten_context_parallel_size_is_an_error(tmp_path: Path) -> None:
    line = "        context_parallel_size=cp,  # as in initialize_model_parallel: here, layers read it\n"
    assert line in SCRIPT.read_text()
    forgetful = tmp_path / "forgetful.py"
    forgetful.write_text(SCRIPT.read_text().replace(line, ""))
    done = run(forgetful, 2)
    assert done.returncode != 0 and "step 1" not in done.stdout
    assert "context_parallel_size=1 in the TransformerConfig of GPTModel, but its context-parallel group has 2" in (
        done.stderr
    )


def test_getting_started_shows_the_lines_of_the_script() -> None:
    page = (ROOT / "docs" / "getting-started.md").read_text()
    (snippet,) = re.findall(r"```python\n(from megatron_loong\.integration .*?)```", page, re.S)
    _, *lines, config = filter(None, snippet.splitlines())
    assert [line for line in lines if line not in SCRIPT.read_text()] == []
    assert "context_parallel_size=cp" in config
