"""`attention_2d` under `torch.compile`: two custom operators that the compiler looks into no further.

What a compiler must know of them is the shapes of their results, told by fake implementations. Process groups are
behind `LoongGroups.number`, since an operator takes tensors, numbers and words. What backward needs comes out of the
forward as results, so that the compiler plans their memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from megatron_loong.attention.blocks import Block, accumulator_dtype
from megatron_loong.attention.call import Call, _backward, _forward
from megatron_loong.attention.prepare import prepare
from megatron_loong.schedule.tiles import Mask
from megatron_loong.sequence.sharding import Boundaries
from megatron_loong.topology.groups import LoongGroups, groups_by_number

#: Arguments of `attention_2d` that the operator does not take.
_LEFT_OUT = ("cu_seqlens_kv dropout_p dropout_seed max_logits kv_up_weight head_parts").split()


def traced(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: LoongGroups,
    *,
    outside: Callable[..., torch.Tensor],
    **options: Any,
) -> torch.Tensor:
    """What `attention_2d` does while `torch.compiler.is_compiling()`; `options` are all its other arguments.

    One node of the graph, where the operator has what is asked for. Else the graph is left and `outside` is called (a
    graph break, an error with `fullgraph=True`): dropout, QK-clip, latents, kernel objects, and a missing
    `seq_len`, for which the ranks must ask each other.
    """
    asked = {name: x for name, x in options.items() if x is not None}
    if asked.get("dropout_p") == 0:
        del asked["dropout_p"]
    unknown_length = "seq_len" not in asked and groups.config.context_parallel_size > 1
    if unknown_length or any(name in asked for name in _LEFT_OUT) or not isinstance(asked["kernel"], str):
        leave: Any = torch.compiler.disable(outside)
        return leave(q, k, v, groups, **options)
    return _in_graph(q, k, v, groups, **asked)


def _in_graph(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: LoongGroups,
    *,
    qkv_format: str,
    causal: bool,
    window_size: tuple[int, int] | None = None,
    cu_seqlens: Boundaries | None = None,
    softmax_scale: float | None = None,
    softmax_offset: torch.Tensor | None = None,
    softcap: float,
    seq_len: int | None = None,
    kv_seq_len: int | None = None,
    kernel: str,
    deterministic: bool,
    gradient_wire: str,
) -> torch.Tensor:
    if qkv_format not in ("bshd", "sbhd", "thd"):
        raise ValueError(f"qkv_format={qkv_format!r} is unknown; use 'bshd', 'sbhd' or 'thd'")
    if causal not in (True, False):
        raise ValueError(f"causal={causal!r} must be True or False")
    if qkv_format == "thd":
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    elif qkv_format == "bshd":
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    if cu_seqlens is not None and not isinstance(cu_seqlens, torch.Tensor):
        cu_seqlens = torch.tensor(list(cu_seqlens), dtype=torch.int64, device="cpu")
    mask = Mask.of(causal, window_size)
    out, *_ = torch.ops.megatron_loong.attention_2d(
        q,
        k,
        v,
        softmax_offset,
        cu_seqlens,
        groups.number,
        -1 if mask.left is None else mask.left,
        -1 if mask.right is None else mask.right,
        1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale,
        softcap,
        q.shape[0] if seq_len is None else seq_len,
        -1 if kv_seq_len is None else kv_seq_len,
        kernel,
        deterministic,
        gradient_wire,
    )
    return out.squeeze(1) if qkv_format == "thd" else out.transpose(0, 1) if qkv_format == "bshd" else out


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    asked: tuple,
) -> Call:

    number, left, right, softmax_scale, softcap, seq_len, kv_seq_len, kernel, deterministic, gradient_wire = asked
    *_, call = prepare(
        q,
        k,
        v,
        groups_by_number(number),
        qkv_format="sbhd",
        causal=False,
        window_size=(left, right),
        softmax_scale=softmax_scale,
        cu_seqlens=cu_seqlens,
        softcap=softcap,
        seq_len=seq_len,
        kv_seq_len=None if kv_seq_len < 0 else kv_seq_len,
        softmax_offset=sink,
        kernel=kernel,
        deterministic=deterministic,
        gradient_wire=gradient_wire,
    )
    return call


def _apart(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Dense, and no two of them in one buffer: what an operator may return."""
    found: dict[int, torch.Tensor] = {}
    results = []
    for x in tensors:
        x = x.contiguous()
        if found.setdefault(x.untyped_storage().data_ptr(), x) is not x and x.numel():
            x = x.clone()
        results.append(x)
    return results


@torch.library.custom_op("megatron_loong::attention_2d", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    groups: int,
    left: int,
    right: int,
    softmax_scale: float,
    softcap: float,
    seq_len: int,
    kv_seq_len: int,
    kernel: str,
    deterministic: bool,
    gradient_wire: str,
) -> list[torch.Tensor]:
    """out [s, b, h, dv]; then of each part of the heads q, KV block (bytes), out and lse after the all-to-all.

    Without a head group the part's q and out are the whole, and an operator must not return the same memory twice:
    then they are empty.
    """
    asked = (groups, left, right, softmax_scale, softcap, seq_len, kv_seq_len, kernel, deterministic, gradient_wire)
    call = _call(q, k, v, sink, cu_seqlens, asked)
    with torch.no_grad():
        out, shares = _forward(q, k, v, sink, None, call)
    saved = [x for q_share, kv, *result in shares for x in (q_share, kv.flat, *result)]
    if _alone(call):
        saved[0], saved[2] = q.new_empty(0), q.new_empty(0)
    return _apart(out, *saved)


def _alone(call: Call) -> bool:
    return call.groups.handle("head").size == 1


def _fixed(n: Any) -> Any:
    """A symbolic size made constant for this graph, because the layout of the tokens depends on it."""
    return int(n) if isinstance(n, torch.SymInt) else n


@_attention.register_fake
def _(q, k, v, sink, cu_seqlens, *asked):
    q, k, v = (x.new_empty([_fixed(n) for n in x.shape]) for x in (q, k, v))
    # How many tokens a rank holds does not depend on where documents end, so boundaries without values are enough.
    valueless = None if cu_seqlens is None else cu_seqlens.to("meta")
    call = _call(q, k, v, sink, valueless, tuple(map(_fixed, asked)))
    me, b, ring_rank = call.groups.handle("head").rank, q.shape[1], call.groups.ring_rank
    rows = sum(stop - start for start, stop in call.layouts[0].ring_runs(ring_rank))
    results = [q.new_empty(*q.shape[:3], call.value_dim)]
    for part in call.parts:
        heads = len(part.shares.query[me])
        results += [
            q.new_empty(0) if _alone(call) else q.new_empty(rows, b, heads, q.shape[3]),
            part.kv_form(k, v).buffer(part.kv_rows(), k.device),
            q.new_empty(0) if _alone(call) else q.new_empty(rows, b, heads, call.value_dim),
            q.new_empty(rows, b, heads, dtype=accumulator_dtype(q.dtype)),
        ]
    return results


@torch.library.custom_op("megatron_loong::attention_2d_backward", mutates_args=())
def _attention_backward(
    dout: torch.Tensor,
    saved: list[torch.Tensor],
    sink: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    q_shape: list[int],
    k_shape: list[int],
    v_shape: list[int],
    groups: int,
    left: int,
    right: int,
    softmax_scale: float,
    softcap: float,
    seq_len: int,
    kv_seq_len: int,
    kernel: str,
    deterministic: bool,
    gradient_wire: str,
) -> list[torch.Tensor]:
    """dq, dk, dv, and dsink where there is a sink."""
    asked = (groups, left, right, softmax_scale, softcap, seq_len, kv_seq_len, kernel, deterministic, gradient_wire)
    q, k, v = (dout.new_empty(()).expand(shape) for shape in (q_shape, k_shape, v_shape))  # for their shapes alone
    call = _call(q, k, v, sink, cu_seqlens, asked)
    shares = [
        (q_share, Block(part.kv_form(k, v), flat), out_share, lse)
        for part, (q_share, flat, out_share, lse) in zip(call.parts, zip(*[iter(saved)] * 4, strict=True), strict=True)
    ]
    with torch.no_grad():
        grads = _backward(dout, shares, sink, None, call)
    # A ring sums dk and dv in one buffer, and wide inputs keep it.
    return _apart(*(x for x in grads if x is not None))


@_attention_backward.register_fake
def _(dout, saved, sink, cu_seqlens, q_shape, k_shape, v_shape, *asked):
    grads = [dout.new_empty(shape) for shape in (q_shape, k_shape, v_shape)]
    return grads if sink is None else [*grads, torch.empty_like(sink)]


def _set_up(ctx: Any, inputs: tuple, output: list[torch.Tensor]) -> None:
    q, k, v, sink, cu_seqlens, *asked = inputs
    out, *saved = output
    if not saved[0].numel():
        saved[0], saved[2] = q, out
    ctx.save_for_backward(sink, cu_seqlens, *saved)
    ctx.shapes, ctx.asked = [list(x.shape) for x in (q, k, v)], asked


def _differentiate(ctx: Any, gradients: list[torch.Tensor]) -> tuple:
    sink, cu_seqlens, *saved = ctx.saved_tensors
    inputs = gradients[0], saved, sink, cu_seqlens, *ctx.shapes, *ctx.asked
    grads = torch.ops.megatron_loong.attention_2d_backward(*inputs)
    return *grads, *[None] * (5 - len(grads)), *[None] * len(ctx.asked)


_attention.register_autograd(_differentiate, setup_context=_set_up)
