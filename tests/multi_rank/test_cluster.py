"""The emulated cluster: which NIC carries what, at which rate, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cluster_run import why_not

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = Path("/run/netns")
REASON = why_not()
needs_root = pytest.mark.skipif(REASON is not None, reason=str(REASON))
MIB = 2**20

RINGS = """
import os
import torch
import torch.distributed as dist
from megatron_loong.comm.ring import Ring
from megatron_loong.comm.transport import Message
from megatron_loong.config import LoongConfig
from megatron_loong.comm.groups import build_groups

dist.init_process_group("gloo")
rank = dist.get_rank()
# One ring over both nodes crosses each boundary once: 1 -> 2 and 3 -> 0. Two rings cross it everywhere.
for inner_ring_size, name, mib in ((4, "inner", 8), (2, "outer", 4)):
    groups = build_groups(LoongConfig(4, 1, inner_ring_size), range(4))
    handle = groups.handle(name)
    to, origin = (handle.rank + 1) % handle.size, (handle.rank - 1) % handle.size
    outgoing = torch.full((mib << 20,), rank, dtype=torch.uint8)
    incoming = torch.empty_like(outgoing)
    for wait in Ring(handle).post([Message(True, to, outgoing, "test"), Message(False, origin, incoming, "test")]):
        wait()
    assert incoming.unique().tolist() == [handle.global_ranks[origin]]
    dist.barrier()
dist.destroy_process_group()
"""


def emulate(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """scripts/emulate_cluster.sh with this interpreter."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "scripts/emulate_cluster.sh"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **options)


def namespaces() -> set[str]:
    """Names of the namespaces of emulated clusters on this machine."""
    return {path.name for path in NAMESPACES.glob("loong*")} if NAMESPACES.is_dir() else set()


@needs_root
@pytest.mark.multi_rank
def test_each_rank_uses_its_own_nic(tmp_path: Path) -> None:
    """2 nodes x 2 ranks, 2 NICs: a single ring loads one NIC of a node, a double ring both."""
    script, report = tmp_path / "rings.py", tmp_path / "report.json"
    script.write_text(RINGS)
    before = namespaces()
    words = f"2 2 --nic 200mbit --nics-per-node 2 --report {report} -- {sys.executable} {script}"
    done = emulate(*words.split())
    assert done.returncode == 0, done.stderr
    assert namespaces() <= before
    facts = json.loads(report.read_text())
    for node in range(2):
        nic0, nic1 = facts["nic_sent_bytes"][node]
        # Headers, acknowledgements and the rendezvous come on top.
        assert 4 * MIB < nic0 < 4.5 * MIB, facts
        assert 12 * MIB < nic1 < 12.5 * MIB, facts
    # 200 Mbit/s are 25 MB/s on the wire; a loaded machine may take longer, never less.
    assert 12e6 < facts["inter_bytes_per_s"] < 25.5e6, facts
    assert 25.5e6 < facts["all_nics_bytes_per_s"] < 51e6, facts
    assert facts["intra_bytes_per_s"] > 2 * facts["inter_bytes_per_s"], facts


WINDOWS = """
import os, subprocess
from benchmarks.cluster import WINDOW_SEGMENTS
known = subprocess.run(["ip", "tcp_metrics", "show"], capture_output=True, text=True, check=True).stdout.splitlines()
there = f"10.77.{1 - int(os.environ['GROUP_RANK'])}."
found = sorted(line.split()[0] for line in known if line.startswith(there) and f" cwnd {WINDOW_SEGMENTS} " in line)
assert found == [there + "1", there + "2", there + "3"], known
"""


@needs_root
@pytest.mark.multi_rank
def test_the_window_holds_for_every_pair_of_ranks(tmp_path: Path) -> None:
    """Linux takes it for addresses that it has met: one connection without it would have all of the NIC."""
    script = tmp_path / "windows.py"
    script.write_text(WINDOWS)
    done = emulate(*f"2 3 --nic 1gbit -- {sys.executable} {script}".split(), cwd=ROOT)
    assert done.returncode == 0, done.stderr


@needs_root
def test_a_rank_that_fails_ends_the_run() -> None:
    before = namespaces()
    started = time.monotonic()
    done = emulate("1", "2", "--", "bash", "-c", "[ $RANK = 0 ] && exit 7; sleep 60")
    assert done.returncode == 7
    assert "rank 0 ended with exit code 7" in done.stderr
    assert time.monotonic() - started < 30
    assert namespaces() <= before


@needs_root
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_a_run_that_is_ended_leaves_nothing_behind(how: signal.Signals, tmp_path: Path) -> None:
    """On SIGTERM it cleans up itself, after SIGKILL the next run does; a process that a rank started ends too."""
    pid_file = tmp_path / "pid"
    command = [str(ROOT / "scripts/emulate_cluster.sh"), "1", "2", "--", "bash", "-c"]
    command.append(f"[ $RANK = 0 ] && setsid sleep 300 & echo $! > {pid_file}.$RANK; sleep 300")
    run = subprocess.Popen(command, env={**os.environ, "PYTHON": sys.executable}, stderr=subprocess.DEVNULL)
    mine = f"loong{run.pid}-"
    try:
        deadline = time.monotonic() + 30
        while not Path(f"{pid_file}.0").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert any(name.startswith(mine) for name in namespaces())
        run.send_signal(how)
        run.wait(timeout=30)
        if how == signal.SIGKILL:
            done = emulate("1", "1", "--", "true")
            assert "namespaces of a run that was killed" in done.stderr
    finally:
        run.kill()
    assert not any(name.startswith(mine) for name in namespaces())
    child = Path(f"{pid_file}.0").read_text().strip()
    stat = Path(f"/proc/{child}/stat")
    assert child and (not stat.exists() or " Z " in stat.read_text())


@pytest.mark.parametrize(
    "words, message",
    [
        ("2 4 --nics-per-node 5 -- true", "use 1 to 4 with RANKS_PER_NODE=4"),
        ("0 4 -- true", "NODES=0"),
        ("2 4 --nic 400 -- true", "write it like 400mbit"),
        ("2 4", "put it after --"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(words: str, message: str) -> None:
    done = emulate(*words.split())
    assert done.returncode == 2
    assert message in done.stderr


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "takes root" in str(why_not())
