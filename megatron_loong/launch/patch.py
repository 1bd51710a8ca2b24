"""`megatron-loong patch PATH`: put the flag into a Megatron-LM tree of one's own, take it out again, or only ask.

A patch is a zero-context diff (`git apply --unidiff-zero`): it finds its place by line number alone, so it is applied
only to the very file it was made for. The git hash in its `index` line says which file that is.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

#: One folder per Megatron-LM tag; in the repository it lies at the top.
PATCHES = Path(__file__).resolve().parent / "patches"

_INDEX = re.compile(r"^index (?P<before>[0-9a-f]{40})\.\.(?P<after>[0-9a-f]{40})", re.MULTILINE)
_TARGET = re.compile(r"^\+\+\+ b/(?P<path>\S+)$", re.MULTILINE)
_VERSION_PART = re.compile(r"^(?P<part>MAJOR|MINOR|PATCH) = (?P<number>\d+)$", re.MULTILINE)


class PatchError(ValueError):
    """The tree cannot be patched as asked; the message says why and what would work."""


@dataclass(frozen=True)
class Patch:
    """One file of `patches/<tag>/`, which changes one file of a tree."""

    file: Path
    target: str
    """Path inside the tree."""
    before: str
    """Git hash of the target as its tag has it."""
    after: str

    @classmethod
    def read(cls, file: Path) -> Patch:
        """Read what a patch says of itself."""
        text = file.read_text(encoding="utf-8")
        index, target = _INDEX.search(text), _TARGET.search(text)
        assert index and target, f"{file} is not a patch of ours"
        return cls(file, target["path"], index["before"], index["after"])

    def state_in(self, tree: Path) -> str:
        """`clean`, `applied` or `changed`, by the git hash of the target."""
        path = tree / self.target
        found = git_hash(path.read_bytes()) if path.is_file() else None
        return {self.before: "clean", self.after: "applied"}.get(found or "", "changed")


def git_hash(content: bytes) -> str:
    """The name under which git stores a file.

    >>> git_hash(b"")
    'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391'
    """
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def version_of(tree: Path) -> tuple[int, int, int]:
    """Version of the megatron-core in a Megatron-LM tree; `PatchError` when it is not one."""
    info = tree / "megatron" / "core" / "package_info.py"
    if not info.is_file():
        raise PatchError(f"{tree} is not a Megatron-LM checkout: it has no megatron/core/package_info.py")
    parts = {found["part"]: int(found["number"]) for found in _VERSION_PART.finditer(info.read_text(encoding="utf-8"))}
    return parts["MAJOR"], parts["MINOR"], parts["PATCH"]


def patch_for(tree: Path) -> Patch:
    """The patch for the release that `tree` holds; `PatchError` when there is none."""
    major, minor, fix = version_of(tree)
    folders = sorted(PATCHES.glob("core_v*"))
    fitting = [folder for folder in folders if folder.name.startswith(f"core_v{major}.{minor}.")]
    if not fitting:
        raise PatchError(
            f"{tree} is megatron-core {major}.{minor}.{fix}, and there is no patch for {major}.{minor}; there are "
            f"{', '.join(folder.name for folder in folders)}. The launcher needs none: python -m megatron_loong SCRIPT"
        )
    (file,) = fitting[-1].glob("*.patch")
    return Patch.read(file)


def carry_out(tree: Path, *, check: bool = False, revert: bool = False) -> str:
    """Apply the patch of this tree (or take it out); with `check` only say whether that would work.

    Returns a sentence. Applying twice, or reverting what is not applied, changes nothing and says so. Raises
    `PatchError` when the file is not the one that the patch was made for.
    """
    patch = patch_for(tree)
    name = f"{patch.file.parent.name}/{patch.file.name}"
    state = patch.state_in(tree)
    if state == "changed":
        by_hand = "remove from it by hand" if revert else "add to its end by hand"
        raise PatchError(
            f"{tree / patch.target} is not as {patch.file.parent.name} has it{', patched' * revert}, so a patch "
            f"without context lines could land anywhere; {by_hand} the lines of {patch.file} that begin with '+'"
        )
    if state == ("clean" if revert else "applied"):
        return f"{name} is {'not applied' if revert else 'applied already'}; nothing to do"
    if not check:
        command = ["git", "apply", "--unidiff-zero", *(["--reverse"] if revert else []), str(patch.file)]
        # Without a ceiling, git takes paths to be those of a repository around the tree, and skips them.
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
        ended = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        expected = patch.before if revert else patch.after
        if ended.returncode or git_hash((tree / patch.target).read_bytes()) != expected:
            raise PatchError(f"git apply failed on {tree / patch.target}: {ended.stderr.strip() or 'nothing changed'}")
    done = "can be " if check else ""
    return f"{name} {done}{'reverted' if revert else 'applied'}: {patch.target} in {tree}"


def main(argv: list[str]) -> int:
    """`megatron-loong patch PATH [--check | --revert]`. 0: done, or possible; 1: not possible, stderr says why."""
    parser = argparse.ArgumentParser(prog="megatron-loong patch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, help="a Megatron-LM checkout")
    parser.add_argument("--check", action="store_true", help="change nothing; say whether it would work")
    parser.add_argument("--revert", action="store_true", help="take the patch out again")
    args = parser.parse_args(argv)
    try:
        print(carry_out(args.path.resolve(), check=args.check, revert=args.revert))
    except PatchError as error:
        print(f"megatron_loong: {error}", file=sys.stderr)
        return 1
    return 0
