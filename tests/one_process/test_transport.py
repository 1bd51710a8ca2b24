"""How blocks travel: which transport a group and a device get, staging, and what is asked of NCCL."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_loong.comm import flight
from megatron_loong.comm.errors import CommunicationError, collective
from megatron_loong.comm.groups import GroupHandle
from megatron_loong.comm.ring import Ring
from megatron_loong.comm.transport import Direct, Message, Staged, transport_for

GROUP: Any = object()
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def handle_of_two(group: Any) -> GroupHandle:
    return GroupHandle("inner", (0, 1), 0, group, timedelta(seconds=7))


@pytest.mark.parametrize(
    ("backends", "device", "kind", "batched"),
    [
        ("cpu:gloo,cuda:gloo", CPU, Direct, False),
        ("cpu:gloo,cuda:gloo", CUDA, Staged, False),
        ("cpu:gloo,cuda:nccl", CPU, Direct, False),
        ("cpu:gloo,cuda:nccl", CUDA, Direct, True),
        ("cuda:nccl", CUDA, Direct, True),
        ("cpu:gloo", CUDA, Staged, False),
    ],
)
def test_the_backend_for_the_device_decides(backends: str, device: torch.device, kind: type, batched: bool) -> None:
    with mock.patch.object(dist, "get_backend_config", lambda group: backends):
        chosen = transport_for(handle_of_two(GROUP), device)
    assert type(chosen) is kind and chosen.batched is batched


def test_gloo_and_a_device_without_staging_is_refused() -> None:
    with mock.patch.object(dist, "get_backend_config", lambda group: "cpu:gloo,xpu:gloo"):
        with pytest.raises(NotImplementedError, match="xpu"):
            transport_for(handle_of_two(GROUP), torch.device("xpu"))


class FakeWork:
    """Notes what its wait is given."""

    def __init__(self) -> None:
        self.waits: list[tuple[Any, ...]] = []

    def wait(self, *args: Any) -> bool:
        self.waits.append(args)
        return True


def ring_of_two(group: Any) -> Ring:
    return Ring(handle_of_two(group))


def exchange(ring: Ring) -> list[Callable[[], None]]:
    blocks = [torch.zeros(2) for _ in range(2)]
    return ring.post([Message(True, 1, blocks[0], "there"), Message(False, 1, blocks[1], "back")])


@pytest.mark.parametrize("works_given", [1, 2], ids=["coalesced", "one-per-message"])
def test_nccl_gets_one_batch_and_waits_that_do_not_block_the_host(works_given: int) -> None:
    """A ring of two whose sends and receives are not in one group call can deadlock. Given a timeout, NCCL's wait()
    stops the host until the message has arrived: every hop would be a synchronisation."""
    works, batches = [FakeWork() for _ in range(works_given)], []

    def batch(operations: list[Any]) -> list[FakeWork]:
        batches.append(operations)
        return works

    with (
        mock.patch.object(dist, "get_backend_config", lambda group: "cpu:nccl,cuda:nccl"),
        mock.patch.object(dist, "batch_isend_irecv", batch),
        mock.patch.object(dist, "P2POp", lambda *operation: operation),
    ):
        waits = exchange(ring_of_two(GROUP))
    assert len(batches) == 1 and [(x[0], x[2]) for x in batches[0]] == [(dist.isend, 1), (dist.irecv, 1)]
    for wait in waits + waits:
        wait()
    assert [work.waits for work in works] == [[()]] * works_given, "each once, without a timeout"


def test_gloo_waits_as_long_as_the_group_says() -> None:
    """Its wait() without an argument ignores the timeout of the group."""
    work = FakeWork()
    with (
        mock.patch.object(dist, "get_backend_config", lambda group: "cpu:gloo"),
        mock.patch.object(dist, "isend", lambda *args, **kwargs: work),
        mock.patch.object(dist, "irecv", lambda *args, **kwargs: FakeWork()),
    ):
        for wait in exchange(ring_of_two(GROUP)):
            wait()
    assert work.waits == [(timedelta(seconds=7),)]


def test_a_message_that_cannot_be_posted_is_named_and_left_on_record(tmp_path: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("connection closed")

    with (
        mock.patch.object(dist, "get_backend_config", lambda group: "cpu:gloo"),
        mock.patch.object(dist, "isend", lambda *args, **kwargs: FakeWork()),
        mock.patch.object(dist, "irecv", refuse),
        mock.patch.dict(os.environ, {"LOONG_FLIGHT_FOLDER": str(tmp_path)}),
        pytest.raises(
            CommunicationError, match=r"back: the hop with rank 1 \(receiving\).*rank0.json.*connection closed"
        ),
    ):
        exchange(ring_of_two(GROUP))
    (path,) = tmp_path.iterdir()
    sent, refused = json.loads(path.read_text())["operations"][-2:]
    assert (sent["operation"], sent["waited"]) == ("send", None)
    assert (refused["operation"], refused["what"], refused["peer"], refused["done"]) == ("receive", "back", 1, None)
    assert refused["waited"] >= refused["posted"]


def test_an_error_stays_what_it_was_where_no_record_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        mock.patch.dict(os.environ, {"LOONG_FLIGHT_FOLDER": str(tmp_path / "file")}),
        pytest.raises(CommunicationError, match=r"within the group's timeout\. Cause: lost$"),
        collective("gathering", "head group", [0, 1]),
    ):
        raise RuntimeError("lost")


@pytest.mark.parametrize(
    ("logs", "folder"),
    [("logs/none_x", "logs/none_x/attempt_1"), ("torchelastic_x/none_y", "loong_flight"), (None, "loong_flight")],
)
def test_records_go_where_torchrun_was_told_to_log(logs: str | None, folder: str) -> None:
    known = {
        "LOONG_FLIGHT_FOLDER": "",
        "TORCHELASTIC_ERROR_FILE": f"/tmp/{logs}/attempt_1/3/error.json" if logs else "",
    }
    with mock.patch.dict(os.environ, known):
        assert str(flight.folder()).removeprefix("/tmp/") == folder


class StagedOnCpu(Staged):
    """Staging of tensors that the backend could read where they are; notes every buffer of the host."""

    def __init__(self, wire: Any) -> None:
        super().__init__(wire)
        self.buffers: list[torch.Tensor] = []

    def host_buffer(self, block: torch.Tensor) -> torch.Tensor:
        self.buffers.append(torch.zeros_like(block))
        return self.buffers[-1]


def test_staged_messages_are_copied_out_at_the_post_and_in_at_the_wait() -> None:
    posted: list[torch.Tensor] = []

    def post(block: torch.Tensor, *args: Any, **kwargs: Any) -> FakeWork:
        posted.append(block.clone())
        return FakeWork()

    with mock.patch.object(dist, "isend", post), mock.patch.object(dist, "irecv", post):
        staged = StagedOnCpu(Direct(handle_of_two(GROUP), "gloo"))
        sent, received = torch.ones(2), torch.zeros(2)
        waits = [staged.post([Message(True, 1, sent, "")]), staged.post([Message(False, 1, received, "")])]
    assert posted[0].tolist() == [1, 1], "the copy out is complete before gloo reads it"
    staged.buffers[1].fill_(7)  # arrives
    assert received.tolist() == [0, 0]
    for wait in waits:
        wait()
    assert received.tolist() == [7, 7] and sent.tolist() == [1, 1]


@pytest.mark.parametrize("global_ranks", [(0, 1, 2), (5, 3, 4)])
def test_pieces_of_an_all_to_all_go_by_coordinate_whatever_the_order_of_the_group(
    global_ranks: tuple[int, ...],
) -> None:
    """torch sorts the ranks of a group, and its all-to-all knows places in the sorted order alone."""
    by_rank = dict(zip(global_ranks, range(3), strict=True))
    order = [by_rank[rank] for rank in sorted(global_ranks)]
    lengths = [1, 2, 3]
    seen: list[list[int]] = []

    def exchange(received: torch.Tensor, sent: torch.Tensor, *lengths: list[int], **_: Any) -> FakeWork:
        seen.extend([sent.tolist(), *lengths])
        received.copy_(sent)  # everyone sends this rank what it sends to everyone
        return FakeWork()

    sent = torch.tensor([0, 1, 1, 2, 2, 2])  # to each coordinate its number
    received = torch.empty_like(sent)
    with mock.patch.object(dist, "all_to_all_single", exchange):
        transport = Direct(GroupHandle("head", global_ranks, 0, GROUP), "gloo")
        transport.all_to_all(received, sent, lengths, lengths)()
    in_group_order = [lengths[coordinate] for coordinate in order]
    assert seen == [[c for c in order for _ in range(lengths[c])], in_group_order, in_group_order]
    assert received.tolist() == sent.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_staged_message_sees_what_the_stream_did_before_and_not_after() -> None:
    block, target = torch.zeros(1 << 24, device="cuda"), torch.zeros(1 << 24, device="cuda")
    posted: list[torch.Tensor] = []

    def post(block: torch.Tensor, *args: Any, **kwargs: Any) -> FakeWork:
        posted.append(block)
        return FakeWork()

    with mock.patch.object(dist, "isend", post), mock.patch.object(dist, "irecv", post):
        staged = Staged(Direct(handle_of_two(GROUP), "gloo"))
        torch.cuda._sleep(50_000_000)
        block.fill_(3)
        staged.post([Message(True, 1, block, "")])
        block.fill_(5)
        wait = staged.post([Message(False, 1, target, "")])
    assert all(host.is_pinned() for host in posted) and (posted[0] == 3).all()
    posted[1].copy_(posted[0])
    wait()
    assert (target == 3).all()
