"""The benchmark of the memory-bound passes: it runs, counts the bytes it must, and refuses a wrong pass."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import copy_rate
from megatron_loong.kernels import row_ops

SMALL = "--device cpu --tokens 16 --heads 4 --kv-heads 2 --width 8 --peers 2 --copy-bytes 4096 --repeats 1".split()


def test_record_has_every_pass_and_the_bytes_it_must_move(tmp_path, capsys):
    file = tmp_path / "record.json"
    assert copy_rate.main([*SMALL, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    q, kv, lse = 16 * 4 * 8, 16 * 2 * 8, 16 * 4
    assert {name: x["bytes"] for name, x in record["passes"].items()} == {
        "merge": q * (4 + 4 * 2 + 2) + lse * 4 * (1 + 4 + 1),
        "add dk, dv": 2 * kv * (2 + 2 + 2),
        "add dq": q * (4 + 4 * 2 + 2),
        "pack q, k, v": (q + 2 * kv) * 4,
        "order q, k, v": (q + 2 * kv) * 4 + 32 * 8,
    }
    for x in record["passes"].values():
        assert x["of_copy"] == pytest.approx(x["bytes"] / x["seconds"] / record["copy_bytes_per_s"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(record["passes"])


def test_packing_and_ordering_are_what_the_head_exchange_does():
    """Each peer's piece has its heads of q, k and v token by token; the second halves come back in opposite order."""
    found = copy_rate.passes(8, 4, 2, 4, 2, torch.device("cpu"))
    found["pack q, k, v"].run()
    found["order q, k, v"].run()
    (message,) = found["pack q, k, v"].results
    q, k, v = (x.flatten(1) for x in found["order q, k, v"].results)
    pieces = message.flatten(0, 1)
    order = [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15, 4, 5, 6, 7]
    assert torch.equal(torch.cat([q, k, v], 1), pieces[order])


def test_a_wrong_pass_is_not_timed_and_the_others_are(monkeypatch, tmp_path):
    right = row_ops.add_rows

    def wrong(into, parts):
        if not row_ops._compared_with and len(into) == 2:
            parts = parts[:1]
        right(into, parts)

    monkeypatch.setattr(row_ops, "add_rows", wrong)
    assert copy_rate.main([*SMALL, "--json", str(tmp_path / "record.json")]) == 1
    record = json.loads((tmp_path / "record.json").read_text())
    assert list(record["failed"]) == ["add dk, dv"] and "RuntimeError: add dk, dv: differs by" in str(record["failed"])
    assert set(record["passes"]) == {"merge", "add dq", "pack q, k, v", "order q, k, v"}


def test_without_a_gpu_it_says_what_to_do(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert copy_rate.main([]) == 2
    assert "--device cpu" in capsys.readouterr().err
