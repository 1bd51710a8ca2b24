"""The comparison on eight ranks: bytes agree with our own count, and a wrong result never gets a time."""

from __future__ import annotations

import torch

from benchmarks.compare import Entry, compare
from benchmarks.observe import Observer
from benchmarks.report import make_record
from benchmarks.rivals.interface import Contestant, GroupCache, Shape, contiguous_positions
from benchmarks.rivals.ours import ComputeAlone, Loong
from benchmarks.rivals.torch_cp import TorchContextParallel
from benchmarks.timeline import Event, record_timeline, shares
from megatron_loong.comm.ledger import count_bytes
from megatron_loong.config import LoongConfig
from tests.multi_rank.pool import WORLD_SIZE, WorkerPool

SHAPE = Shape(128, 8, 8, 16, torch.bfloat16)


class Local(Contestant):
    """Wrong: every rank attends to its own tokens only."""

    def set_up(self, groups: GroupCache, shape: Shape) -> None:
        """Nothing to make."""

    def positions(self, rank: int, seq_len: int) -> torch.Tensor:
        """Contiguous."""
        return contiguous_positions(rank, self.world_size, seq_len)

    def apply(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Causal within the rank."""
        bhsd = [x.transpose(1, 2) for x in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*bhsd, is_causal=True).transpose(1, 2)


class Raising(Local):
    """Raises instead of attending."""

    def apply(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Always."""
        raise ValueError("no such kernel\nsecond line")


def compare_some(rank: int) -> list[Entry]:
    """One of each kind of contestant, for two rounds."""
    contestants = [
        ComputeAlone(WORLD_SIZE),
        Loong(LoongConfig(WORLD_SIZE, 2, 2)),
        TorchContextParallel(WORLD_SIZE, "all-to-all"),
        Local("local", "x", WORLD_SIZE),
        Raising("raising", "x", WORLD_SIZE),
    ]
    return compare(contestants, SHAPE, rounds=2, warmups=0)


def both_counts(rank: int, config: LoongConfig) -> tuple[int, int]:
    """(bytes by our ledger, bytes by the observer) of one forward and backward on this rank."""
    ours, groups = Loong(config), GroupCache(WORLD_SIZE)
    ours.set_up(groups, SHAPE)
    q, k, v = (ours.dispatch(x, rank).requires_grad_() for x in SHAPE.inputs()[:3])
    ours.apply(q, k, v)  # in the first call of a kind the ranks compare their arguments as well
    with count_bytes() as ledger, Observer() as seen:
        ours.apply(q, k, v).sum().backward()
    groups.close()
    return ledger.total_bytes, sum(seen.sent_bytes.values())


def one_timeline(rank: int, config: LoongConfig) -> list[Event]:
    """Events of one forward and backward."""
    ours, groups = Loong(config), GroupCache(WORLD_SIZE)
    ours.set_up(groups, SHAPE)
    q, k, v = (ours.dispatch(x, rank).requires_grad_() for x in SHAPE.inputs()[:3])
    with record_timeline() as events:
        ours.apply(q, k, v).sum().backward()
    groups.close()
    return events


def test_a_timeline_has_every_tile_hop_and_wait(pool: WorkerPool) -> None:
    """Head parallel 2, ring 4 of two inner rings: 4 blocks, and per direction 2 inner hops and 1 outer hop."""
    for events in pool.run(one_timeline, LoongConfig(WORLD_SIZE, 2, 2)):
        labels = {kind: [event.label for event in events if event.kind == kind] for kind in ("tile", "under way")}
        assert (labels["tile"].count("forward"), labels["tile"].count("backward")) == (4, 4)
        # A hop is a send and a receive; KV goes round forward and backward, dKV backward.
        hops = {name: labels["under way"].count(f"loong_{name}") // 2 for name in ("inner", "outer")}
        gradients = {name: labels["under way"].count(f"loong_{name}_dkv") // 2 for name in ("inner", "outer")}
        assert (hops, gradients) == ({"inner": 4, "outer": 2}, {"inner": 2, "outer": 1})
        start, end = min(event.start_s for event in events), max(event.end_s for event in events)
        assert all(part > 0 for part in shares(events, start, end).values())


def test_the_observer_sees_the_bytes_that_the_ledger_counts(pool: WorkerPool) -> None:
    for by_ledger, by_observer in pool.run(both_counts, LoongConfig(WORLD_SIZE, 2, 2)):
        assert by_ledger == by_observer > 0


def test_only_exact_contestants_are_timed(pool: WorkerPool) -> None:
    alone, ours, ring, local, raising = pool.run(compare_some)[0]
    for entry in (alone, ours, ring):
        assert entry.refused is None and len(entry.rounds) == 2 and len(entry.rounds[0]) == WORLD_SIZE
    assert 0 < ours.error_multiple <= 2.5
    # Every rank has the same share of the operations, up to what the diagonal adds.
    assert max(one.flops for one in ours.counts) <= 1.2 * min(one.flops for one in ours.counts)
    assert "wrong result" in str(local.refused) and local.rounds == []
    assert raising.refused == "ValueError: no such kernel"
    record = make_record([alone, ours, ring, local, raising], [], SHAPE, None, {})
    assert {row["name"] for row in record["results"]} == {alone.name, ours.name, ring.name}
    assert [one["name"] for one in record["left_out"]] == ["local", "raising"]
