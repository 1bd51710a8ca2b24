"""2D-Attention: head parallelism x Double-Ring-Attention (LoongTrain, arXiv 2406.18485, section 4.2)."""

from __future__ import annotations

from typing import Literal

import torch

from megatron_loong.attention.call import Attention2D
from megatron_loong.attention.compiled import traced
from megatron_loong.attention.options import AttentionOptions, CallArguments
from megatron_loong.attention.prepare import in_format, prepare
from megatron_loong.comm.groups import LoongGroups
from megatron_loong.kernels.interface import AttentionKernel
from megatron_loong.layout.sharding import Boundaries


def attention_2d(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: LoongGroups,
    *,
    qkv_format: Literal["bshd", "sbhd", "thd"] = "bshd",
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] | None = None,
    cu_seqlens: Boundaries | None = None,
    dropout_p: float = 0.0,
    kernel: str | AttentionKernel = "auto",
    deterministic: bool = False,
    cu_seqlens_kv: Boundaries | None = None,
    seq_len: int | None = None,
    kv_seq_len: int | None = None,
    softmax_offset: torch.Tensor | None = None,
    softcap: float = 0.0,
    dropout_seed: int | None = None,
    max_logits: torch.Tensor | None = None,
    kv_up_weight: torch.Tensor | None = None,
    gradient_wire: str = "auto",
    head_parts: int | None = None,
    varying_lengths: bool = False,
) -> torch.Tensor:
    """Exact attention over a sequence of which this rank holds the tokens `token_positions` names.

    Collective over the context-parallel group of `groups`. Differentiable (once) in q, k, v and `softmax_offset`.

    Shapes: q [b, s, h, d], k [b, s_kv, g, d], v [b, s_kv, g, dv] for `bshd`, the first two swapped for `sbhd`,
    [t, heads, d] for `thd`; lengths are local. Query head i reads KV head i // (h // g). Any number of query heads
    from `head_parallel_size` on, KV heads in any relation to it. Returns q's shape with v's head width, in q's dtype:
    float64, float32, bfloat16 or float16; a query that sees no key gets zeros.

    cu_seqlens: int32 [documents + 1], global: packed documents of any length, each attending to itself alone; needed
        for `thd`, and for `bshd` the same in every row of the batch. The ranks hold what `token_positions(...,
        cu_seqlens=)` says; it ends where the tokens of all ranks do, and padding is a document of its own.
        `cu_seqlens_kv` where keys come in other numbers than queries: document i reads document i, and queries of a
        document without keys get zeros. bool [b, S]: see `layout.sharding.Boundaries`.
    causal, window_size: a query sees `window_size[0]` keys before and `window_size[1]` after its own place (-1, the
        default: all); causal closes the right side. With s != s_kv the last query stands at the last key.
    seq_len, kv_seq_len: global lengths (thd: all tokens); as many keys as queries unless told. Without seq_len the
        ranks ask each other, which makes the device wait; give it in a training loop.
    softmax_scale: 1 / sqrt(d) by default. softcap: scores become softcap * tanh(scores / softcap).
    softmax_offset [h]: attention sink, a score without a value that joins each row's softmax (zeros: off by one). Its
        gradient is that of this rank's queries: sum it over the group.
    dropout_p: attention dropout; the mask depends on `dropout_seed` (drawn from torch's default generator unless
        given; the same on all ranks) and on where a pair stands, not on the layout.
    max_logits [h] float32: raised to the greatest scaled score of each head seen on this rank (QK-clip); the maximum
        over the group is that of the sequence. One more pass over q and k.
    kv_up_weight [h, d_nope + dv, r]: multi-latent attention whose latent travels instead of its keys and values. k is
        then the latent [b, s, 1, r], v the part of the keys that carries the position [b, s, 1, d_rope], q has width
        d_nope + d_rope; differentiable, its gradient being that of this rank's heads and blocks: sum it over the
        group. `latent_is_smaller` says when that is fewer bytes. DeepSeek-V2 (arXiv 2405.04434) section 2.1.
    gradient_wire: what gradients travel round the ring in; they are summed in float32 (float64) in any case.
        `float32`; `input`, the dtype of q, each rank's part being rounded once for each ring that it crosses; `auto`,
        the default: bfloat16 for bfloat16 (the errors of dq, dk and dv stay within the bound of a single device's
        kernel, see docs/benchmarks.md), float32 or wider else.
    head_parts: parts in which the heads go through, one after another, so that the all-to-all of one runs under the
        ring of another; a divisor of each rank's KV heads. By default as many (up to 4) as leave each part large.
    kernel: a name of `kernels.registry`, "auto", "auto-fp8" (forward in fp8, backward in bfloat16; see `kernels.fp8`),
        or a kernel object. deterministic: honoured, or a `ValueError`.
    varying_lengths: the next call has other lengths. "auto" then takes a kernel that builds a plan for every new shape
        only if no other serves; so it does for packs, whether told or not. A compiled graph is made for one length.

    Under `torch.compile` it is one node of the graph, `fullgraph=True` or not, packs (`cu_seqlens`) of other documents
    included. Without seq_len, and with cu_seqlens_kv, dropout, QK-clip, latents, parts or a kernel object, the
    graph is left for the call.

    Raises, on every rank alike and before anything of q, k or v is sent: `ValueError` for shapes, heads, lengths or
    features that do not fit the layout or that no kernel here has, and for arguments in which the ranks disagree
    (looked at in the first call of each kind; with LOONG_CHECK=1 in every call). `CommunicationError` when a peer is
    lost.
    """
    options = AttentionOptions(
        qkv_format, causal, softmax_scale, window_size, dropout_p, kernel, deterministic, softcap, gradient_wire,
        head_parts, varying_lengths,
    )  # fmt: skip
    arguments = CallArguments(
        cu_seqlens, cu_seqlens_kv, seq_len, kv_seq_len, dropout_seed, softmax_offset, max_logits, kv_up_weight
    )
    if torch.compiler.is_compiling():
        return traced(q, k, v, groups, options, arguments, outside=_attend)
    return _attend(q, k, v, groups, options, arguments)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: LoongGroups,
    options: AttentionOptions,
    arguments: CallArguments,
) -> torch.Tensor:
    qkv, call = prepare((q, k, v), groups, options, arguments)
    out = Attention2D.apply(*qkv, arguments.softmax_offset, arguments.kv_up_weight, call)
    return in_format(out, options.qkv_format)
