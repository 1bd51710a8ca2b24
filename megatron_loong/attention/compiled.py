"""`attention_2d` under `torch.compile`: two custom operators that the compiler does not look into.

The compiler needs the shapes of their results, which fake implementations tell it. An operator takes tensors, numbers
and text, so process groups go in as `LoongGroups.number` and options as `_encoded`. What backward needs comes out of
the forward operator as results, so that the compiler plans their memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from megatron_loong.attention.call import backward_pass, forward_pass, shares_of
from megatron_loong.attention.merge import accumulator_dtype
from megatron_loong.attention.options import QKV_FORMATS, AttentionOptions, CallArguments
from megatron_loong.attention.plan import Call
from megatron_loong.attention.prepare import in_format, prepare, sequence_first
from megatron_loong.comm.groups import LoongGroups, groups_by_number
from megatron_loong.config import FULL


def traced(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: LoongGroups,
    options: AttentionOptions,
    arguments: CallArguments,
    *,
    outside: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """What `attention_2d` does while `torch.compiler.is_compiling()`.

    One node of the graph, where the operator has what is asked for. Else `outside` is called outside of the graph (a
    graph break, an error with `fullgraph=True`): for dropout, QK-clip, latents, kernel objects, parts of the heads,
    cross-attention of documents, without `seq_len`, for which the ranks must ask each other, and for the error about
    options that no call can have.
    """
    left_out = arguments.cu_seqlens_kv, arguments.max_logits, arguments.kv_up_weight, options.head_parts
    unknown_length = arguments.seq_len is None and groups.config.context_parallel_size > 1
    beyond = unknown_length or options.dropout_p or any(x is not None for x in left_out)
    words = isinstance(options.kernel, str) and isinstance(options.gradient_wire, str)
    switches = options.causal, options.deterministic, options.varying_lengths
    wrong = any(x not in (True, False) for x in switches) or len(options.window_size or FULL) != 2
    if beyond or not words or wrong or options.qkv_format not in QKV_FORMATS:
        leave: Any = torch.compiler.disable(outside)
        return leave(q, k, v, groups, options, arguments)
    q, k, v = (sequence_first(x, options.qkv_format) for x in (q, k, v))
    cu_seqlens = arguments.cu_seqlens
    if cu_seqlens is not None and not isinstance(cu_seqlens, torch.Tensor):
        cu_seqlens = torch.tensor(list(cu_seqlens), dtype=torch.int64, device="cpu")
    out, *_ = torch.ops.megatron_loong.attention_2d(
        q,
        k,
        v,
        arguments.softmax_offset,
        cu_seqlens,
        groups.number,
        *_encoded(options, head_dim=q.shape[3]),
        q.shape[0] if arguments.seq_len is None else arguments.seq_len,
        -1 if arguments.kv_seq_len is None else arguments.kv_seq_len,
    )
    return in_format(out, options.qkv_format)


def _encoded(options: AttentionOptions, head_dim: int) -> tuple[str, list[float]]:
    """Options as an operator takes them: words, and numbers, which may be symbolic in the graph."""
    left, right = options.window_size or FULL
    scale = 1 / math.sqrt(head_dim) if options.softmax_scale is None else options.softmax_scale
    numbers = [options.causal, left, right, scale, options.softcap, options.deterministic]
    return f"{options.gradient_wire} {options.kernel}", numbers


def _decoded(words: str, numbers: list[float]) -> AttentionOptions:
    """The inverse of `_encoded`. The operator's tensors have the sequence first, of packs too."""
    gradient_wire, kernel = words.split(" ", 1)
    causal, left, right, scale, softcap, deterministic = numbers
    return AttentionOptions(
        qkv_format="sbhd",
        causal=causal,  # type: ignore[arg-type]
        window_size=(left, right),  # type: ignore[arg-type]
        softmax_scale=scale,
        softcap=softcap,
        deterministic=deterministic,  # type: ignore[arg-type]
        kernel=kernel,
        gradient_wire=gradient_wire,
    )


def _call(
    qkv: tuple[torch.Tensor, ...], sink: torch.Tensor | None, cu_seqlens: torch.Tensor | None, asked: tuple
) -> Call:
    number, words, numbers, seq_len, kv_seq_len = asked
    arguments = CallArguments(
        cu_seqlens=cu_seqlens,
        seq_len=seq_len,
        kv_seq_len=None if kv_seq_len < 0 else kv_seq_len,
        softmax_offset=sink,
    )
    q, k, v = qkv
    return prepare((q, k, v), groups_by_number(number), _decoded(words, numbers), arguments)[1]


def _apart(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Dense, and no two of them in one buffer: what an operator may return."""
    # The compiler plans memory by results, so no two of an operator's results may share a buffer, as the dk and dv of a
    # kernel may.
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
    words: str,
    numbers: list[int | float | bool],
    seq_len: int,
    kv_seq_len: int,
) -> list[torch.Tensor]:
    """out [s, b, h, dv]; then of each part of the heads q, KV block (bytes), out and lse after the all-to-all.

    Without a head group, q and out of the part are the whole. An operator must not return the same memory twice, so
    they are then empty.
    """
    call = _call((q, k, v), sink, cu_seqlens, (groups, words, numbers, seq_len, kv_seq_len))
    with torch.no_grad():
        out, shares = forward_pass(q, k, v, sink, None, call)
    saved = [x for q_share, kv, *result in shares for x in (q_share, kv.flat, *result)]
    if _alone(call):
        saved[0], saved[2] = q.new_empty(0), q.new_empty(0)
    return _apart(out, *saved)


def _alone(call: Call) -> bool:
    return call.groups.handle("head").size == 1


def _fixed(n: Any) -> Any:
    """A symbolic size made constant for this graph, because the layout of the tokens depends on it."""
    if isinstance(n, (list, tuple)):
        return [_fixed(x) for x in n]
    return int(n) if isinstance(n, torch.SymInt) else float(n) if isinstance(n, torch.SymFloat) else n


@_attention.register_fake
def _(q, k, v, sink, cu_seqlens, *asked):
    q, k, v = (x.new_empty(_fixed(x.shape)) for x in (q, k, v))
    # How many tokens a rank holds does not depend on where documents end, so boundaries without values are enough.
    valueless = None if cu_seqlens is None else cu_seqlens.to("meta")
    call = _call((q, k, v), sink, valueless, tuple(map(_fixed, asked)))
    rows, kv_rows = (call.rows_after_exchange(layout) for layout in call.layouts)
    b = q.shape[1]
    results = [q.new_empty(*q.shape[:3], call.value_dim)]
    for part in call.parts:
        heads = len(part.shares.query[part.head_rank])
        results += [
            q.new_empty(0) if _alone(call) else q.new_empty(rows, b, heads, q.shape[3]),
            part.kv_form(k, v).buffer(kv_rows, k.device),
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
    words: str,
    numbers: list[int | float | bool],
    seq_len: int,
    kv_seq_len: int,
) -> list[torch.Tensor]:
    """dq, dk, dv, and dsink where there is a sink."""
    q, k, v = (dout.new_empty(()).expand(shape) for shape in (q_shape, k_shape, v_shape))  # for their shapes alone
    call = _call((q, k, v), sink, cu_seqlens, (groups, words, numbers, seq_len, kv_seq_len))
    with torch.no_grad():
        grads = backward_pass(dout, shares_of(saved, call.parts[0].kv_form(k, v)), sink, None, call)
    return _apart(*(x for x in grads if x is not None))


@_attention_backward.register_fake
def _(dout, saved, sink, cu_seqlens, q_shape, k_shape, v_shape, *asked):
    grads = [dout.new_empty(shape) for shape in (q_shape, k_shape, v_shape)]
    return grads if sink is None else [*grads, torch.empty_like(sink)]


def _set_up(ctx: Any, inputs: tuple, output: list[torch.Tensor]) -> None:
    q, k, v, sink, cu_seqlens, *asked = inputs
    # Where the operator left q and out empty, because they are the operator's own input and result, put them back.
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
