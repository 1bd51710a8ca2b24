"""The pages of docs/: they build, quote messages that exist, and show commands and files that are valid."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_loong.integration.refusals import REFUSALS
from megatron_loong.launch.command import SUBCOMMANDS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PLACEHOLDER = "\0"


def messages_in_code() -> list[str]:
    """Every string of the package; what an f-string fills in is `PLACEHOLDER`, strings side by side are one."""
    found = []
    for path in (ROOT / "megatron_loong").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (str(p.value) if isinstance(p, ast.Constant) else PLACEHOLDER for p in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"\{\w*\}", PLACEHOLDER, node.value))
    return found


def quoted_messages(page: str) -> list[str]:
    """First cells of tables whose head is `message`, with `<>` for what varies."""
    found, inside = [], False
    for line in page.splitlines():
        cell = line.split("|")[1].strip() if line.startswith("|") else None
        if cell is None:
            inside = False
        elif cell == "message":
            inside = True
        elif inside and not cell.startswith("---"):
            found.append(cell.strip("`"))
    return found


def test_quoted_messages_exist_in_the_code() -> None:
    quoted = quoted_messages((DOCS / "troubleshooting.md").read_text())
    code = messages_in_code()
    assert len(quoted) > 20
    missing = [q for q in quoted if not any(q.replace("<>", PLACEHOLDER) in text for text in code)]
    assert not missing


def test_a_message_that_is_gone_is_found() -> None:
    page = "| message | cause |\n|---|---|\n| `no such thing as <>` | x |\n\n| seen |\n|---|\n| `other` |\n"
    assert quoted_messages(page) == ["no such thing as <>"]
    assert not any("no such thing as " + PLACEHOLDER in text for text in messages_in_code())


def test_documented_subcommands_exist() -> None:
    words = re.findall(r"megatron-loong (\w+)", "\n".join(page.read_text() for page in DOCS.glob("*.md")))
    assert {"doctor", "patch", "sbatch"} <= set(words)
    assert set(words) <= set(SUBCOMMANDS)


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def test_yaml_examples_are_yaml_and_name_what_they_must() -> None:
    yaml = pytest.importorskip("yaml")
    job, actions, gitlab = (
        yaml.safe_load(block) for page in ("launchers.md", "verify.md") for block in code_blocks(page, "yaml")
    )
    for role in ("Master", "Worker"):
        container = job["spec"]["pytorchReplicaSpecs"][role]["template"]["spec"]["containers"][0]
        assert container["name"] == "pytorch"  # the operator looks for that name
        assert "--context-parallel-impl=loong" in container["command"]
    assert "compare_native.py" in str(actions["jobs"]["loong"]["steps"])
    assert gitlab["loong"]["artifacts"]["reports"]["junit"] == "report.xml"


def test_python_examples_are_python() -> None:
    for page in DOCS.glob("*.md"):
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            ast.parse(block)


def test_pictures_are_those_of_the_script(tmp_path: Path) -> None:
    matplotlib: Any = pytest.importorskip("matplotlib")
    from matplotlib import image

    script = ROOT / "scripts" / "docs_pictures.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, capture_output=True)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn and matplotlib
    for name in drawn:
        new, kept = (image.imread(str(folder / name)) for folder in (tmp_path, DOCS / "images"))
        assert new.shape == kept.shape
        assert abs(new - kept).mean() < 0.01, f"{name}: run scripts/docs_pictures.py"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="install mkdocs to build the documentation")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "contradicts --context-parallel-impl loong" in (tmp_path / "site/troubleshooting/index.html").read_text()
    assert "Any number of query heads" in (tmp_path / "site/api/index.html").read_text()


def test_every_page_has_a_place_in_the_navigation() -> None:
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_memory_page_has_the_figures_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The columns of docs/memory.md beside Arctic ALST's, lengths and host memory, as the command prints them."""
    from megatron_loong.planner import memory_table

    page = (DOCS / "memory.md").read_text()
    columns = []
    for gpus in ("1", "8", "32"):
        memory_table.main(["--model", "llama3-8b", "--gpus", gpus])
        lines = capsys.readouterr().out.splitlines()[3:]
        found = [re.match(r"(.*?)  +([\d.]+[KM]|none) +([\d-]+) ", line).groups() for line in lines]  # type: ignore[union-attr]
        columns.append({name: seq if host == "-" else f"{seq}, {host} GB" for name, seq, host in found})
    for name in columns[1]:
        one = columns[0][name] if name.startswith(("full recomputation", "+")) and "Selective" not in name else "-"
        assert f"| {name} | {one} | {columns[1][name]} | {columns[2][name]} |" in page, name


REFUSED_BESIDE = {
    "packs": "packed documents beside",
    "reset": "`--reset-attention-mask` beside",
    "hybrid": "`--hybrid-context-parallel` beside",
    "contiguous": "`--loong-sequence-layout contiguous` beside",
    "loong": "",
}


@pytest.mark.parametrize("beside", REFUSALS)
def test_the_status_page_names_what_is_refused(beside: str) -> None:
    """The first word of each row of `REFUSALS`, in the items of the list that tell what it is refused beside."""
    items = re.findall(r"^- (.*?)[;.]$", (DOCS / "status.md").read_text(), re.DOTALL | re.MULTILINE)
    told = " ".join(item for item in items if item.startswith(REFUSED_BESIDE[beside]))
    names = [re.split(r"[ =]", what)[0] for what, *_ in REFUSALS[beside]]
    assert names and [name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", told)] == []
