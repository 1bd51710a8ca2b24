"""When one rank is lost in the middle of a ring, the others end with an error that names what was lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_loong.config import LoongConfig
from tests.multi_rank import cases
from tests.multi_rank.pool import WorkerFailure, WorkerPool

TIMEOUT_S = 4.0


def messages_after_losing_rank_2(how: str, task: Callable[..., str], *args: object) -> dict[int, str]:
    """What the other ranks were told; every one of them within the timeout."""
    pool = WorkerPool(4)
    try:
        answers = pool.run(task, *args, TIMEOUT_S)
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


@pytest.mark.parametrize(
    ("how", "w"),
    [
        pytest.param("killed", 4, id="single-ring-killed"),
        pytest.param("killed", 2, id="double-ring-killed"),
        pytest.param("hanging", 4, id="single-ring-hanging", marks=pytest.mark.nightly),
        pytest.param("hanging", 2, id="double-ring-hanging"),
    ],
)
def test_the_others_end_within_the_timeout(how: str, w: int) -> None:
    messages = messages_after_losing_rank_2(how, cases.lose_a_peer, LoongConfig(4, 1, w), how)
    for message in messages.values():
        assert "ring [" in message and "block of ring rank" in message and "the hop with rank" in message, message
    # Its right-hand neighbour on the inner ring, rank 3, was to receive from it.
    assert "rank 2 (receiving)" in messages[3], messages[3]


@pytest.mark.parametrize("how", ["killed", "hanging"])
def test_a_lost_rank_ends_the_all_to_all_of_the_others(how: str) -> None:
    """Ulysses: the others wait in the all-to-all of the output."""
    for message in messages_after_losing_rank_2(how, cases.lose_a_peer, LoongConfig(4, 4), how).values():
        assert "all-to-all of the output in the head group [0, 1, 2, 3]" in message, message


def test_a_rank_lost_before_the_lengths_are_asked_for_is_named_with_its_group() -> None:
    """Without `seq_len` the ranks ask each other; the other collectives of the layout go the same way."""
    for message in messages_after_losing_rank_2("killed", cases.lose_a_peer_before, LoongConfig(4, 4)).values():
        assert "gathering lengths in the head group [0, 1, 2, 3] did not complete; one of these" in message, message
