"""`attention_2d` under `torch.compile`: two custom operators that the compiler looks into no further.

What a compiler must know of them is the shapes of their results, told by fake implementations. Process groups are
behind `LoongGroups.number`, since an operator takes tensors, numbers and words. What backward needs comes out of the
forward as results, so that the compiler plans their memory.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch

from megatron_loong.attention.attention_2d import attention_2d, prepare
from megatron_loong.attention.call import Attention2D, Call
from megatron_loong.planner.tiles import Mask
from megatron_loong.topology.groups import LoongGroups, groups_by_number

_remembered: WeakKeyDictionary[LoongGroups, dict[Any, dict[str, Any]]] = WeakKeyDictionary()
"""By groups and by what was asked: what a forward leaves for its backward beside tensors; equal for equal questions."""


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


_LEFT_OUT = "cu_seqlens cu_seqlens_kv dropout_p dropout_seed alibi_slopes max_logits kv_up_weight".split()


def traced(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: LoongGroups, *, kernel: Any = "auto", **options: Any
) -> torch.Tensor:
    """What to call instead of `attention_2d` while `torch.compiler.is_compiling()`; all its arguments.

    One node of the graph where `attention_2d_compiled` has what is asked for; else the graph is left for the call (a
    graph break, an error with `fullgraph=True`): packed documents, dropout, ALiBi, QK-clip, latents and kernel objects.
    """
    asked = {name: x for name, x in options.items() if x is not None}
    left_out = [name for name in _LEFT_OUT if name in asked and not (name == "dropout_p" and asked[name] == 0)]
    if left_out or not isinstance(kernel, str):
        outside: Any = torch.compiler.disable(attention_2d)
        return outside(q, k, v, groups, kernel=kernel, **options)
    asked.pop("dropout_p", None)
    return attention_2d_compiled(q, k, v, groups, kernel=kernel, **asked)


class _Context:
    """What `Attention2D.forward` and `backward` take for an autograd context."""

    def __init__(self, saved: tuple[torch.Tensor | None, ...] = (), **remembered: Any) -> None:
        self.saved_tensors = saved
        self.__dict__.update(remembered)

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors

    @property
    def remembered(self) -> dict[str, Any]:
        """All that is not a tensor to be saved."""
        return {name: x for name, x in self.__dict__.items() if name != "saved_tensors"}


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
        head_parts=1,  # an operator has a fixed number of results
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


def _question(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: tuple) -> tuple:
    return (*(tuple(x.shape) for x in (q, k, v)), q.dtype, asked)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [s, b, h, dv] and what backward needs: q, KV block (bytes), out, lse after the all-to-all.

    Without a head group the third and the last but one are q and out again, and an operator must not return the same
    memory twice: then they are empty.
    """
    asked = (groups, left, right, softmax_scale, softcap, seq_len, kv_seq_len, kernel, deterministic, gradient_wire)
    call, context = _call(q, k, v, sink, asked), _Context()
    with torch.no_grad():
        out = Attention2D.forward(context, q, k, v, sink, None, call)
    q_share, kv_flat, out_share, lse, _, _ = context.saved_tensors
    assert q_share is not None and kv_flat is not None and out_share is not None and lse is not None
    kept = _remembered.setdefault(call.groups, {})
    kept[_question(q, k, v, asked)] = context.remembered | {"kv_dtype": kv_flat.dtype}
    if call.groups.handle("head").size == 1:
        q_share, out_share = q.new_empty(0), q.new_empty(0)
    out, q_share, kv_bytes, out_share, lse = _apart(out, q_share, kv_flat.view(torch.uint8), out_share, lse)
    return out, q_share, kv_bytes, out_share, lse


def _fixed(n: Any) -> Any:
    """A size that the compiler had left open, fixed for this graph: the layout of the tokens hangs on it."""
    return int(n) if isinstance(n, torch.SymInt) else n


@_attention.register_fake
def _(q, k, v, sink, *asked):
    q, k, v = (x.new_empty([_fixed(n) for n in x.shape]) for x in (q, k, v))
    call = _call(q, k, v, sink, tuple(map(_fixed, asked)))
    me, b = call.groups.handle("head").rank, q.shape[1]
    heads, ring_rank = len(call.shares.query[me]), call.groups.ring_rank
    rows = sum(stop - start for start, stop in call.layouts[0].ring_runs(ring_rank))
    kv_row = b * len(call.shares.kv[me]) * (k.shape[3] + v.shape[3]) * k.element_size()
    alone = call.groups.handle("head").size == 1
    return (
        q.new_empty(*q.shape[:3], call.value_dim),
        q.new_empty(0) if alone else q.new_empty(rows, b, heads, q.shape[3]),
        q.new_empty(call.kv_rows() * kv_row, dtype=torch.uint8),
        q.new_empty(0) if alone else q.new_empty(rows, b, heads, call.value_dim),
        q.new_empty(rows, b, heads, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32),
    )


@torch.library.custom_op("megatron_loong::attention_2d_backward", mutates_args=())
def _attention_backward(
    dout: torch.Tensor,
    q_share: torch.Tensor,
    kv_bytes: torch.Tensor,
    out_share: torch.Tensor,
    lse: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, and dsink (empty without a sink)."""
    asked = (groups, left, right, softmax_scale, softcap, seq_len, kv_seq_len, kernel, deterministic, gradient_wire)
    question = (tuple(q_shape), tuple(k_shape), tuple(v_shape), q_share.dtype, asked)
    remembered = dict(_remembered[groups_by_number(groups)][question])
    kv_flat = kv_bytes.view(remembered.pop("kv_dtype"))
    context = _Context((q_share, kv_flat, out_share, lse, sink, None), **remembered)
    with torch.no_grad():
        dq, dk, dv, dsink, *_ = Attention2D.backward(context, dout)
    # A ring sums dk and dv in one buffer, and wide inputs keep it.
    dq, dk, dv = _apart(dq, dk, dv)
    return dq, dk, dv, dout.new_empty(0) if dsink is None else dsink


@_attention_backward.register_fake
def _(dout, q_share, kv_bytes, out_share, lse, sink, q_shape, k_shape, v_shape, *asked):
    grads = (dout.new_empty(shape) for shape in (q_shape, k_shape, v_shape))
    return *grads, dout.new_empty(0) if sink is None else torch.empty_like(sink)


def _set_up(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, sink, *asked = inputs
    out, q_share, kv_bytes, out_share, lse = output
    if not q_share.numel():
        q_share, out_share = q, out
    ctx.save_for_backward(q_share, kv_bytes, out_share, lse, sink)
    ctx.shapes, ctx.asked = [list(x.shape) for x in (q, k, v)], asked
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor, *_: None) -> tuple:
    sink = ctx.saved_tensors[-1]
    dq, dk, dv, dsink = torch.ops.megatron_loong.attention_2d_backward(
        dout, *ctx.saved_tensors, *ctx.shapes, *ctx.asked
    )
    return dq, dk, dv, None if sink is None else dsink, *(None,) * len(ctx.asked)


_attention.register_autograd(_backward, setup_context=_set_up)
