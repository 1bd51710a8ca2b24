"""Fold one block's attention into the running result: the online softmax."""

from __future__ import annotations

import torch


def merge_(out: torch.Tensor, lse: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor) -> None:
    """Fold (block_out, block_lse) into (out, lse), in place.

    Shapes: out, block_out [b, s, h, d]; lse, block_lse [b, s, h], natural log. `out` and `lse` are float32 or
    wider: ring_size folds in bfloat16 multiply the RMS error by 5 or more. A row that has seen nothing yet has
    out = 0 and lse = -inf; in a block, every row has seen something. LoongTrain algorithm 1; FlashAttention
    (arXiv 2205.14135) section 3.1.

        lse' = log(exp(lse) + exp(block_lse))      out' = out + sigmoid(block_lse - lse) * (block_out - out)
    """
    out.lerp_(block_out.to(out.dtype), torch.sigmoid(block_lse - lse).unsqueeze(-1).to(out.dtype))
    torch.logaddexp(lse, block_lse.to(lse.dtype), out=lse)


def add_sink_(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> None:
    """Give every row one more score, `sink` [h], that has no value: attention sinks (softmax off by one: sink = 0).

    out [b, s, h, d], lse [b, s, h] of all keys, in place. Exact whatever kernel made them, since a sink only adds to
    the denominator.
    """
    total = torch.logaddexp(lse, sink.to(lse.dtype))
    out.mul_((lse - total).exp().unsqueeze(-1))
    lse.copy_(total)


def sink_gradient(dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Gradient [h] of `sink` from these rows: dout, out [s, b, h, d], lse [s, b, h], both with the sink."""
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return -((sink.to(lse.dtype) - lse).exp() * delta).sum((0, 1)).to(sink.dtype)
