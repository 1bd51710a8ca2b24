"""Dense attention written out: the slow, obviously right kernel. Every device, dtype and width."""

from __future__ import annotations

import math

import torch

from megatron_loong.kernels.interface import KernelRequest


class ReferenceKernel:
    """Holds the whole score matrix of a tile; sums in float32 (float64 for float64)."""

    name = "reference"
    proven_on = "CPU"

    def why_not(self, request: KernelRequest) -> str | None:
        """Serves everything but dropout."""
        return "has no dropout" if request.dropout_p else None

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionKernel.forward`."""
        scores = _scores(q, k, softmax_scale, causal)
        lse = scores.logsumexp(-1)
        out = (scores - lse.unsqueeze(-1)).exp() @ _per_query_head(v, q)
        return out.transpose(1, 2).to(q.dtype), lse.transpose(1, 2)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        softmax_scale: float,
        causal: bool,
        deterministic: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `AttentionKernel.backward`; the gradients stay in the dtype they were summed in."""
        wide = _wide(q.dtype)
        p = (_scores(q, k, softmax_scale, causal) - lse.transpose(1, 2).unsqueeze(-1)).exp()
        dout_bhsd, out_bhsd, q_bhsd = (x.to(wide).transpose(1, 2) for x in (dout, out, q))
        delta = (dout_bhsd * out_bhsd).sum(-1, keepdim=True)
        dscores = p * (dout_bhsd @ _per_query_head(v, q).mT - delta) * softmax_scale
        dq = dscores @ _per_query_head(k, q)
        dk = _sum_over_group(dscores.mT @ q_bhsd, k.shape[2])
        dv = _sum_over_group(p.mT @ dout_bhsd, v.shape[2])
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_query_head(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """[b, s, g, d] -> [b, h, s, d], wide."""
    return x.to(_wide(q.dtype)).transpose(1, 2).repeat_interleave(q.shape[2] // x.shape[2], dim=1)


def _sum_over_group(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[b, h, s, d] -> [b, g, s, d]."""
    return x.unflatten(1, (kv_heads, -1)).sum(2)


def _scores(q: torch.Tensor, k: torch.Tensor, softmax_scale: float, causal: bool) -> torch.Tensor:
    """[b, h, s_q, s_kv], wide."""
    scores = (q.to(_wide(q.dtype)).transpose(1, 2) @ _per_query_head(k, q).mT) * softmax_scale
    if causal:
        forbidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(forbidden, -math.inf)
    return scores
