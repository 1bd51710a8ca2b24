"""How blocks travel: which transport a group and a device get, staging, and what is asked of NCCL."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_loong.comm import routes
from megatron_loong.comm.errors import CommunicationError
from megatron_loong.comm.ring import Message, Ring
from megatron_loong.comm.routes import transport_for
from megatron_loong.comm.transport import Direct, End, PinnedMemory, Staged
from megatron_loong.topology.groups import GroupHandle

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


def test_a_message_that_cannot_be_posted_is_named() -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("connection closed")

    with (
        mock.patch.object(dist, "get_backend_config", lambda group: "cpu:gloo"),
        mock.patch.object(dist, "isend", lambda *args, **kwargs: FakeWork()),
        mock.patch.object(dist, "irecv", refuse),
        pytest.raises(CommunicationError, match=r"back: the hop with rank 1 \(receiving\).*connection closed"),
    ):
        exchange(ring_of_two(GROUP))


class Log:
    """`HostMemory` on the CPU that writes down the order of things."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def buffer(self, block: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(block)

    def copy_out(self, block: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        self.events.append("copy out")
        return block.clone(), lambda: self.events.append("wait for copy")

    def copy_in(self, host: torch.Tensor, block: torch.Tensor) -> None:
        self.events.append("copy in")


def test_all_copies_out_begin_before_the_first_is_waited_for() -> None:
    log, block = Log(), torch.zeros(2)

    def post(kind: str) -> Callable[..., FakeWork]:
        return lambda *args, **kwargs: log.events.append(kind) or FakeWork()

    with mock.patch.object(dist, "isend", post("send")), mock.patch.object(dist, "irecv", post("receive")):
        staged = Staged(Direct(GROUP, "gloo"), log)
        pending = list(staged.post([End(True, 1, block), End(False, 1, block), End(True, 1, block)]))
    assert log.events == ["copy out", "copy out", "wait for copy", "send", "receive", "wait for copy", "send"]
    log.events.clear()
    for wait in pending:
        wait(timedelta(seconds=1))
    assert log.events == ["copy in"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_copies_see_what_the_stream_did_before_and_not_after() -> None:
    memory, block = PinnedMemory(), torch.zeros(1 << 24, device="cuda")
    torch.cuda._sleep(50_000_000)
    block.fill_(3)
    host, wait = memory.copy_out(block)
    wait()
    block.fill_(5)
    assert host.is_pinned() and (host == 3).all()
    target = torch.empty_like(block)
    memory.copy_in(host, target)
    assert (target == 3).all()
    assert isinstance(routes._host_memory(block.device), PinnedMemory)
