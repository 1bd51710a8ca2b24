"""Fold one block's attention into the running result: the online softmax."""

from __future__ import annotations

import torch


def merge_(out: torch.Tensor, lse: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor) -> None:
    """Fold (block_out, block_lse) into (out, lse), in place.

    Shapes: out, block_out [b, s, h, d]; lse, block_lse [b, s, h], natural log. `out` and `lse` are float32 or
    wider: ring_size folds in bfloat16 multiply the RMS error by 5 or more. The rank's own tile comes first, so
    no row of `lse` is -inf. LoongTrain algorithm 1; FlashAttention (arXiv 2205.14135) section 3.1.

        lse' = log(exp(lse) + exp(block_lse))      out' = out + sigmoid(block_lse - lse) * (block_out - out)
    """
    gap = block_lse - lse
    out.lerp_(block_out.to(out.dtype), torch.sigmoid(gap).unsqueeze(-1).to(out.dtype))
    lse.add_(torch.nn.functional.softplus(gap, threshold=40.0))
