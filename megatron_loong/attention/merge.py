"""The running result of attention: a block folded in (the online softmax), a sink given to every row."""

from __future__ import annotations

import torch

from megatron_loong.kernels.folds import finite
from megatron_loong.kernels.folds import merge_ as merge_


def add_sink_(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> None:
    """Give every row one more score, `sink` [h], that has no value: attention sinks (softmax off by one: sink = 0).

    out [b, s, h, d], lse [b, s, h] of all keys, in place. Exact whatever kernel made them, since a sink only adds to
    the denominator. A row that saw no key keeps out = 0 under a sink of -inf, which adds nothing.
    """
    total = torch.logaddexp(lse, sink.to(lse.dtype))
    out.mul_((lse - finite(total)).exp().unsqueeze(-1))
    lse.copy_(total)


def sink_gradient(dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Gradient [h] of `sink` from these rows: dout, out [s, b, h, d], lse [s, b, h], both with the sink."""
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return -((sink.to(lse.dtype) - finite(lse)).exp() * delta).sum((0, 1)).to(sink.dtype)
