"""Double-Ring-Attention over the ring ranks: one loop forward, one backward (LoongTrain section 4.3).

A single ring, Ulysses (ring_size 1), a pack of documents, a sliding window, queries that travel instead of keys, and
LightSeq's helping ranks are the same loops with other schedules. Tensors are [s, b, h, d] views of whatever memory
they came in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_loong.attention.block_store import Block, BlockStore, Form, Returns
from megatron_loong.attention.merge import OnlineSoftmax, Part, PartialSum, rows_of
from megatron_loong.attention.plan import RingPlan
from megatron_loong.kernels.interface import TileRules
from megatron_loong.kernels.max_logit import raise_to_max_logits_
from megatron_loong.kernels.row_ops import Tensors
from megatron_loong.schedule.packs import Pack
from megatron_loong.schedule.rotation import Moving
from megatron_loong.schedule.steps import Step
from megatron_loong.schedule.tiles import Tile


def ring_forward(q: torch.Tensor, kv: Block, plan: RingPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the local q over every rank's kv.

    q [s, b, h, d]; kv is a block of k [s, b, g, d] and v [s, b, g, dv]. Returns out [s, b, h, dv] in q's dtype and lse
    [s, b, h] in float32 (float64); a row that no key is visible to has out 0 and lse -inf.
    """
    result = OnlineSoftmax(q, plan.value_dim)
    # Without a ring, and with one tile, the kernel's result is the answer: the sum hands a single part of all rows on
    # as it is, and only a sink is merged in.
    if plan.one_call:
        k, v = kv.parts
        (tile,) = plan.forward[0].tiles
        out, lse = tile_forward(q, k, v, plan.rules_of(tile, plan.forward[0], q.device), plan)
        result.add(tile.q, (_bshd(lse), _bshd(out)))
        return result.finish(plan.sink)
    own: dict[Moving, Block] = {"kv": kv}
    if "q" in plan.moving(plan.forward):
        own["q"] = Block.copy_of(q)
    blocks = BlockStore(plan.rings, plan.forward, own, plan.ring_rank)
    returns = _returns(plan, plan.forward, {"q": result}, (result.wide, plan.wire_dtype))
    for index, step in enumerate(plan.forward):
        blocks.post(index, step)  # hops that the tiles of this step hide
        tiles = plan.calls_of(step, batch=q.shape[1])
        # A softmax over keys that come block by block: each tile gives out and lse of its keys alone, and lse says how
        # much its out weighs in the whole. So blocks may come in any order, and every rank has another one.
        if step.moving == "kv":
            for tile in tiles:
                result.add(tile.q, _attend(tile, step, q, kv, blocks, plan))
        else:  # the output of queries that are only visiting returns to their rank
            visiting = [(tile.q, _attend(tile, step, q, kv, blocks, plan)) for tile in tiles]
            returns["q"].exchange(index, step, visiting)
            visiting.clear()  # what was sent on is freed now, not when the next step's tiles are done
        blocks.drop(step)
    return result.finish(plan.sink)


def ring_backward(
    dout: torch.Tensor, q: torch.Tensor, kv: Block, out: torch.Tensor, lse: torch.Tensor, plan: RingPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) from the global out and lse; shapes of q, k and v, summed in float32 (float64), in dout's dtype.

    KV goes round again, or the queries do, with what their gradient needs. The gradient of what moves returns on
    communicators of its own, in ring_size - 1 hops (`schedule.routes.own_last_order`).
    """
    # Given the lse and out of all keys, tiles are independent, in any order: dq of a tile is a part of the sum for its
    # rows, dk and dv are parts of the sums for its keys.
    queries = dout, q, out, lse
    if plan.one_call:  # nothing to add up, and so nothing to widen
        k, v = kv.parts
        (tile,) = plan.backward[0].tiles
        return tile_backward(queries, k, v, plan.rules_of(tile, plan.backward[0], q.device), plan)
    dq, dkv = (PartialSum(x[0].shape[0], [t.shape[1:] for t in x], q.dtype, q.device) for x in ((q,), kv.parts))
    own: dict[Moving, Block] = {"kv": kv}
    if "q" in plan.moving(plan.backward):
        own["q"] = _travelling(queries)
    blocks = BlockStore(plan.rings, plan.backward, own, plan.ring_rank)
    returns = _returns(plan, plan.backward, {"kv": dkv, "q": dq}, (plan.wire_dtype, plan.wire_dtype))
    for index, step in enumerate(plan.backward):
        blocks.post(index, step)  # hops that the tiles of this step hide
        tiles = plan.calls_of(step, batch=q.shape[1])
        grads = [_gradients(tile, step, queries, kv, blocks, plan) for tile in tiles]
        # Gradients of the side that moves return to the owner of the block, those of the other side are summed here.
        # The returned ones come first, so that their hop is on its way while the others are summed.
        returned, kept = (1, 0) if step.moving == "kv" else (0, 1)
        returns[step.moving].exchange(index, step, [pair[returned] for pair in grads])
        while grads:  # popped: a name left on a tile's gradients would keep them through the next step's tiles
            (dq, dkv)[kept].add(*grads.pop(0)[kept])
        blocks.drop(step)
    (dq_rows,), (dk, dv) = dq.result(dout.dtype), dkv.result(dout.dtype)
    return dq_rows, dk, dv


def _attend(
    tile: Tile | Pack, step: Step, q: torch.Tensor, kv: Block, blocks: BlockStore, plan: RingPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """lse [s, b, h] and out [s, b, h, dv] of one tile; waits for the step's block."""
    block = blocks[step].parts
    queries, keys = ((q,), block) if step.moving == "kv" else (block, kv.parts)
    (q,), (k, v) = rows_of(queries, tile.q), rows_of(keys, tile.kv)
    out, lse = tile_forward(q, k, v, plan.rules_of(tile, step, q.device), plan)
    return _bshd(lse), _bshd(out)


def _gradients(
    tile: Tile | Pack, step: Step, queries: Tensors, kv: Block, blocks: BlockStore, plan: RingPlan
) -> tuple[Part, Part]:
    """Rows of one tile with dq, and rows with dk and dv, all [s, b, heads, d]; waits for the step's block.

    queries: dout, q, out [s, b, h, ...] and lse [s, b, h] of this rank.
    """
    rules = plan.rules_of(tile, step, queries[0].device)
    if step.moving == "kv":
        kv = blocks[step]
    k, v = rows_of(kv.parts, tile.kv)
    # Own queries are here whole. Visiting ones have come without `out`, but with the row sums for which it is needed.
    if step.moving == "kv" or step.owner == plan.ring_rank:
        dout, q, out, lse = rows_of(queries, tile.q)
    else:
        lse, delta, q, dout = rows_of(blocks[step].parts, tile.q)
        out = out_with_delta(dout, delta)
    dq, dk, dv = tile_backward((dout, q, out, lse), k, v, rules, plan)
    return (tile.q, (dq,)), (tile.kv, (dk, dv))


def _returns(
    plan: RingPlan, steps: Sequence[Step], home: Mapping[Moving, PartialSum], wire_dtypes: Sequence[torch.dtype]
) -> dict[Moving, Returns]:
    """For each kind of block that has results to return: where they are summed, and how they travel."""
    # By tensor: dk and dv, or dq alone, travel in the communication dtype; a partial output as (lse, out), of which lse
    # stays wide, because it is the exponent of a weight.
    return {
        moving: Returns(
            plan.rings,
            [step for step in steps if step.moving == moving],
            home[moving],
            Form.of(*zip(home[moving].row_shapes, wire_dtypes, strict=False)),
            plan.ring_rank,
        )
        for moving in plan.moving(steps)
        if moving in home
    }


def _travelling(queries: Tensors) -> Block:
    """What of the queries travels backward: lse, delta [s, b, h], q and dout."""
    dout, q, out, lse = queries
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return Block.copy_of(lse, delta, q, dout)


def out_with_delta(dout: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """A stand-in for out [..., dv], which does not travel: parallel to dout, with delta [...] = (dout * out).sum(-1).

    Kernels ask for out only to form delta. That spares a third of the bytes of (q, out, dout).
    """
    # out = dout * delta / |dout|^2 has the right row sum. Dividing dout by its largest element first keeps the square
    # from overflow and underflow.
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
    queries: Tensors, k: torch.Tensor, v: torch.Tensor, rules: TileRules, plan: RingPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv [s, b, heads, d] of rows of the same layout."""
    dout, q, out, lse = map(_bshd, queries)
    k, v = _bshd(k), _bshd(v)
    dq, dk, dv = plan.kernel.backward(
        dout, q, *plan.expansion.expand(k, v), out, lse, rules, deterministic=plan.options.deterministic
    )
    dk, dv = plan.expansion.reduce(dk, dv, k, v)
    return _bshd(dq), _bshd(dk), _bshd(dv)


def _bshd(x: torch.Tensor) -> torch.Tensor:
    """Between [s, b, ...] and [b, s, ...], either way."""
    return x.transpose(0, 1)
