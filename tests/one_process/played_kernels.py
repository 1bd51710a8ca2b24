"""What stand-ins for attention packages and operators compute: the reference kernel, in the packages' layouts."""

from __future__ import annotations

import itertools

import torch

from megatron_loong.kernels.reference import ReferenceKernel

REFERENCE = ReferenceKernel()


def documents(rules, cu_q, cu_k, rows, keys):
    """(rows, keys) of each packed document, or of the whole tile."""
    if cu_q is None:
        return [(slice(0, rows), slice(0, keys))], rules
    assert cu_q.dtype == cu_k.dtype == torch.int32
    bounds = zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    return [(slice(*q), slice(*k)) for q, k in bounds], rules


def play_forward(q, k, v, rules, cu_q=None, cu_k=None, longest=()):
    """out and lse in the packages' layouts: [b, s, h, d] and [b, h, s], packed [t, h, d] and [h, t]."""
    packed = cu_q is not None
    if packed:
        assert q.dim() == 3 and longest == (cu_q.diff().max(), cu_k.diff().max())
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    parts, rules = documents(rules, cu_q, cu_k, q.shape[1], k.shape[1])
    results = [REFERENCE.forward(q[:, rows], k[:, keys], v[:, keys], rules) for rows, keys in parts]
    out, lse = (torch.cat(x, 1) for x in zip(*results, strict=True))
    lse = lse.transpose(1, 2).contiguous()
    return (out[0], lse[0]) if packed else (out, lse)


def play_backward(dout, q, k, v, out, lse, rules, cu_q=None, cu_k=None):
    packed = cu_q is not None
    assert lse.is_contiguous() and lse.shape == ((q.shape[1], q.shape[0]) if packed else q.shape[:3:2] + q.shape[1:2])
    if packed:
        dout, q, k, v, out, lse = (x.unsqueeze(0) for x in (dout, q, k, v, out, lse))
    parts, rules = documents(rules, cu_q, cu_k, q.shape[1], k.shape[1])
    lse = lse.transpose(1, 2)
    results = [
        REFERENCE.backward(
            dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, rows], rules, deterministic=True
        )
        for rows, keys in parts
    ]
    grads = [torch.cat(x, 1) for x in zip(*results, strict=True)]
    return [x[0] for x in grads] if packed else grads
