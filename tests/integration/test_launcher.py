"""`python -m megatron_loong`: the command line, what a script finds when it starts, and CPU mode without Megatron."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_loong.__main__ import main
from megatron_loong.launch import command as command_line
from tests.integration.megatron_runs import REPOSITORY, own_script


def run_python(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python process that finds megatron_loong; its output as text."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RANK": "0", **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "pretrain_any.py"
    path.parent.mkdir()
    path.write_text("")
    return path


def test_options_before_the_script_are_ours_and_the_rest_is_its_own(script: Path) -> None:
    command = command_line.parse(["--cpu", "--cpu", str(script), "--cpu", "--lr", "1e-3"])
    assert command == command_line.Command(str(script), ("--cpu", "--lr", "1e-3"), cpu_requests=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python -m megatron_loong"),
        (["--cpu"], "no script was given"),
        (["pretrain_nothing.py"], "no such script: pretrain_nothing.py"),
        (["--gpus", "8"], "--gpus is not an option of megatron_loong"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_says_why(arguments: list[str], message: str, tmp_path: Path) -> None:
    ended = run_python("-m", "megatron_loong", *arguments, cwd=tmp_path)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_tells_how_to_start_a_run(tmp_path: Path) -> None:
    ended = run_python("-m", "megatron_loong", "--help", cwd=tmp_path)
    assert ended.returncode == 0
    assert "--context-parallel-impl loong" in ended.stdout


def test_the_script_finds_argv_and_path_as_python_sets_them(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["-m", "--cpu", str(script), "--lr", "1"])
    monkeypatch.setattr(sys, "path", [os.getcwd(), "/a/wheel/site-packages"])
    command_line.take_the_place_of_python(command_line.parse(["--cpu", str(script), "--lr", "1"]))
    assert sys.argv == [str(script), "--lr", "1"]
    assert sys.path == [str(script.parent), "/a/wheel/site-packages", str(REPOSITORY)]


def test_cpu_mode_refuses_a_machine_with_a_gpu_unless_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from megatron_loong.integration import cpu_mode

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(ValueError, match="8 GPU.*--cpu --cpu"):
        cpu_mode.enable()


def test_cpu_mode_refuses_what_no_stand_in_covers(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["--cpu", "--cpu", str(script), "--use-torch-fsdp2"]) == 2
    assert "--use-torch-fsdp2 does not work with --cpu; supported there: --use-dist" in capsys.readouterr().err


def test_cpu_mode_maps_cuda_and_reaches_spawned_processes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing
            import torch

            def look(queue=None):
                assert torch.cuda.is_available() and torch.cuda.device_count() == 1
                x = torch.zeros(2, device="cuda").cuda().to("cuda:0").to(torch.device("cuda", 0)).pin_memory()
                assert x.device.type == "cpu" and x.type() == "torch.cuda.FloatTensor"
                torch.cuda.manual_seed(3)
                a = torch.rand(1, device=torch.cuda.current_device())
                torch.cuda.manual_seed(3)
                assert torch.equal(a, torch.rand(1))
                if queue is not None:
                    queue.put("the child sees it too")

            if __name__ == "__main__":
                look()
                context = multiprocessing.get_context("spawn")
                queue = context.Queue()
                child = context.Process(target=look, args=(queue,))
                child.start()
                child.join(60)
                assert child.exitcode == 0
                print(queue.get(timeout=10))
            """
        )
    )
    program = (
        "import runpy; from megatron_loong.integration import cpu_mode; cpu_mode.enable(allow_with_gpu=True); "
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    ended = run_python("-c", program, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "megatron_loong CPU mode: torch.cuda calls are mapped to the CPU" in ended.stdout
    assert "the child sees it too" in ended.stdout


#: The part of `megatron.training`'s start that runs `make`, reached through each door without a GPU.
COMPILE = """
import runpy, sys, types
import torch.distributed as dist
from megatron import training
from megatron.training import global_vars, initialize

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
global_vars.set_args(types.SimpleNamespace())
training.pretrain = lambda **parts: initialize._compile_dependencies()
if sys.argv[1:]:
    runpy.run_path(sys.argv[1], run_name="__main__")
else:
    training.pretrain()
print("training would start now")
"""


@pytest.mark.parametrize("door", ["launcher", "own-script-alone"])
def test_training_from_the_wheel_runs_no_make(door: str, tmp_path: Path) -> None:
    own = own_script()
    if own is None:
        pytest.skip("needs megatron-core 0.17 or newer, whose wheel brings megatron.training")
    program = tmp_path / "compile.py"
    program.write_text(COMPILE)
    make = tmp_path / "make"
    make.write_text("#!/bin/sh\necho make was run\nexit 2\n")
    make.chmod(0o755)
    arguments = ["-m", "megatron_loong", str(program)] if door == "launcher" else [str(program), str(own)]
    ended = run_python(*arguments, cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "make was run" not in ended.stdout
    assert ended.returncode == 0, ended.stderr
    assert "training would start now" in ended.stdout
