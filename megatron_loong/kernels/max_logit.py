"""The greatest score of each head, for QK-clip: one more pass over q and k, whatever kernel serves the attention."""

from __future__ import annotations

import torch

from megatron_loong.kernels.interface import TileRules
from megatron_loong.kernels.reference import hidden_by

_ROWS = 1024


@torch.no_grad()
def raise_to_max_logits_(most: torch.Tensor, q: torch.Tensor, k: torch.Tensor, rules: TileRules) -> None:
    """Raise `most` [h] (float32) to the greatest scaled score of this tile, head by head; in blocks of rows.

    q [b, s_q, h, d], k [b, s_kv, g, d]. Before a soft cap, as TransformerEngine has it. Half the FLOPs of a forward.
    """
    rows, keys, g = q.shape[1], k.shape[1], k.shape[2]
    hidden = hidden_by(rules.window, rows, keys, q.device)
    for start in range(0, rows, _ROWS):
        part = slice(start, min(start + _ROWS, rows))
        scores = torch.einsum("bqgrd,bkgd->bgrqk", q[:, part].unflatten(2, (g, -1)), k).float() * rules.softmax_scale
        scores.masked_fill_(hidden[part], -torch.inf)
        torch.maximum(most, scores.amax((0, 3, 4)).flatten(), out=most)
