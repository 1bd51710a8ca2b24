"""`attention_2d` under `torch.compile`: two custom operators that the compiler looks into no further.

What a compiler must know of them is the shapes of their results, told by fake implementations. Process groups are
behind `LoongGroups.number`, since an operator takes tensors, numbers and words. What backward needs comes out of the
forward as results, so that the compiler plans their memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_loong.attention.attention_2d import attention_2d, prepare
from megatron_loong.attention.blocks import Block, accumulator_dtype
from megatron_loong.attention.call import Call, _backward, _forward
from megatron_loong.planner.tiles import Mask
from megatron_loong.topology.groups import LoongGroups, groups_by_number


def attention_2d_compiled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: LoongGroups,
    *,
    qkv_format: str = "bshd",
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] | None = None,
    kernel: str = "auto",
    deterministic: bool = False,
    seq_len: int | None = None,
    kv_seq_len: int | None = None,
    softmax_offset: torch.Tensor | None = None,
    softcap: float = 0.0,
    gradient_wire: str = "auto",
) -> torch.Tensor:
    """What `attention_2d` gives with these arguments, as one node of a compiled graph; it works uncompiled too.

    Differentiable in q, k, v and `softmax_offset`. `seq_len` must be given unless the group has one rank: asking the
    other ranks is nothing that can be traced. Lengths are fixed in a compiled graph; others make another graph.
    """
    if qkv_format not in ("bshd", "sbhd"):
        raise ValueError(f"qkv_format={qkv_format!r} cannot be compiled; use 'bshd' or 'sbhd'")
    if seq_len is None and groups.config.context_parallel_size > 1:
        raise ValueError("seq_len=None cannot be compiled; give the global length: in a graph no rank asks the others")
    if qkv_format == "bshd":
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    mask = Mask.of(causal, window_size)
    out, *_ = torch.ops.megatron_loong.attention_2d(
        q,
        k,
        v,
        softmax_offset,
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
    return out.transpose(0, 1) if qkv_format == "bshd" else out


_LEFT_OUT = (
    "cu_seqlens cu_seqlens_kv dropout_p dropout_seed alibi_slopes max_logits kv_up_weight "
    "head_parts sequence_parts all_to_all"
).split()


def traced(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: LoongGroups, *, kernel: Any = "auto", **options: Any
) -> torch.Tensor:
    """What to call instead of `attention_2d` while `torch.compiler.is_compiling()`; all its arguments.

    One node of the graph where `attention_2d_compiled` has what is asked for; else the graph is left for the call (a
    graph break, an error with `fullgraph=True`): packed documents, dropout, ALiBi, QK-clip, latents and kernel objects.
    """
    asked = {name: x for name, x in options.items() if x is not None}
    for name, nothing in (("dropout_p", 0), ("all_to_all", "backend")):
        if asked.get(name) == nothing:
            del asked[name]
    left_out = [name for name in _LEFT_OUT if name in asked]
    if left_out or not isinstance(kernel, str):
        outside: Any = torch.compiler.disable(attention_2d)
        return outside(q, k, v, groups, kernel=kernel, **options)
    return attention_2d_compiled(q, k, v, groups, kernel=kernel, **asked)


def _call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None, asked: tuple) -> Call:
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
        softcap=softcap,
        seq_len=seq_len,
        kv_seq_len=None if kv_seq_len < 0 else kv_seq_len,
        softmax_offset=sink,
        kernel=kernel,
        deterministic=deterministic,
        gradient_wire=gradient_wire,
        sequence_parts=1,  # what is kept of halves shares memory, which results of an operator may not
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
    call = _call(q, k, v, sink, asked)
    with torch.no_grad():
        out, shares = _forward(q, k, v, sink, None, call)
    saved = [x for q_share, kv, *result in shares for x in (q_share, kv.flat, *result)]
    if _alone(call):
        saved[0], saved[2] = q.new_empty(0), q.new_empty(0)
    return _apart(out, *saved)


def _alone(call: Call) -> bool:
    return call.groups.handle("head").size == 1


def _fixed(n: Any) -> Any:
    """A size that the compiler had left open, fixed for this graph: the layout of the tokens hangs on it."""
    return int(n) if isinstance(n, torch.SymInt) else n


@_attention.register_fake
def _(q, k, v, sink, *asked):
    q, k, v = (x.new_empty([_fixed(n) for n in x.shape]) for x in (q, k, v))
    call = _call(q, k, v, sink, tuple(map(_fixed, asked)))
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
    call = _call(q, k, v, sink, asked)
    shares = [
        (q_share, Block(part.kv_form(k, v), flat), out_share, lse)
        for part, (q_share, flat, out_share, lse) in zip(call.parts, zip(*[iter(saved)] * 4, strict=True), strict=True)
    ]
    with torch.no_grad():
        grads = _backward(dout, shares, sink, None, call)
    # A ring sums dk and dv in one buffer, and wide inputs keep it.
    return _apart(*(x for x in grads if x is not None))


@_attention_backward.register_fake
def _(dout, saved, sink, q_shape, k_shape, v_shape, *asked):
    grads = [dout.new_empty(shape) for shape in (q_shape, k_shape, v_shape)]
    return grads if sink is None else [*grads, torch.empty_like(sink)]


def _set_up(ctx: Any, inputs: tuple, output: list[torch.Tensor]) -> None:
    q, k, v, sink, *asked = inputs
    out, *saved = output
    if not saved[0].numel():
        saved[0], saved[2] = q, out
    ctx.save_for_backward(sink, *saved)
    ctx.shapes, ctx.asked = [list(x.shape) for x in (q, k, v)], asked


def _differentiate(ctx: Any, gradients: list[torch.Tensor]) -> tuple:
    sink, *saved = ctx.saved_tensors
    grads = torch.ops.megatron_loong.attention_2d_backward(gradients[0], saved, sink, *ctx.shapes, *ctx.asked)
    return *grads, *[None] * (4 - len(grads)), *[None] * len(ctx.asked)


_attention.register_autograd(_differentiate, setup_context=_set_up)
