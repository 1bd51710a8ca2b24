"""A discrete-event simulation of one attention layer: who computes, who waits, which link carries what.

Each rank runs the program of `programs.py` on a compute stream; hops run on streams of their own (`inner`, `outer`,
`inner_dkv`, `outer_dkv`), and so does the all-to-all (`head`). A hop starts when both ends have posted it and its
link is free; a `wait` holds the compute stream up until it has arrived. Where processors move the bytes, a message
costs both ends computing, too.

With a balanced layout all nodes of a group behave alike, so only the ranks of one node are simulated, and what comes
from another node comes when the rank at the same place of this node would have sent it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from megatron_loong.config import LoongConfig
from megatron_loong.layout.ranks import coordinates_of, ring_rank_of
from megatron_loong.planner.links import Link, Links, Site, next_on
from megatron_loong.planner.methods import OURS, Method
from megatron_loong.planner.programs import Op
from megatron_loong.planner.tile_costs import TileCosts
from megatron_loong.planner.traffic import AttentionShape, exchange_bytes


class Span(NamedTuple):
    """Something that a stream of a rank was busy with."""

    rank: int
    stream: str
    what: str
    start_s: float
    end_s: float


@dataclass
class PassTime:
    """One forward or one backward of the attention of one layer, all-to-all included."""

    seconds: float
    """Until the last rank is done."""
    compute_s: float
    """Attention kernels, merges and copies of the busiest rank."""
    sent_bytes: dict[str, int] = field(default_factory=dict)
    """By communicator, of one rank."""
    link_bytes: dict[Link, int] = field(default_factory=dict)
    """By link of one node."""
    spans: list[Span] = field(default_factory=list)

    @property
    def exposed_s(self) -> float:
        """Time in which the busiest rank does not compute."""
        return max(0.0, self.seconds - self.compute_s)


def simulate_pass(
    config: LoongConfig,
    shape: AttentionShape,
    site: Site,
    *,
    backward: bool,
    method: Method = OURS,
    trace: bool = False,
) -> PassTime:
    """Simulate one pass. `trace` keeps the spans of every stream of every simulated rank.

    `site.cp_ranks_in_node` ranks of the group share a node; `ValueError` when they do not divide the group.
    """
    if config.context_parallel_size % site.cp_ranks_in_node:
        raise ValueError(
            f"the {config.context_parallel_size} ranks of a context-parallel group do not fill nodes of "
            f"{site.cp_ranks_in_node} of its ranks evenly"
        )
    return _Run(config, shape, site, backward, method, trace).run()


class _Run:
    """Ranks are numbered from 0 here: rank i is the group's `first` + i."""

    def __init__(
        self, config: LoongConfig, shape: AttentionShape, site: Site, backward: bool, method: Method, trace: bool
    ) -> None:
        self.config, self.site, self.backward, self.method, self.trace = config, site, backward, method, trace
        self.parts = method.parts(config, shape, site)
        self.shape = replace(shape, heads=shape.heads // self.parts, kv_heads=shape.kv_heads // self.parts)
        """Of one part."""
        self.costs = TileCosts(config, self.shape, site.hardware, backward, method)
        cp, per_node = config.context_parallel_size, site.cp_ranks_in_node
        # The last node: its ranks have the most tiles of the kind whose merge is the larger.
        self.first = cp - per_node if self.costs.tokens.balanced else 0
        self.size = cp - self.first
        self.ranks = range(self.size)
        self.links = Links(site, every_node=self.size > per_node)
        self.now = [0.0] * self.size
        self.busy = [0.0] * self.size
        self.ring_rank = [ring_rank_of(config, coordinates_of(config, self.first + i)) for i in self.ranks]
        self.posted: dict[Op, list[float]] = {}
        self.sent_bytes: dict[str, int] = {}
        self.spans: list[Span] = []

    def run(self) -> PassTime:
        """All parts, and what the rank that takes longest takes."""
        qkv, out = exchange_bytes(self.config, self.shape)
        before, after = (out, qkv) if self.backward else (qkv, out)
        for arrival in self._parts_of_heads(before, after):
            self._end_exchange(after, arrival)
        seconds, compute_s = max(self.now), max(self.busy)
        return PassTime(seconds, compute_s, self.sent_bytes, self.links.sent_bytes, self.spans)

    def _parts_of_heads(self, before: int, after: int) -> list[list[float]]:
        """One after another: the all-to-all of the next, and that back of the last, under each."""
        outward = []
        arrival = self._begin_exchange(before)
        for part in range(self.parts):
            self._end_exchange(before, arrival)
            if part + 1 < self.parts:
                arrival = self._begin_exchange(before)
            self._ring()
            outward.append(self._begin_exchange(after))
        return outward

    def _ring(self) -> None:
        outer, inner = self.config.outer_ring_size, self.config.ring_size // self.config.outer_ring_size
        forward, backward = self.method.forward_program, self.method.backward_program
        short, direct = self.costs.short, self.method.direct_returns(self.shape)
        program = backward(outer, inner, short, direct) if self.backward else forward(outer, inner)
        self._sums()
        tile = dict.fromkeys(("tile", "opening", "rest"), self._tile)
        steps = {**tile, "fold": self._fold, "post": self._post, "wait": self._wait}
        for op in program:
            steps[op.kind](op)

    # ---- operations ----

    def _tile(self, op: Op) -> None:
        w = self.config.inner_ring_size or 1
        for rank in self.ranks:
            ring_rank = self.ring_rank[rank]
            owner = op.place.owner(ring_rank, self.config.ring_size, w)
            kernel_s, merge_s = self.costs.of(ring_rank, owner, op.kind)
            self._compute(rank, kernel_s, "tile", op)
            self._compute(rank, merge_s, "merge", op)

    def _fold(self, op: Op) -> None:
        for rank in self.ranks:
            self._compute(rank, self.costs.fold_s, "add dKV", op)

    def _sums(self) -> None:
        for rank in self.ranks:
            self._compute(rank, self.costs.sums_s, "sums")

    def _compute(self, rank: int, seconds: float, what: str, op: Op | None = None) -> None:
        start = self.now[rank]
        self.now[rank] = start + seconds
        self.busy[rank] += seconds
        if self.trace and seconds:
            label = f"{what} {tuple(op.place)}" if op else what
            self.spans.append(Span(self.first + rank, "compute", label, start, start + seconds))

    def _post(self, op: Op) -> None:
        if op.ring.endswith("dkv"):
            for rank in self.ranks:
                self._compute(rank, self.costs.return_s, "round", op)
        self.posted[op] = self.now.copy()
        message = self._message_bytes(op)
        self.sent_bytes[op.ring] = self.sent_bytes.get(op.ring, 0) + message
        for rank, sender in enumerate(self._senders(op)):
            self._compute(rank, self.links.busy_s(sender, self.first + rank, message), "move bytes", op)

    def _senders(self, op: Op) -> list[int]:
        """From whom each simulated rank receives a hop."""
        axis = op.ring.removesuffix("_dkv")
        return [next_on(self.config, self.first + i, axis, -op.shift) for i in self.ranks]

    def _message_bytes(self, op: Op) -> int:
        there, home = self.method.token_bytes(self.config, self.shape, self.backward)
        return self.costs.block_tokens * (home if op.ring.endswith("dkv") else there)

    def _wait(self, op: Op) -> None:
        """Messages are put on their links in the order in which both ends were ready; each rank waits for its own."""
        posted, senders = self.posted.pop(op._replace(kind="post")), self._senders(op)
        gradient = op.ring.endswith("dkv")
        message = self._message_bytes(op)
        ready = [max(posted[i], posted[self._stand_in(senders[i])]) for i in self.ranks]
        for rank in sorted(self.ranks, key=ready.__getitem__):
            start, arrival = self.links.send(ready[rank], senders[rank], self.first + rank, message)
            self.now[rank] = max(self.now[rank], arrival)
            if self.trace:
                what = f"{'dKV of' if gradient else 'KV'} {tuple(op.place)}"
                sender = self.first + self._stand_in(senders[rank])
                self.spans.append(Span(sender, op.ring, what, start, arrival))

    def _stand_in(self, cp_rank: int) -> int:
        """The simulated rank that behaves as `cp_rank` does: itself, or the one at its place of the simulated node."""
        return cp_rank - self.first if cp_rank >= self.first else cp_rank % self.size

    # ---- the all-to-all ----

    def _begin_exchange(self, rank_bytes: int) -> list[float]:
        """Copy into one buffer and begin to exchange with every member of the head group: when each rank has all."""
        hp = self.config.head_parallel_size
        if hp == 1:
            return self.now
        copy_s = self.costs.copy_s(rank_bytes)
        for rank in self.ranks:
            self._compute(rank, copy_s, "pack")
        self.sent_bytes["head"] = self.sent_bytes.get("head", 0) + rank_bytes
        peers = [[next_on(self.config, self.first + i, "head", step) for step in range(1, hp)] for i in self.ranks]
        members = [[i, *(self._stand_in(peer) for peer in peers[i])] for i in self.ranks]
        start = [max(self.now[j] for j in members[i]) for i in self.ranks]
        share = rank_bytes // (hp - 1)
        for rank in sorted(self.ranks, key=start.__getitem__):
            for peer in peers[rank]:
                self.links.send(start[rank], self.first + rank, peer, share)
                self._compute(rank, self.links.busy_s(peer, self.first + rank, share), "move bytes")
        # Messages of one exchange share a link evenly, so that all of them are through when the last one is.
        end = [max(self.links.idle_at(self.first + i, peer) for peer in peers[i]) for i in self.ranks]
        if self.trace:
            self.spans += [Span(self.first + i, "head", "all-to-all", start[i], end[i]) for i in self.ranks]
        # What arrives was sent by peers, which finish when the rank at their place does.
        return [max(end[j] for j in members[i]) for i in self.ranks]

    def _end_exchange(self, rank_bytes: int, arrival: list[float]) -> None:
        """Wait, and copy out."""
        if self.config.head_parallel_size == 1:
            return
        self.now = [max(pair) for pair in zip(self.now, arrival, strict=True)]
        for rank in self.ranks:
            self._compute(rank, self.costs.copy_s(rank_bytes), "unpack")
