"""When one rank is lost in the middle of a ring, the others end with an error that names what was lost.

Each leaves a record of its last messages, and `megatron-loong postmortem` reads from these who was lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_loong.__main__ import main
from megatron_loong.config import LoongConfig
from tests.multi_rank import cases
from tests.multi_rank.pool import WorkerFailure, WorkerPool

TIMEOUT_S = 4.0


def messages_after_losing_rank_2(how: str, folder: Path, task: Callable[..., str], *args: object) -> dict[int, str]:
    """What the other ranks were told; every one of them within the timeout. Records go to `folder`."""
    pool = WorkerPool(4)
    try:
        answers = pool.run(task, *args, TIMEOUT_S, str(folder))
    except WorkerFailure as failure:
        assert how == "killed" and "rank 2: the process died" in str(failure), failure
        answers = failure.results
    finally:
        pool.stop()
    messages = {}
    for rank in (0, 1, 3):
        seconds, messages[rank] = answers[rank].split(" ", 1)
        # Every rank waits at most its own timeout for a neighbour that itself waits for the lost one.
        assert float(seconds) <= 2 * TIMEOUT_S + 2, f"rank {rank} needed {seconds} s"
    return messages


def postmortem(how: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that says where rank 2 was waited for. Only that rank is blamed by the records of the others."""
    written = {path.name for path in folder.iterdir()} - {"loong_flight.rank2.json"}
    assert written == {f"loong_flight.rank{rank}.json" for rank in (0, 1, 3)}
    assert main(["postmortem", str(folder)]) == 0
    printed = capsys.readouterr().out
    lines = printed.partition("errors, ")[0].splitlines()
    accused = {line.split(" ")[1] for line in lines if line.startswith("rank ")}
    assert accused == {"2"}, printed
    assert lines[0].startswith("rank 2 is gone: it left no record" if how == "killed" else "rank 2 "), printed
    return lines[-1]


@pytest.mark.parametrize(
    ("how", "w"),
    [
        pytest.param("killed", 4, id="single-ring-killed"),
        pytest.param("killed", 2, id="double-ring-killed"),
        pytest.param("hanging", 4, id="single-ring-hanging", marks=pytest.mark.nightly),
        pytest.param("hanging", 2, id="double-ring-hanging"),
    ],
)
def test_the_others_end_within_the_timeout(
    how: str, w: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = messages_after_losing_rank_2(how, tmp_path, cases.lose_a_peer, LoongConfig(4, 1, w), how)
    for message in messages.values():
        assert "ring [" in message and "block of ring rank" in message and "the hop with rank" in message, message
    # Its neighbour on the inner ring, rank 3, sends to it and receives from it: either wait may come first.
    assert "the hop with rank 2 (" in messages[3], messages[3]
    where = postmortem(how, tmp_path, capsys)
    assert re.search(r"(receive from|send to) rank 2 in the \w+ ring \[.*2.*\]: .* of ring rank \d, .* bytes", where), (
        where
    )


@pytest.mark.parametrize("how", ["killed", "hanging"])
def test_a_lost_rank_ends_the_all_to_all_of_the_others(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ulysses: the others wait in the all-to-all of the output."""
    for message in messages_after_losing_rank_2(how, tmp_path, cases.lose_a_peer, LoongConfig(4, 4), how).values():
        assert "all-to-all of the output in the head group [0, 1, 2, 3]" in message, message
    where = postmortem(how, tmp_path, capsys)
    assert "all-to-all in the head group [0, 1, 2, 3]: the output, " in where, where


def test_a_rank_lost_before_the_lengths_are_asked_for_is_named_with_its_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without `seq_len` the ranks ask each other; the other collectives of the layout go the same way."""
    for message in messages_after_losing_rank_2(
        "killed", tmp_path, cases.lose_a_peer_before, LoongConfig(4, 4)
    ).values():
        assert "gathering lengths in the head group [0, 1, 2, 3] did not complete; one of these" in message, message
    where = postmortem("killed", tmp_path, capsys)
    assert "collective in the head group [0, 1, 2, 3]: gathering lengths, its operation " in where, where
