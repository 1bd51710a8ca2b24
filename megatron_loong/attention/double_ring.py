"""Double-Ring-Attention over the ring ranks: one loop forward, one backward (LoongTrain section 4.3).

A single ring, Ulysses (ring_size 1), a pack of documents, a sliding window, queries that travel instead of keys, and
LightSeq's helping ranks are the same loops with other schedules. Tensors are [s, b, h, d] views of whatever memory
they came in.
"""

from __future__ import annotations

import torch

from megatron_loong.attention.blocks import Block, Form, accumulator_dtype
from megatron_loong.attention.circulation import Circulation, Returns, own_block
from megatron_loong.attention.merge import add_sink_, merge_
from megatron_loong.attention.plan import RingPlan
from megatron_loong.kernels.folds import add_rows_
from megatron_loong.kernels.interface import TileRules
from megatron_loong.kernels.max_logit import raise_to_max_logits_
from megatron_loong.planner.packs import Pack
from megatron_loong.planner.schedule import RingSchedule
from megatron_loong.planner.tiles import Tile
from megatron_loong.planner.visits import OWN, Visit


def ring_forward(q: torch.Tensor, kv: Block, plan: RingPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the local q over every rank's kv.

    q [s, b, h, d]; kv is a block of k [s, b, g, d] and v [s, b, g, dv]. Returns out [s, b, h, dv] in q's dtype and lse
    [s, b, h] in float32 (float64); a row that no key is visible to has out 0 and lse -inf.
    """
    if plan.one_call:
        (schedule,) = plan.forward
        call = schedule.passage(plan.ring_rank, backward=False).tiles[OWN][0]
        k, v = kv.parts
        return alone(tile_forward(q, k, v, plan.rules_of(call, OWN, schedule, False, q.device), plan), q.dtype, plan)
    result = Result(q, plan.value_dim)
    legs = [_ForwardLeg(schedule, q, kv, result, plan) for schedule in plan.forward]
    for step in range(-1, plan.schedule.ring_size):
        for leg in legs:
            leg.circulation.begin(step)
        for leg in legs:
            leg.compute(step)
    return result.finish(plan.sink)


def ring_backward(
    dout: torch.Tensor, q: torch.Tensor, kv: Block, out: torch.Tensor, lse: torch.Tensor, plan: RingPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) from the global out and lse; shapes of q, k and v, summed and returned in float32 (float64).

    KV goes round again, or the queries do, with what their gradient needs: `RingPlan.backward` says. The gradient of
    what moves goes home on communicators of its own, in ring_size - 1 hops (`backward_visits`).
    """
    if plan.one_call:  # nothing to add up, and so nothing to widen
        (schedule,) = plan.backward
        call = schedule.passage(plan.ring_rank, backward=True).tiles[OWN][0]
        k, v = kv.parts
        return tile_backward((dout, q, out, lse), k, v, plan.rules_of(call, OWN, schedule, True, q.device), plan)
    wide = accumulator_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, *kv.parts))
    legs = [_BackwardLeg(schedule, (dout, q, out, lse), kv, (dq, dk, dv), plan) for schedule in plan.backward]
    for step in range(-1, plan.schedule.ring_size):
        for leg in legs:
            leg.circulation.begin(step)
        for leg in legs:
            leg.compute(step)
    return dq, dk, dv


class _Leg:
    """One passage of one schedule: what comes, when, and the calls of the kernel that it is for."""

    def __init__(self, schedule: RingSchedule, backward: bool, own: Block, plan: RingPlan) -> None:
        self._schedule, self._backward, self._plan = schedule, backward, plan
        self._work = schedule.passage(plan.ring_rank, backward)
        self._keys_move = schedule.moving == "kv"
        what = "KV block" if self._keys_move else "query block"
        self.circulation = Circulation(plan.rings, self._work, own, what)
        self._pack = plan.packs(batch=own.parts[0].shape[1])

    def _visit(self, step: int) -> Visit:
        return OWN if step < 0 else self._work.visits[step]

    def _calls(self, step: int) -> list[Tile | Pack]:
        visit = self._visit(step)
        tiles = self._work.opening if step < 0 else self._work.tiles.get(visit, ())
        # Rows that follow one another here must do so in their owner's block, where their gradient goes in one piece.
        return self._plan.calls(tiles, self._pack and len(self._work.rows.get(visit, ())) == 1)

    def _rules(self, call: Tile | Pack, visit: Visit, device: torch.device) -> TileRules:
        return self._plan.rules_of(call, visit, self._schedule, self._backward, device)


class _ForwardLeg(_Leg):
    """Forward: the results of one's own queries stay here, those of queries that have come go home."""

    def __init__(self, schedule: RingSchedule, q: torch.Tensor, kv: Block, result: Result, plan: RingPlan) -> None:
        super().__init__(schedule, False, kv if schedule.moving == "kv" else _own_block((q,), plan), plan)
        self._q, self._kv, self._result = q, kv, result
        if not self._keys_move:
            home = result.lse, result.out
            wire = Form.of((home[0].shape[1:], home[0].dtype), (home[1].shape[1:], plan.wire_dtype))
            what = "output of query block"
            self._returns = Returns(plan.rings, self._work, home, wire, _merge, (-torch.inf, 0.0), what)

    def compute(self, step: int) -> None:
        """Attend to the block of a step."""
        visit = self._visit(step)
        results = []
        for call in self._calls(step):
            block = self.circulation.block(visit).parts
            q, (k, v) = (self._q, block) if self._keys_move else (block[0], self._kv.parts)
            rules = self._rules(call, visit, q.device)
            part = tile_forward(q[call.q], k[call.kv], v[call.kv], rules, self._plan)
            if self._keys_move:
                self._result.take(call.q, part, first_keys=visit == OWN)
            else:
                results.append((call.q, part))
        if not self._keys_move and step >= 0:
            self._returns.collect(step)
            for rows, (out, lse) in results:
                self._returns.add(visit, rows, (lse.transpose(0, 1), out.transpose(0, 1)))
            self._returns.post(step)
        self.circulation.end(step)


def alone(
    part: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype, plan: RingPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [s, b, h, dv] in `dtype`, lse) of rows that got all they get from one call, `part`."""
    out, lse = part
    if plan.sink is not None:
        out, lse = out.to(lse.dtype), lse.clone()
        add_sink_(out, lse, plan.sink)
    return _bshd(out.to(dtype)), _bshd(lse)


class Result:
    """out and lse of the local queries, as far as they have come."""

    def __init__(self, q: torch.Tensor, value_dim: int) -> None:
        s, b, h = q.shape[:3]
        wide = accumulator_dtype(q.dtype)
        self.out = torch.zeros(b, s, h, value_dim, dtype=wide, device=q.device).transpose(0, 1)
        """[s, b, h, dv]."""
        self.lse = torch.full((b, s, h), -torch.inf, dtype=wide, device=q.device).transpose(0, 1)
        """[s, b, h]."""
        self._dtype = q.dtype
        self._last_rows: slice | None = None

    def take(self, rows: slice, part: tuple[torch.Tensor, torch.Tensor], first_keys: bool) -> None:
        """Fold in what some rows got from further keys; in the own block, tiles of other rows meet their first."""
        out, lse = (_bshd(x[rows]) for x in (self.out, self.lse))
        if first_keys and rows != self._last_rows:
            out.copy_(part[0])
            lse.copy_(part[1])
        else:
            merge_(out, lse, *part)
        self._last_rows = rows

    def finish(self, sink: torch.Tensor | None, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """out in q's dtype and lse of some rows, once everything has been taken that is for them."""
        out, lse = self.out[rows], self.lse[rows]
        if sink is not None:
            add_sink_(_bshd(out), _bshd(lse), sink)
        return out.to(self._dtype), lse


def _merge(total: tuple[torch.Tensor, ...], part: tuple[torch.Tensor, ...]) -> None:
    (lse, out), (part_lse, part_out) = (map(_bshd, pair) for pair in (total, part))
    merge_(out, lse, part_out, part_lse)


def _add(total: tuple[torch.Tensor, ...], part: tuple[torch.Tensor, ...]) -> None:
    add_rows_(tuple(zip(total, part, strict=True)))


Queries = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""dout, q, out [s, b, h, ...] and lse [s, b, h] of the same rows."""


class _BackwardLeg(_Leg):
    """Backward: the gradient of the side that stays is summed here, that of the moving side goes home."""

    def __init__(
        self, schedule: RingSchedule, queries: Queries, kv: Block, grads: tuple[torch.Tensor, ...], plan: RingPlan
    ) -> None:
        super().__init__(schedule, True, kv if schedule.moving == "kv" else _travelling(queries, plan), plan)
        self._queries, self._kv = queries, kv
        dq, dkv = grads[:1], grads[1:]
        home, self._here = (dkv, dq) if self._keys_move else (dq, dkv)
        wire = Form.like(*home).with_dtype(plan.wire_dtype)
        nothing = (0.0,) * len(home)
        what = "dKV of block" if self._keys_move else "dQ of block"
        self._returns = Returns(plan.rings, self._work, home, wire, _add, nothing, what)

    def compute(self, step: int) -> None:
        """Gradients from the block of a step; in step -1, from the first half of the own block."""
        visit = self._visit(step)
        grads = [(call, self._gradients(call, visit)) for call in self._calls(step)]
        if step >= 0:
            self._returns.collect(step)
        for call, (dq, dk, dv) in grads:
            rows, moved = (call.kv, (dk, dv)) if self._keys_move else (call.q, (dq,))
            self._returns.add(visit, rows, moved)
        if step >= 0:
            self._returns.post(step)
        for call, (dq, dk, dv) in grads:
            rows, stayed = (call.q, (dq,)) if self._keys_move else (call.kv, (dk, dv))
            _add(tuple(x[rows] for x in self._here), stayed)
        self.circulation.end(step)

    def _gradients(self, call: Tile | Pack, visit: Visit) -> tuple[torch.Tensor, ...]:
        """dq, dk, dv [s, b, heads, d] of one call."""
        rules = self._rules(call, visit, self._kv.flat.device)
        queries = tuple(x[call.q] for x in self._queries) if self._keys_move or visit == OWN else None
        keys = self.circulation.block(visit) if self._keys_move else self._kv
        if queries is None:
            lse, delta, q, dout = (x[call.q] for x in self.circulation.block(visit).parts)
            queries = dout, q, out_with_delta(dout, delta), lse
        k, v = (x[call.kv] for x in keys.parts)
        return tile_backward(queries, k, v, rules, self._plan)


def _own_block(tensors: tuple[torch.Tensor, ...], plan: RingPlan) -> Block:
    """A copy of tensors [s, ...] that goes round."""
    return own_block(plan.rings, Form.like(*tensors), tensors[0].shape[0], tensors[0].device).fill(tensors)


def _travelling(queries: Queries, plan: RingPlan) -> Block:
    """What of the queries travels backward: lse, delta [s, b, h], q and dout."""
    dout, q, out, lse = queries
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return _own_block((lse, delta, q, dout), plan)


def out_with_delta(dout: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """A stand-in for out [..., dv], which does not travel: parallel to dout, with delta [...] = (dout * out).sum(-1).

    Kernels ask for out only to form delta. That spares a third of the bytes of (q, out, dout).
    """
    unit = dout.to(delta.dtype, copy=True)  # widened first: a pass over two dtypes takes a CPU ten times as long
    largest = torch.maximum(unit.amax(-1, keepdim=True), unit.amin(-1, keepdim=True).neg_())
    largest.clamp_min_(torch.finfo(delta.dtype).tiny)
    unit.div_(largest)
    # The square sum of `unit` is at least 1, however small dout is; or all of it is 0, and so is delta.
    squares = torch.linalg.vector_norm(unit, 2, -1, keepdim=True).square_().clamp_min_(1)
    return unit.mul_(delta.unsqueeze(-1) / largest / squares).to(dout.dtype)


def tile_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: TileRules, plan: RingPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [b, s, h, dv] and lse [b, s, h] of rows [s, b, heads, d]."""
    q, k, v = _bshd(q), *plan.expansion.expand(_bshd(k), _bshd(v))
    if plan.max_logits is not None:
        raise_to_max_logits_(plan.max_logits, q, k, rules)
    return plan.kernel.forward(q, k, v, rules)


def tile_backward(
    queries: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor, rules: TileRules, plan: RingPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv [s, b, heads, d] of rows of the same layout."""
    dout, q, out, lse = map(_bshd, queries)
    k, v = _bshd(k), _bshd(v)
    dq, dk, dv = plan.kernel.backward(
        dout, q, *plan.expansion.expand(k, v), out, lse, rules, deterministic=plan.deterministic
    )
    dk, dv = plan.expansion.reduce(dk, dv, k, v)
    return _bshd(dq), _bshd(dk), _bshd(dv)


def _bshd(x: torch.Tensor) -> torch.Tensor:
    """Between [s, b, ...] and [b, s, ...], either way."""
    return x.transpose(0, 1)
