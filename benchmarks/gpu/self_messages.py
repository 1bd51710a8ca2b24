"""NCCL on one GPU: a world of one rank that sends to itself, through the transport that the rings use.

Proves all of the transport but the way to another device: numbers, waits that hold up the stream and not the host,
messages beside a computation, capture in a CUDA graph. On a CPU it runs what gloo has of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.cuda import nccl

from benchmarks.gpu.outcome import Run, main
from benchmarks.gpu.syncs import no_synchronisation
from benchmarks.rank_alone import clock
from megatron_loong.comm.groups import GroupHandle
from megatron_loong.comm.transport import Direct, Message, Pending

TIMEOUT = timedelta(seconds=30)
#: Elements of a block; two of them travel, as k and v do.
SIZE = {"cuda": 1 << 25, "cpu": 1 << 10}
#: A second or more of a GPU's clock.
BUSY_CYCLES = 2_000_000_000

Exchange = Callable[[list[torch.Tensor], list[torch.Tensor]], Pending[None]]
"""(sent, received) -> what waits for them."""


def check(run: Run) -> None:
    """A world of one rank over NCCL: messages to oneself and an all-to-all, on the transport that the rings use."""
    cuda = run.device.type == "cuda"
    backend = "nccl" if cuda else "gloo"
    run.figures |= {"backend": backend, **({"nccl": ".".join(map(str, nccl.version()))} if cuda else {})}
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    transport = transport_to_oneself(backend)
    for name, exchange in (("all-to-all", all_to_all_of(transport)), ("messages", messages_of(transport))):
        if not cuda and name == "messages":
            run.figures[name] = "gloo has no messages to oneself"
            continue
        with run.case(f"{name}, numbers"):
            check_numbers(exchange, blocks(run.device))
        if not cuda:
            continue
        with run.case(f"{name}, the host does not wait"):
            check_host(exchange, blocks(run.device))
        with run.case(f"{name}, beside a computation"):
            run.figures[f"{name}, seconds"] = beside_a_computation(exchange, run.device)
        with run.case(f"{name}, in a CUDA graph"):
            check_graph(exchange, blocks(run.device))
    dist.destroy_process_group()


def transport_to_oneself(backend: str) -> Direct:
    """The transport of a ring of one, over a backend of the world of one."""
    return Direct(GroupHandle("inner", (0,), 0, dist.group.WORLD, TIMEOUT), backend)


def messages_of(transport: Direct) -> Exchange:
    """As a ring of two posts k and v."""

    def exchange(sent: list[torch.Tensor], received: list[torch.Tensor]) -> Pending[None]:
        pairs = zip(sent, received, strict=True)
        return transport.post([m for x, y in pairs for m in (Message(True, 0, x, "x"), Message(False, 0, y, "y"))])

    return exchange


def all_to_all_of(transport: Direct) -> Exchange:
    """As a head group exchanges them."""

    def exchange(sent: list[torch.Tensor], received: list[torch.Tensor]) -> Pending[None]:
        pairs = zip(sent, received, strict=True)
        return _all([transport.all_to_all(y, x, [len(y)], [len(x)]) for x, y in pairs])

    return exchange


def _all(waits: list[Pending[None]]) -> Pending[None]:
    def wait() -> None:
        for one in waits:
            one()

    return wait


def blocks(device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two blocks to send and two to receive into, which hold NaN."""
    sent = [torch.randn(SIZE[device.type], device=device).bfloat16() for _ in range(2)]
    return sent, [torch.full_like(x, torch.nan) for x in sent]


def check_numbers(exchange: Exchange, pair: tuple[list[torch.Tensor], list[torch.Tensor]]) -> None:
    """What was sent has come once it was waited for, and writing to what was sent changes nothing any more."""
    sent, received = pair
    expected = [x.clone() for x in sent]
    exchange(sent, received)()
    for x in sent:
        x.zero_()
    for x, y in zip(expected, received, strict=True):
        assert torch.equal(x, y), "what came is not what was sent"


def check_host(exchange: Exchange, pair: tuple[list[torch.Tensor], list[torch.Tensor]]) -> None:
    """Posting and waiting return while the device is still busy with what is before them in its stream."""
    sent, received = pair
    exchange(sent, received)()  # connects
    for x, y in zip(sent, received, strict=True):
        x.fill_(1)
        y.fill_(torch.nan)
    with no_synchronisation():
        torch.cuda._sleep(BUSY_CYCLES)
        for x in sent:
            x.fill_(7)
        exchange(sent, received)()
        results = [x + 1 for x in received]
        done = torch.cuda.Event()
        done.record()
    assert not done.query(), "the host waited for the device"
    for x in results:
        assert (x == 8).all(), "the stream did not wait for the message, or the message not for the stream"


def beside_a_computation(exchange: Exchange, device: torch.device) -> dict[str, float]:
    """Seconds of the exchange alone, of a computation alone, and of both at the same time. The numbers of both must
    be right."""
    sent, received = blocks(device)
    factor = torch.eye(8192, device=device, dtype=torch.bfloat16)
    product = torch.randn_like(factor)
    wanted = product.clone()

    def compute() -> None:
        for _ in range(4):
            torch.mm(product.clone(), factor, out=product)

    def both() -> None:
        wait = exchange(sent, received)
        compute()
        wait()

    seconds = {}
    for name, call in (("exchange", lambda: exchange(sent, received)()), ("computation", compute), ("both", both)):
        call()
        start = clock(device)
        for _ in range(5):
            call()
        seconds[name] = (clock(device) - start) / 5
    for x, y in zip([*sent, wanted], [*received, product], strict=True):
        assert torch.equal(x, y), "wrong numbers beside a computation"
    return seconds


def check_graph(exchange: Exchange, pair: tuple[list[torch.Tensor], list[torch.Tensor]]) -> None:
    """A captured exchange, replayed with other numbers."""
    sent, received = pair
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        exchange(sent, received)()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        exchange(sent, received)()
        results = [x + 1 for x in received]
    for number in (3, 5):
        for x in sent:
            x.fill_(number)
        graph.replay()
        assert all((x == number + 1).all() for x in results), f"replayed with {number}, other numbers came"


if __name__ == "__main__":
    sys.exit(main(check))
