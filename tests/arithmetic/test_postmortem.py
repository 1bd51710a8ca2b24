"""`megatron-loong postmortem` on records as ranks write them; real ones are in tests/multi_rank/test_dead_peer.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_loong.launch.postmortem import main


def leave(folder: Path, rank: int, peer: int | None, *, failed: float = 60.0, **changes: Any) -> None:
    """The record of a rank that waited for `peer` from 50 s until it gave up."""
    operation = {"number": 7, "operation": "receive", "what": "block of ring rank 1", "group": "inner ring"}
    operation |= {"ranks": [0, 1, 2, 3], "peer": peer, "bytes": 4096, "posted": 49.0, "waited": 50.0, "done": None}
    record = {"rank": rank, "started": 10.0, "failed": failed, "error": "timed out", "operations": [operation]}
    folder.mkdir(exist_ok=True)
    (folder / f"loong_flight.rank{rank}.json").write_text(json.dumps(record | changes))


def test_the_trail_leads_past_ranks_that_waited_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, peer in ((0, 3), (3, 2), (2, 1)):  # rank 0 gave up first, three hops from the lost one
        leave(tmp_path / str(rank), rank, peer, failed=60.0 + rank)
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("rank 1 is gone") and "\n  rank 2 waited for it since 00:00:50.000: receive" in printed
    leave(tmp_path, 1, 0, failed=64.0)
    main([str(tmp_path)])
    assert capsys.readouterr().out.startswith("no rank was gone or late")


def test_records_of_the_run_before_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path, 1, 2)
    leave(tmp_path, 0, 1, failed=160.0, started=110.0)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("rank 1 is gone")


@pytest.mark.parametrize("text", ["", "[]", "null", '{"operations": [1]}', '{"operations": [{"peer": "x"}]}'])
def test_a_damaged_record_is_named_and_none_is_an_error(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("megatron_loong: no loong_flight.rank*.json in ")
    leave(tmp_path, 0, 1)
    (tmp_path / "loong_flight.rank1.json").write_text(text)
    assert main([str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("rank 1 is gone") and "rank1.json is damaged (" in captured.err
