"""What the documents say about the repository holds: links lead somewhere, and no path of one machine is in it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def repository_files() -> list[Path]:
    """Files under version control, and new ones that are not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in (ROOT / name for name in names) if path.is_file()]


def dead_links(text: str, folder: Path) -> list[str]:
    """Relative link targets in Markdown `text` that do not exist below `folder`."""
    targets = [target.split("#")[0] for target in LINK.findall(text) if "://" not in target]
    return [target for target in targets if target and not (folder / target).exists()]


def test_relative_links_lead_somewhere() -> None:
    documents = [path for path in repository_files() if path.suffix == ".md"]
    assert ROOT / "README.md" in documents
    dead = {str(path.relative_to(ROOT)): dead_links(path.read_text(), path.parent) for path in documents}
    assert not {name: links for name, links in dead.items() if links}


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "here.md").touch()
    assert dead_links("[a](here.md#part) [b](gone.md) ![c](https://x.org/y.png) [d](#top)", tmp_path) == ["gone.md"]


def test_no_path_of_this_machine() -> None:
    places = [f"{place}/" for place in (Path.home(), ROOT) if place != Path("/")]
    found = [
        f"{path.relative_to(ROOT)}: {place}"
        for path in repository_files()
        for place in places
        if place.encode() in path.read_bytes()
    ]
    assert not found
