"""Dense softmax attention in plain PyTorch: slow, s_q x s_kv memory, obviously right; for tests and odd shapes."""

from __future__ import annotations

import math

import torch

from megatron_loong.kernels.common import request_fault
from megatron_loong.kernels.interface import KernelRequest


class ReferenceKernel:
    """`AttentionKernel` for every device, dtype and head width. Shapes and rules: `interface.AttentionKernel`.

    Computes in float64 for float64 inputs, else in float32; gradients come in that wider dtype.
    """

    name = "reference"
    proven_on = "CPU"
    devices = "any"
    dtypes = "any floating point"
    head_widths = "any, k and v may differ"

    def why_not(self, request: KernelRequest) -> str | None:
        """None when it can serve the request, else the reason."""
        if not request.dtype.is_floating_point:
            return f"takes floating point, not {request.dtype}"
        return request_fault(request)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [b, s_q, h, dv] in q's dtype, lse [b, s_q, h])."""
        wide = _compute_dtype(q)
        scores = _scores(q.to(wide), k.to(wide), softmax_scale, causal)
        lse = scores.logsumexp(-1, keepdim=True)
        out = torch.einsum("bgrqk,bkgd->bqgrd", (scores - lse).exp(), v.to(wide)).flatten(2, 3)
        return out.to(q.dtype), _heads_last(lse.squeeze(-1))

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
        """(dq, dk, dv) in float32 (float64), from `out` and `lse` of the whole row."""
        wide, g = _compute_dtype(q), k.shape[2]
        q, k, v, dout, out = (x.to(wide) for x in (q, k, v, dout, out))
        p = (_scores(q, k, softmax_scale, causal) - _grouped_rows(lse.to(wide), g)).exp()
        delta = _grouped_rows((dout * out).sum(-1), g)
        grouped_dout = dout.unflatten(2, (g, -1))
        ds = p * (torch.einsum("bqgrd,bkgd->bgrqk", grouped_dout, v) - delta) * softmax_scale
        dq = torch.einsum("bgrqk,bkgd->bqgrd", ds, k).flatten(2, 3)
        dk = torch.einsum("bgrqk,bqgrd->bkgd", ds, q.unflatten(2, (g, -1)))
        dv = torch.einsum("bgrqk,bqgrd->bkgd", p, grouped_dout)
        return dq, dk, dv


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scores(q: torch.Tensor, k: torch.Tensor, softmax_scale: float, causal: bool) -> torch.Tensor:
    """[b, g, h // g, s_q, s_kv]; -inf where the causal mask forbids."""
    scores = torch.einsum("bqgrd,bkgd->bgrqk", q.unflatten(2, (k.shape[2], -1)), k) * softmax_scale
    if causal:
        assert q.shape[1] == k.shape[1], "causal tiles are square"
        forbidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(forbidden, -math.inf)
    return scores


def _grouped_rows(rows: torch.Tensor, g: int) -> torch.Tensor:
    """[b, s, h] -> [b, g, h // g, s, 1]."""
    return rows.transpose(1, 2).unflatten(1, (g, -1)).unsqueeze(-1)


def _heads_last(rows: torch.Tensor) -> torch.Tensor:
    """[b, g, h // g, s] -> [b, s, h]."""
    return rows.flatten(1, 2).transpose(1, 2)
