"""When one rank is lost in the middle of a ring, the others end with an error that names what was lost."""

from __future__ import annotations

import pytest

from megatron_loong.config import LoongConfig
from tests.multi_rank import cases
from tests.multi_rank.pool import WorkerFailure, WorkerPool

TIMEOUT_S = 4.0


@pytest.mark.parametrize("how", ["killed", "hanging"])
@pytest.mark.parametrize("w", [4, 2], ids=["single-ring", "double-ring"])
def test_the_others_end_within_the_timeout(how: str, w: int) -> None:
    pool = WorkerPool(4)
    try:
        answers = pool.run(cases.lose_a_peer, LoongConfig(4, 1, w), how, TIMEOUT_S)
    except WorkerFailure as failure:
        assert how == "killed" and "rank 2: the process died" in str(failure), failure
        answers = failure.results
    finally:
        pool.stop()
    for rank in (0, 1, 3):
        seconds, message = answers[rank].split(" ", 1)
        # Every rank waits at most its own timeout for a neighbour that itself waits for the lost one.
        assert float(seconds) <= 2 * TIMEOUT_S + 2, f"rank {rank} needed {seconds} s"
        assert "ring [" in message and "KV block (" in message and "the hop with rank" in message, message
    # Its right-hand neighbour on the inner ring, rank 3, was to receive from it.
    assert "rank 2 (receiving)" in answers[3], answers[3]


@pytest.mark.parametrize("how", ["killed", "hanging"])
def test_a_lost_rank_ends_the_all_to_all_of_the_others(how: str) -> None:
    """Ulysses: the others wait in the all-to-all of the output."""
    pool = WorkerPool(4)
    try:
        answers = pool.run(cases.lose_a_peer, LoongConfig(4, 4), how, TIMEOUT_S)
    except WorkerFailure as failure:
        assert how == "killed" and "rank 2: the process died" in str(failure), failure
        answers = failure.results
    finally:
        pool.stop()
    for rank in (0, 1, 3):
        seconds, message = answers[rank].split(" ", 1)
        assert float(seconds) <= 2 * TIMEOUT_S + 2, f"rank {rank} needed {seconds} s"
        assert "all-to-all of the output in the head group [0, 1, 2, 3]" in message, message
