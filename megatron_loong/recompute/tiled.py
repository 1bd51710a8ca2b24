"""A function of independent rows, such as an MLP, run over tiles of its rows, and again in the backward.

Its activations then exist for one tile at a time (Arctic ALST's TiledMLP, arXiv 2506.13996). Parameters are inputs of
one autograd node, so each gets its gradient once, when all tiles are summed: whoever waits for gradients (Megatron's
overlapped reduction) is told once, not once per tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def tiled(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    tiles: int,
) -> torch.Tensor:
    """`function(x)`, computed over `tiles` slices of x's first dimension. Differentiable (once) in x and parameters.

    Every row of the result may depend on the same row of x alone, and the function must be free of randomness.
    `parameters` are those that it uses; their gradients are summed over tiles in float32 (float64). `ValueError` for
    fewer than one tile; more tiles than rows are as many as rows.
    """
    if tiles < 1:
        raise ValueError(f"tiles={tiles} must be at least 1")
    return _Tiled.apply(function, tiles, x, *parameters)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Any, tiles: int, x: torch.Tensor, *parameters: torch.Tensor) -> Any:
        ctx.function, ctx.tiles = function, tiles
        ctx.save_for_backward(x, *parameters)
        out = None
        for rows in _slices(x.shape[0], tiles):
            part = function(x[rows])
            if out is None:
                out = part.new_empty(x.shape[0], *part.shape[1:])
            out[rows] = part
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, *parameters = ctx.saved_tensors
        wanted = [p for p, needed in zip(parameters, ctx.needs_input_grad[3:], strict=True) if needed]
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in wanted]
        dx = torch.empty_like(x)
        for rows in _slices(x.shape[0], ctx.tiles):
            tile = x[rows].detach().requires_grad_()
            with torch.enable_grad():
                part = ctx.function(tile)
            tile_dx, *tile_grads = torch.autograd.grad(part, [tile, *wanted], grad[rows], allow_unused=True)
            del part
            dx[rows] = tile_dx
            tile_grad = None
            for total, tile_grad in zip(sums, tile_grads, strict=True):
                if tile_grad is not None:
                    total += tile_grad
            del tile_dx, tile_grads, tile_grad  # or they would live on beside the next tile's
        grads = iter([total.to(p.dtype) for total, p in zip(sums, wanted, strict=True)])
        return None, None, dx, *(next(grads) if needed else None for needed in ctx.needs_input_grad[3:])


def _slices(rows: int, tiles: int) -> list[slice]:
    step = max(1, -(-rows // tiles))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
