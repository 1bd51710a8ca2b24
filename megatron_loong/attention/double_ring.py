"""Double-Ring-Attention over the ring ranks: one loop forward, one backward (LoongTrain section 4.3).

A single ring, Ulysses (ring_size 1), a pack of documents, a sliding window, queries that travel instead of keys, and
LightSeq's helping ranks are the same loops with other schedules. Tensors are [s, b, h, d] views of whatever memory
they came in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_loong.attention.block_store import BlockStore, Fold, Part, Returns, own_block
from megatron_loong.attention.blocks import Block, Form, accumulator_dtype
from megatron_loong.attention.merge import add_sink_, merge_
from megatron_loong.attention.plan import RingPlan
from megatron_loong.kernels.folds import add_rows_
from megatron_loong.kernels.interface import TileRules
from megatron_loong.kernels.max_logit import raise_to_max_logits_
from megatron_loong.schedule.packs import Pack
from megatron_loong.schedule.rotation import Moving
from megatron_loong.schedule.steps import Step
from megatron_loong.schedule.tiles import Tile


def ring_forward(q: torch.Tensor, kv: Block, plan: RingPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the local q over every rank's kv.

    q [s, b, h, d]; kv is a block of k [s, b, g, d] and v [s, b, g, dv]. Returns out [s, b, h, dv] in q's dtype and lse
    [s, b, h] in float32 (float64); a row that no key is visible to has out 0 and lse -inf.
    """
    if plan.one_call:
        k, v = kv.parts
        (tile,) = plan.forward[0].tiles
        return alone(tile_forward(q, k, v, plan.rules_of(tile, plan.forward[0], q.device), plan), q.dtype, plan)
    result = Result(q, plan.value_dim)
    own: dict[Moving, Block] = {"kv": kv}
    if "q" in plan.moving(plan.forward):
        own["q"] = _packed(plan, q)
    blocks = BlockStore(plan.rings, plan.forward, own, plan.ring_rank)
    returns = _returns(plan, plan.forward, {"q": (result.lse, result.out)}, _merge, (-torch.inf, 0.0))
    for index, step in enumerate(plan.forward):
        blocks.post(index, step)  # hops that the tiles of this step hide
        tiles = plan.calls_of(step, batch=q.shape[1])
        if step.moving == "kv":
            for tile in tiles:
                part = _attend(tile, step, q, kv, blocks, plan)
                result.take(tile.q, part, first_keys=step.owner == plan.ring_rank)
                del part  # before the next blocks take memory
        else:  # the output of queries that are only visiting returns to their rank
            visiting = [(tile.q, _lse_first(_attend(tile, step, q, kv, blocks, plan))) for tile in tiles]
            returns["q"].exchange(index, step, visiting)
            visiting.clear()
        blocks.drop(step)
    return result.finish(plan.sink)


def ring_backward(
    dout: torch.Tensor, q: torch.Tensor, kv: Block, out: torch.Tensor, lse: torch.Tensor, plan: RingPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) from the global out and lse; shapes of q, k and v, summed and returned in float32 (float64).

    KV goes round again, or the queries do, with what their gradient needs. The gradient of what moves returns on
    communicators of its own, in ring_size - 1 hops (`schedule.routes.own_last_order`).
    """
    queries = dout, q, out, lse
    if plan.one_call:  # nothing to add up, and so nothing to widen
        k, v = kv.parts
        (tile,) = plan.backward[0].tiles
        return tile_backward(queries, k, v, plan.rules_of(tile, plan.backward[0], q.device), plan)
    wide = accumulator_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, *kv.parts))
    own: dict[Moving, Block] = {"kv": kv}
    if "q" in plan.moving(plan.backward):
        own["q"] = _travelling(queries, plan)
    blocks = BlockStore(plan.rings, plan.backward, own, plan.ring_rank)
    returns = _returns(plan, plan.backward, {"kv": (dk, dv), "q": (dq,)}, _add, (0.0, 0.0))
    for index, step in enumerate(plan.backward):
        blocks.post(index, step)  # hops that the tiles of this step hide
        tiles = plan.calls_of(step, batch=q.shape[1])
        grads = [_gradients(tile, step, queries, kv, blocks, plan) for tile in tiles]
        # Of queries or of keys and values: one part returns to the owner of the block, the other is summed here.
        returned, kept = (1, 0) if step.moving == "kv" else (0, 1)
        returns[step.moving].exchange(index, step, [pair[returned] for pair in grads])
        _add_rows((dq,) if kept == 0 else (dk, dv), [pair[kept] for pair in grads])
        grads.clear()  # before the next blocks take memory
        blocks.drop(step)
    return dq, dk, dv


Queries = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""dout, q, out [s, b, h, ...] and lse [s, b, h] of the same rows."""


def _attend(
    tile: Tile | Pack, step: Step, q: torch.Tensor, kv: Block, blocks: BlockStore, plan: RingPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [b, s, h, dv] and lse [b, s, h] of one tile; waits for the step's block."""
    block = blocks[step].parts
    q, (k, v) = (q, block) if step.moving == "kv" else (block[0], kv.parts)
    return tile_forward(q[tile.q], k[tile.kv], v[tile.kv], plan.rules_of(tile, step, q.device), plan)


def _lse_first(part: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(lse, out) of a tile, sequence first: as results for queries travel."""
    out, lse = part
    return _bshd(lse), _bshd(out)


def _gradients(
    tile: Tile | Pack, step: Step, queries: Queries, kv: Block, blocks: BlockStore, plan: RingPlan
) -> tuple[Part, Part]:
    """Rows of one tile with dq, and rows with dk and dv, all [s, b, heads, d]; waits for the step's block."""
    rules = plan.rules_of(tile, step, queries[0].device)
    if step.moving == "kv":
        kv = blocks[step]
    k, v = (x[tile.kv] for x in kv.parts)
    if step.moving == "kv" or step.owner == plan.ring_rank:
        dout, q, out, lse = (x[tile.q] for x in queries)
    else:
        lse, delta, q, dout = (x[tile.q] for x in blocks[step].parts)
        out = out_with_delta(dout, delta)
    dq, dk, dv = tile_backward((dout, q, out, lse), k, v, rules, plan)
    return (tile.q, (dq,)), (tile.kv, (dk, dv))


def _returns(
    plan: RingPlan,
    steps: Sequence[Step],
    home: Mapping[Moving, tuple[torch.Tensor, ...]],
    fold: Fold,
    zero: tuple[float, ...],
) -> dict[Moving, Returns]:
    """For each kind of block that has results to return: where they are summed, and how they travel."""
    found = {}
    for moving in plan.moving(steps):
        if moving in home:
            sums = home[moving]
            # lse stays as it is: only sums and outputs are rounded to travel.
            dtypes = [plan.wire_dtype if x.dim() == 4 else x.dtype for x in sums]
            wire = Form.of(*((x.shape[1:], dtype) for x, dtype in zip(sums, dtypes, strict=True)))
            kind = [step for step in steps if step.moving == moving]
            found[moving] = Returns(plan.rings, kind, sums, wire, fold, zero[: len(sums)], plan.ring_rank)
    return found


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
        """Fold in what some rows got from further keys.

        first_keys: in the step of the own block, which comes before all others here, the first tile of some rows
        overwrites the zeros.
        """
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


def _add_rows(total: tuple[torch.Tensor, ...], parts: list[Part]) -> None:
    for rows, tensors in parts:
        _add(tuple(x[rows] for x in total), tensors)


def _packed(plan: RingPlan, *tensors: torch.Tensor) -> Block:
    """A copy of tensors [s, ...] that goes round."""
    return own_block(plan.rings, Form.like(*tensors), tensors[0].shape[0], tensors[0].device).fill(tensors)


def _travelling(queries: Queries, plan: RingPlan) -> Block:
    """What of the queries travels backward: lse, delta [s, b, h], q and dout."""
    dout, q, out, lse = queries
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return _packed(plan, lse, delta, q, dout)


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
