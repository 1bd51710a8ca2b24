"""What stands in for out when queries travel: the same delta, whatever the size of dout."""

from __future__ import annotations

import pytest
import torch

from megatron_loong.attention.double_ring import out_with_delta
from megatron_loong.attention.merge import accumulator_dtype

BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-3}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 0.0])
def test_delta_is_kept(dtype: torch.dtype, scale: float) -> None:
    """Relative to |dout| |out|, which bounds delta."""
    generator = torch.Generator().manual_seed(0)
    dout, out = (torch.randn(50, 2, 3, 64, dtype=torch.float64, generator=generator) for _ in range(2))
    dout = (scale * dout).to(dtype)
    before = dout.clone()
    delta = (dout.double() * out).sum(-1)
    found = out_with_delta(dout, delta.to(accumulator_dtype(dtype)))
    assert torch.equal(dout, before) and found.dtype == dtype and found.isfinite().all()
    error = (dout.double() * found.double()).sum(-1) - delta
    size = dout.double().norm(dim=-1) * out.norm(dim=-1)
    assert (error.abs() <= BOUNDS[dtype] * size).all(), (error.abs() / size).max()
