"""Dense attention on one device in float64: the slow, obviously right twin."""

from __future__ import annotations

import math

import torch


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, softmax_scale: float | None = None
) -> torch.Tensor:
    """[b, s, h, d], k/v with g heads -> [b, s, h, dv]; the score matrix in full."""
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scale = 1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if causal:
        forbidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(forbidden, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def dense_with_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    causal: bool,
    softmax_scale: float | None = None,
) -> dict[str, torch.Tensor]:
    """out, dq, dk, dv of `dense_attention`, computed in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out = dense_attention(q, k, v, causal, softmax_scale)
    grads = torch.autograd.grad(out, (q, k, v), dout.double())
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))
