"""Double-Ring-Attention over the KV owners: one loop forward, one backward (LoongTrain section 4.3).

A single ring, Ulysses (ring_size 1), a pack of documents and a sliding window are the same loops with other
schedules. Tensors are [s, b, h, d] views of whatever memory they came in; a KV block is one flat buffer so that a hop
is one message.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_loong.attention.merge import add_sink_, merge_
from megatron_loong.attention.plan import RingPlan
from megatron_loong.comm.ring import Message, Wait
from megatron_loong.kernels.max_logit import raise_to_max_logits_
from megatron_loong.planner.rows import Rows, row_count, slice_within
from megatron_loong.planner.schedule import Hop
from megatron_loong.planner.tiles import Tile
from megatron_loong.planner.visits import OWN, Visit


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What out, dq, dk and dv are summed in: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class KVBlock:
    """k [s, b, g, d] and v [s, b, g, dv] (or their gradients) as two views of one flat buffer."""

    flat: torch.Tensor
    k_row: tuple[int, ...]
    """[b, g, d]."""
    v_row: tuple[int, ...]
    """[b, g, dv]."""

    @classmethod
    def empty(cls, rows: int, k_row: Iterable[int], v_row: Iterable[int], like: torch.Tensor) -> KVBlock:
        """An uninitialised block on the device and in the dtype of `like`."""
        k_row, v_row = torch.Size(k_row), torch.Size(v_row)
        flat = torch.empty(rows * (k_row.numel() + v_row.numel()), dtype=like.dtype, device=like.device)
        return cls(flat, k_row, v_row)

    def with_data(self, flat: torch.Tensor) -> KVBlock:
        """Rows of the same shape in another buffer."""
        return KVBlock(flat, self.k_row, self.v_row)

    def buffer(self, rows: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An uninitialised buffer for so many rows."""
        return torch.empty(rows * self._width, dtype=dtype or self.flat.dtype, device=self.flat.device)

    def chosen(self, held: Rows, wanted: Rows) -> torch.Tensor:
        """The buffer of the rows `wanted` out of this block, which holds `held`; a copy unless it wants all."""
        if wanted == held:
            return self.flat
        places = [slice_within(held, run) for run in wanted]
        return torch.cat([x[place].reshape(-1) for x in (self.k, self.v) for place in places])

    @property
    def _width(self) -> int:
        return torch.Size(self.k_row).numel() + torch.Size(self.v_row).numel()

    @property
    def rows(self) -> int:
        """Number of rows s."""
        return self.flat.numel() // self._width

    @property
    def k(self) -> torch.Tensor:
        """[s, b, g, d]."""
        return self.flat[: self.rows * torch.Size(self.k_row).numel()].view(self.rows, *self.k_row)

    @property
    def v(self) -> torch.Tensor:
        """[s, b, g, dv]."""
        return self.flat[self.rows * torch.Size(self.k_row).numel() :].view(self.rows, *self.v_row)


class Traffic:
    """Messages under way on a pair of rings: posted together by step, waited for when they are due."""

    def __init__(self, plan: RingPlan, suffix: str, what: str) -> None:
        self._plan, self._suffix, self._what = plan, suffix, what
        self._sent: defaultdict[int, list[tuple[Wait, torch.Tensor]]] = defaultdict(list)

    def post(self, hops: list[tuple[Hop, torch.Tensor]]) -> list[tuple[Hop, torch.Tensor, Wait]]:
        """Begin the hops of one step; returns those that receive, each with its wait."""
        arriving = []
        for ring in ("inner", "outer"):
            ends = [(hop, block) for hop, block in hops if hop.ring == ring]
            if not ends:
                continue
            messages = [Message(hop.send, hop.peer, block, f"{self._what} {tuple(hop.visit)}") for hop, block in ends]
            waits = self._plan.rings[ring + self._suffix].post(messages)
            for (hop, block), wait in zip(ends, waits, strict=True):
                if hop.send:
                    self._sent[hop.due].append((wait, block))
                else:
                    arriving.append((hop, block, wait))
        return arriving

    def finish_sends(self, step: int) -> None:
        """Wait for what was sent and is wanted by now at the other end, and let go of its memory."""
        for wait, _ in self._sent.pop(step, ()):
            wait()


class Circulation:
    """Brings the KV blocks of a passage, each hop posted before the tiles that hide it.

    Outer hops are posted as soon as the block they carry is here, that is, a whole inner round ahead. Besides the
    rank's own block it holds, on each of the two rings, the block that travels and the one that arrives.
    """

    def __init__(self, plan: RingPlan, own: KVBlock, backward: bool) -> None:
        self._work = plan.passage(backward)
        self._own = own
        self._blocks: dict[Visit, torch.Tensor] = {OWN: own.flat}
        self._arriving: dict[Visit, tuple[torch.Tensor, Wait]] = {}
        self._traffic = Traffic(plan, "", "KV block")

    def begin(self, step: int) -> None:
        """Post what belongs to a step (-1: before the first)."""
        if step >= 0 and self._work.visits[step] in self._arriving:
            self.block(self._work.visits[step])
        hops = [(hop, self._buffer(hop)) for hop in self._work.hops.get(step, ())]
        self._traffic.finish_sends(step)
        for hop, buffer, wait in self._traffic.post(hops):
            self._arriving[hop.visit] = buffer, wait

    def block(self, visit: Visit) -> KVBlock:
        """The block of a visit, here."""
        if visit in self._arriving:
            self._blocks[visit], wait = self._arriving.pop(visit)
            wait()
        return self._own.with_data(self._blocks[visit])

    def end(self, step: int) -> None:
        """Drop the blocks that are not used after `step`."""
        for visit in [x for x in self._blocks if self._work.last_use[x] <= step]:
            del self._blocks[visit]

    def _buffer(self, hop: Hop) -> torch.Tensor:
        if hop.send:
            return self.block(hop.visit).chosen(self._work.kv_rows[hop.visit], hop.rows)
        return self._own.buffer(row_count(hop.rows))


def ring_forward(q: torch.Tensor, kv: KVBlock, plan: RingPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the local q over every rank's kv.

    q [s, b, h, d]. Returns out [s, b, h, dv] in q's dtype and lse [s, b, h] in float32 (float64); a row that no key
    is visible to has out 0 and lse -inf.
    """
    work, circulation = plan.passage(backward=False), Circulation(plan, kv, backward=False)
    wide = accumulator_dtype(q.dtype)
    result: tuple[torch.Tensor, torch.Tensor] | None = None
    circulation.begin(-1)
    for step, visit in enumerate(work.visits):
        circulation.begin(step)
        rows = None
        for tile in work.tiles.get(visit, ()):
            for call in plan.calls(tile):
                block_out, block_lse = _tile_forward(q, circulation.block(visit), call, visit, plan)
                if result is None and call.q == slice(0, q.shape[0]):
                    result = (block_out, block_lse) if plan.one_call else (block_out.to(wide), block_lse.clone())
                    rows = call.q
                    continue
                out, lse = result = result or _nothing_seen(q, plan.value_dim, wide)
                # Rows that meet their first keys need no merging: the own block comes first, in tiles of other rows.
                if visit == OWN and call.q != rows:
                    out[:, call.q], lse[:, call.q] = block_out, block_lse
                else:
                    merge_(out[:, call.q], lse[:, call.q], block_out, block_lse)
                rows = call.q
        circulation.end(step)
    out, lse = result or _nothing_seen(q, plan.value_dim, wide)
    if plan.sink is not None:
        out, lse = out.to(wide), lse.clone()
        add_sink_(out, lse, plan.sink)
    return out.to(q.dtype).transpose(0, 1), lse.transpose(0, 1)


def _tile_forward(
    q: torch.Tensor, block: KVBlock, tile: Tile, visit: Visit, plan: RingPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    rules = plan.rules_of(tile, visit, plan.passage(backward=False), q.device)
    k, v = plan.expansion.expand(_bshd(block.k[tile.kv]), _bshd(block.v[tile.kv]))
    if plan.max_logits is not None:
        raise_to_max_logits_(plan.max_logits, _bshd(q[tile.q]), k, rules)
    return plan.kernel.forward(_bshd(q[tile.q]), k, v, rules)


def _nothing_seen(q: torch.Tensor, value_dim: int, wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    s, b, h = q.shape[:3]
    out = torch.zeros(b, s, h, value_dim, dtype=wide, device=q.device)
    return out, torch.full((b, s, h), -torch.inf, dtype=wide, device=q.device)


def ring_backward(
    dout: torch.Tensor, q: torch.Tensor, kv: KVBlock, out: torch.Tensor, lse: torch.Tensor, plan: RingPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) from the global out and lse; shapes of q, kv.k and kv.v, summed and returned in float32 (float64).

    KV goes round again. The gradient of a block travels with the visits, on communicators of its own, and is at
    home after ring_size - 1 hops (`backward_visits`).
    """
    work, circulation = plan.passage(backward=True), Circulation(plan, kv, backward=True)
    if plan.one_call:  # nothing to add up, and so nothing to widen
        dq, dk, dv = _tile_backward(dout, q, kv, out, lse, work.tiles[OWN][0], OWN, plan)
        return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)
    wide = accumulator_dtype(q.dtype)
    traffic = Traffic(plan, "_dkv", "dKV of block")
    arriving: defaultdict[Visit, list[tuple[Rows, torch.Tensor, Wait]]] = defaultdict(list)
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    dkv = None
    circulation.begin(-1)
    for step, visit in enumerate(work.visits):
        circulation.begin(step)
        traffic.finish_sends(step)
        grads = []
        if visit in work.kv_rows:
            block = circulation.block(visit) if work.tiles[visit] else kv
            for tile, place in zip(work.tiles[visit], work.gradient_tiles(visit), strict=True):
                for call in plan.calls(tile):
                    shift = place.start - tile.kv.start
                    keys = slice(call.kv.start + shift, call.kv.stop + shift)
                    grads.append((call, keys, _tile_backward(dout, q, block, out, lse, call, visit, plan)))
            del block
            dkv = _gathered(kv, work.gradient_rows[visit], arriving.pop(visit, []), wide)
            for _, keys, (_, dk, dv) in grads:
                dkv.k[keys].add_(dk.transpose(0, 1))
                dkv.v[keys].add_(dv.transpose(0, 1))
        circulation.end(step)
        hops = [
            (hop, dkv.flat if hop.send and dkv is not None else kv.buffer(row_count(hop.rows), wide))
            for hop in work.gradient_hops.get(step, ())
        ]
        for hop, buffer, wait in traffic.post(hops):
            arriving[hop.visit].append((hop.rows, buffer, wait))
        for call, _, (tile_dq, _, _) in grads:
            dq[call.q].add_(tile_dq.transpose(0, 1))
    assert dkv is not None, "the rank's own block comes last"
    return dq, dkv.k, dkv.v


def _gathered(kv: KVBlock, rows: Rows, arriving: list[tuple[Rows, torch.Tensor, Wait]], dtype: torch.dtype) -> KVBlock:
    """The gradient of `rows` as far as it has come: what the neighbours gathered, waited for and added up."""
    total: KVBlock | None = None
    for arrived_rows, flat, wait in sorted(arriving, key=lambda x: x[0] != rows):
        wait()
        if total is None and arrived_rows == rows:
            total = kv.with_data(flat)
            continue
        total = total or kv.with_data(kv.buffer(row_count(rows), dtype).zero_())
        part, start = kv.with_data(flat), 0
        for run in arrived_rows:
            place, mine = slice_within(rows, run), slice(start, start := start + run[1] - run[0])
            total.k[place] += part.k[mine]
            total.v[place] += part.v[mine]
    return total or kv.with_data(kv.buffer(row_count(rows), dtype).zero_())


def _tile_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    block: KVBlock,
    out: torch.Tensor,
    lse: torch.Tensor,
    tile: Tile,
    visit: Visit,
    plan: RingPlan,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    block_k, block_v = _bshd(block.k[tile.kv]), _bshd(block.v[tile.kv])
    dq, dk, dv = plan.kernel.backward(
        _bshd(dout[tile.q]),
        _bshd(q[tile.q]),
        *plan.expansion.expand(block_k, block_v),
        _bshd(out[tile.q]),
        _bshd(lse[tile.q]),
        plan.rules_of(tile, visit, plan.passage(backward=True), q.device),
        deterministic=plan.deterministic,
    )
    return dq, *plan.expansion.reduce(dk, dv, block_k, block_v)


def _bshd(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1)
