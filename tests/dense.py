"""Dense attention on one device in float64: the slow, obviously right twin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def band(rows: int, keys: int, window: tuple[int, int]) -> torch.Tensor:
    """bool [rows, keys]: a window (left, right), -1 unbounded, the last row standing at the last key."""
    places = torch.arange(rows).unsqueeze(1) + keys - rows
    distance = torch.arange(keys) - places
    left, right = window
    return (distance >= -left if left >= 0 else distance == distance) & (
        distance <= right if right >= 0 else distance == distance
    )


def document_mask(
    documents: Sequence[int], kv_documents: Sequence[int], window: tuple[int, int] = (-1, -1)
) -> torch.Tensor:
    """bool [S_q, S_kv]: each document for itself, a window inside each."""
    allowed = torch.zeros(documents[-1], kv_documents[-1], dtype=torch.bool)
    for i in range(len(documents) - 1):
        rows, keys = slice(documents[i], documents[i + 1]), slice(kv_documents[i], kv_documents[i + 1])
        allowed[rows, keys] = band(rows.stop - rows.start, keys.stop - keys.start, window)
    return allowed


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    allowed: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    kept: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """[b, s, h, d], k/v with g heads -> [b, s, h, dv]; the score matrix in full.

    allowed: bool [s_q, s_kv] mask; a row without a key gives zeros. sink [h]: one more score per row, without a value.
    kept: bool [b, h, s_q, s_kv], what dropout keeps.
    """
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scale = 1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        allowed = band(q.shape[1], k.shape[1], (-1, 0))
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], 3)
    # A softmax in which a row of nothing but -inf is a row of zeros, in its gradient too.
    p = (scores - scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)).exp()
    total = p.sum(-1, keepdim=True)
    p = (p / total.masked_fill(total == 0, 1))[..., : k.shape[1]]
    if kept is not None:
        p = p * kept / (1 - dropout_p)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


def dense_with_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    **options,
) -> dict[str, torch.Tensor]:
    """out, dq, dk, dv (and dsink, with a sink) of `dense_attention`, computed in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    if options.get("sink") is not None:
        options["sink"] = options["sink"].detach().double().requires_grad_()
        leaves.append(options["sink"])
    out = dense_attention(*leaves[:3], causal, softmax_scale, **options)
    grads = torch.autograd.grad(out, leaves, dout.double())
    return dict(zip(("out", "dq", "dk", "dv", "dsink"), (out.detach(), *grads), strict=False))
