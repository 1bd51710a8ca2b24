"""Dense softmax attention in plain PyTorch: slow, s_q x s_kv memory, obviously right; for tests and odd shapes."""

from __future__ import annotations

import math

import torch

from megatron_loong.config import UNBOUNDED
from megatron_loong.kernels.common import request_fault
from megatron_loong.kernels.dropout import keep_mask
from megatron_loong.kernels.interface import KernelRequest, TileRules


class ReferenceKernel:
    """`AttentionKernel` for every device, dtype and head width. Shapes and rules: `interface.AttentionKernel`.

    Does every feature of `TileRules`. Computes in float64 for float64 inputs, else in float32; gradients come in that
    wider dtype.
    """

    name = "reference"
    bottom_right = True
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
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: TileRules
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [b, s_q, h, dv] in q's dtype, lse [b, s_q, h])."""
        wide = _compute_dtype(q)
        scores, _ = _scores(q.to(wide), k.to(wide), rules)
        lse = scores.logsumexp(-1, keepdim=True)
        p = (scores - lse).exp() * _kept(q, k, rules)
        out = torch.einsum("bgrqk,bkgd->bqgrd", p, v.to(wide)).flatten(2, 3)
        return out.to(q.dtype), _heads_last(lse.squeeze(-1))

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        rules: TileRules,
        *,
        deterministic: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) in float32 (float64), from `out` and `lse` of the whole row."""
        wide, g = _compute_dtype(q), k.shape[2]
        q, k, v, dout, out = (x.to(wide) for x in (q, k, v, dout, out))
        scores, slope = _scores(q, k, rules)
        p = (scores - _grouped_rows(lse.to(wide), g)).exp()
        kept = _kept(q, k, rules)
        delta = _grouped_rows((dout * out).sum(-1), g)
        grouped_dout = dout.unflatten(2, (g, -1))
        dp = torch.einsum("bqgrd,bkgd->bgrqk", grouped_dout, v) * kept
        ds = p * (dp - delta) * slope * rules.softmax_scale
        dq = torch.einsum("bgrqk,bkgd->bqgrd", ds, k).flatten(2, 3)
        dk = torch.einsum("bgrqk,bqgrd->bkgd", ds, q.unflatten(2, (g, -1)))
        dv = torch.einsum("bgrqk,bqgrd->bkgd", p * kept, grouped_dout)
        return dq, dk, dv


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scores(q: torch.Tensor, k: torch.Tensor, rules: TileRules) -> tuple[torch.Tensor, torch.Tensor | float]:
    """[b, g, h // g, s_q, s_kv], -inf where the window forbids; and what a soft cap multiplies their gradient by."""
    g = k.shape[2]
    scores = torch.einsum("bqgrd,bkgd->bgrqk", q.unflatten(2, (g, -1)), k) * rules.softmax_scale
    slope: torch.Tensor | float = 1.0
    if rules.softcap:
        bent = torch.tanh(scores / rules.softcap)
        scores, slope = rules.softcap * bent, 1 - bent.square()
    return scores.masked_fill(hidden_by(rules.window, q.shape[1], k.shape[1], q.device), -math.inf), slope


def hidden_by(window: tuple[int, int], rows: int, keys: int, device: torch.device) -> torch.Tensor:
    """bool [rows, keys]: True where a window, counted from the bottom right, forbids."""
    hidden = torch.zeros(rows, keys, dtype=torch.bool, device=device)
    left, right = window
    if right != UNBOUNDED:
        hidden |= torch.ones_like(hidden).triu(keys - rows + right + 1)
    if left != UNBOUNDED:
        hidden |= torch.ones_like(hidden).tril(keys - rows - left - 1)
    return hidden


def _kept(q: torch.Tensor, k: torch.Tensor, rules: TileRules) -> torch.Tensor | float:
    """What dropout multiplies probabilities by: [b, g, h // g, s_q, s_kv], or 1."""
    if rules.dropout is None:
        return 1.0
    assert rules.q_places is not None and rules.kv_places is not None
    p, first = rules.dropout.p, rules.dropout.first_head
    heads = range(first, first + q.shape[2])
    kept = keep_mask(rules.dropout.seed, p, q.shape[0], heads, rules.q_places, rules.kv_places)
    return kept.unflatten(1, (k.shape[2], -1)).to(q.dtype) / (1 - p)


def _grouped_rows(rows: torch.Tensor, g: int) -> torch.Tensor:
    """[b, s, h] -> [b, g, h // g, s, 1]."""
    return rows.transpose(1, 2).unflatten(1, (g, -1)).unsqueeze(-1)


def _heads_last(rows: torch.Tensor) -> torch.Tensor:
    """[b, g, h // g, s] -> [b, s, h]."""
    return rows.flatten(1, 2).transpose(1, 2)
