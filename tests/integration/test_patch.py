"""`megatron-loong patch`: one patch per Megatron-LM tag, applied to the file it was made for and to no other.

The last tests run in real checkouts: MEGATRON_LM_CHECKOUTS names a folder that holds them as core_v0.16.1, ....
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_loong.launch import patch
from tests.integration.megatron_runs import REPOSITORY

TAGS = ("core_v0.16.1", "core_v0.17.1", "core_v0.18.2", "core_v0.19.0")


def added_lines(file: Path) -> list[str]:
    return [
        line[1:] for line in file.read_text().splitlines() if line.startswith("+") and not line.startswith("+++ b/")
    ]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A Megatron-LM tree of version 0.19.0, as far as a patch looks at it: inside another git repository."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    root = tmp_path / "Megatron-LM"
    (root / "megatron" / "core").mkdir(parents=True)
    (root / "megatron" / "training").mkdir()
    (root / "megatron" / "core" / "package_info.py").write_text("MAJOR = 0\nMINOR = 19\nPATCH = 0\n")
    (root / "megatron" / "training" / "__init__.py").write_text("one\ntwo\n")
    return root


@pytest.fixture
def patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A patch for `tree`, in the form of ours."""
    before, after = patch.git_hash(b"one\ntwo\n"), patch.git_hash(b"one\ntwo\nthree\n")
    name = "megatron/training/__init__.py"
    folder = tmp_path / "patches" / "core_v0.19.0"
    folder.mkdir(parents=True)
    (folder / "0001-three.patch").write_text(
        f"diff --git a/{name} b/{name}\nindex {before}..{after} 100644\n"
        f"--- a/{name}\n+++ b/{name}\n@@ -2,0 +3 @@\n+three\n"
    )
    monkeypatch.setattr(patch, "PATCHES", folder.parent)
    return folder.parent


@pytest.mark.parametrize("tag", TAGS)
def test_patches_are_short_and_without_context(tag: str) -> None:
    (file,) = (REPOSITORY / "patches" / tag).glob("*.patch")
    assert (patch.PATCHES / tag / file.name).samefile(file)
    lines = file.read_text().splitlines()
    body = lines[next(i for i, line in enumerate(lines) if line.startswith("@@")) :]
    assert 1 <= len(added_lines(file)) <= 10
    assert all(line.startswith(("@@", "+", "-")) for line in body)
    assert patch.Patch.read(file).before != patch.Patch.read(file).after


def test_there_is_a_patch_for_every_tag_and_no_other() -> None:
    assert tuple(sorted(folder.name for folder in (REPOSITORY / "patches").iterdir())) == TAGS


def test_apply_and_revert_leave_the_tree_as_it_was(tree: Path, patches: Path) -> None:
    target = tree / "megatron" / "training" / "__init__.py"
    assert "can be applied" in patch.carry_out(tree, check=True)
    assert target.read_text() == "one\ntwo\n"
    assert "applied: megatron/training" in patch.carry_out(tree)
    assert target.read_text() == "one\ntwo\nthree\n"
    assert "applied already; nothing to do" in patch.carry_out(tree)
    assert "can be reverted" in patch.carry_out(tree, check=True, revert=True)
    assert "reverted: megatron/training" in patch.carry_out(tree, revert=True)
    assert target.read_text() == "one\ntwo\n"
    assert "is not applied; nothing to do" in patch.carry_out(tree, revert=True)


def test_what_cannot_be_patched_is_said(
    tree: Path, patches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tree / "megatron" / "training" / "__init__.py"
    target.write_text("one\nanother two\n")
    assert patch.main([str(tree)]) == 1
    said = capsys.readouterr().err
    assert "is not as core_v0.19.0 has it," in said and "add to its end by hand the lines of" in said
    assert patch.main([str(tree), "--revert"]) == 1
    said = capsys.readouterr().err
    assert "is not as core_v0.19.0 has it, patched," in said and "remove from it by hand the lines of" in said
    assert target.read_text() == "one\nanother two\n"
    (tree / "megatron" / "core" / "package_info.py").write_text("MAJOR = 0\nMINOR = 12\nPATCH = 3\n")
    assert patch.main([str(tree), "--check"]) == 1
    assert "0.12.3, and there is no patch for 0.12; there are core_v0.19.0" in capsys.readouterr().err
    assert patch.main([str(tmp_path)]) == 1
    assert "is not a Megatron-LM checkout" in capsys.readouterr().err


# ---- real checkouts --------------------------------------------------------------------------------------------

TRAINING = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 63 --micro-batch-size 1 --global-batch-size 1 --train-iters 1 "
    "--eval-iters 0 --eval-interval 10 --lr 1e-3 --optimizer sgd --attention-dropout 0 --hidden-dropout 0 "
    "--num-workers 0 --log-interval 1 --position-embedding-type rope --untie-embeddings-and-output-weights "
    "--no-create-attention-mask-in-dataloader "
    "--context-parallel-size 2 --context-parallel-impl loong --loong-head-parallel-size 2"
)
#: A user's own script that prepares the CPU mode and then runs the patched tree's script: nothing installs the plugin
#: but the patch.
BY_THE_PATCH = """
import os, runpy, sys
from megatron_loong.integration import cpu_mode
sys.path[0] = os.path.dirname(sys.argv[1])
sys.argv = sys.argv[1:]
arguments = sys.argv[1:]
cpu_mode.enable(allow_with_gpu=True, argv=None if "--help" in arguments else arguments)
sys.argv[1:] = arguments
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def checkout(tag: str, tmp_path: Path) -> Path:
    """A copy of the real checkout of `tag`, or a skip."""
    folder = os.environ.get("MEGATRON_LM_CHECKOUTS")
    if not folder:
        pytest.skip(
            "set MEGATRON_LM_CHECKOUTS to a folder with Megatron-LM checkouts called core_v0.16.1, core_v0.17.1, ..."
        )
    original = Path(folder) / tag
    assert original.is_dir(), f"MEGATRON_LM_CHECKOUTS={folder} has no {tag}"
    copy = tmp_path / tag
    skipped = shutil.ignore_patterns(".git", "tests", "docs", "examples")
    return Path(shutil.copytree(original, copy, ignore=skipped))


@pytest.mark.slow
@pytest.mark.parametrize("tag", TAGS)
def test_a_patched_checkout_has_the_flag_and_trains(tag: str, checkout: Path, tmp_path: Path) -> None:
    patch.carry_out(checkout)
    program = tmp_path / "program.py"
    program.write_text(BY_THE_PATCH)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    script = str(checkout / "pretrain_gpt.py")

    def run(*words: str, may_fail: bool = False) -> str:
        ended = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == 0 or may_fail, ended.stdout[-3000:] + ended.stderr[-3000:]
        return ended.stdout

    assert "--context-parallel-impl" in run(str(program), script, "--help")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    log = run(*torchrun, str(program), script, *TRAINING.split())
    assert "megatron_loong: 2D-Attention: cp 2 = head 2 x ring 1" in log
    assert "iteration        1/       1" in log
    patch.carry_out(checkout, revert=True)
    assert "--context-parallel-impl" not in run(
        str(program), script, "--help", may_fail=True
    )  # 0.18's own ends in an error
