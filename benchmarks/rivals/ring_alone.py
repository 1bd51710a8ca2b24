"""Other people's rings as one rank sees them: their code as installed, on `local_copies` for a network.

`torch.distributed` must believe in the world: `local_copies.init_world_of_one`. Tensors are [b, s, heads, d], zigzag.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.rank_alone import rank_inputs
from benchmarks.rivals.flash_attn_stand_in import install_stand_in
from benchmarks.rivals.interface import Shape
from benchmarks.rivals.others import absent, without_hugging_face_adapters
from megatron_loong.config import CAUSAL
from megatron_loong.kernels.interface import AttentionKernel, TileRules
from megatron_loong.kernels.reference import ReferenceKernel

#: Name -> (module, function).
RINGS = {
    "ring-flash-attn zigzag": ("ring_flash_attn", "zigzag_ring_flash_attn_func"),
    "yunchang zigzag ring": ("yunchang.ring", "zigzag_ring_flash_attn_func"),
}
TRANSFORMER_ENGINE = "TransformerEngine p2p"


def rings(kernel: AttentionKernel) -> tuple[dict[str, Callable[..., torch.Tensor]], dict[str, str]]:
    """Those that can run as (q, k, v) -> output, and the reasons of the others.

    On a GPU those that want flash-attn call `kernel`, unless flash-attn is there.
    """
    found: dict[str, Callable[..., torch.Tensor]] = {}
    missing: dict[str, str] = {}
    for name, (module, function) in RINGS.items():
        reason = absent(module.split(".")[0])
        if reason:
            missing[name] = reason
            continue
        install_stand_in(kernel)
        without_hugging_face_adapters()
        found[name] = _on_the_world(getattr(import_module(module), function))
    reason = absent("transformer_engine") or (None if torch.cuda.is_available() else "needs a GPU")
    if reason:
        missing[TRANSFORMER_ENGINE] = reason
    else:
        found[TRANSFORMER_ENGINE] = _transformer_engine(torch.cuda.Stream())
    return found, missing


def error_of(
    function: Callable[..., torch.Tensor], shape: Shape, ring_rank: int, ranks: int, device: torch.device
) -> float:
    """Relative RMS error of out or dq, the larger, of a zigzag ring on `local_copies` in whose world it is.

    Every rank is taken to have the same keys and values: what the copies bring is then what a peer would have sent.
    (dk and dv come from peers whose queries are others'; `scripts/bench_attention.py` holds them to the right ones.)
    The right answer is the reference kernel's in float64, of each half of the rank over all the keys before its end.
    """
    *leaves, dout = (x.detach().transpose(0, 1).contiguous() for x in rank_inputs(shape, ranks, device))
    leaves = [x.requires_grad_() for x in leaves]
    out = function(*leaves)
    (dq,) = torch.autograd.grad(out, leaves[:1], dout)
    q, k, v, dout = (x.detach().double() for x in (*leaves, dout))
    half, rules, kernel = q.shape[1] // 2, TileRules(shape.head_dim**-0.5, CAUSAL), ReferenceKernel()
    keys, values = (torch.cat([x[:, :half]] * ranks + [x[:, half:]] * ranks, 1) for x in (k, v))
    errors = []
    for rows, chunk in ((slice(half), ring_rank), (slice(half, None), 2 * ranks - 1 - ring_rank)):
        seen = keys[:, : (chunk + 1) * half], values[:, : (chunk + 1) * half]
        right, lse = kernel.forward(q[:, rows], *seen, rules)
        grads = kernel.backward(dout[:, rows], q[:, rows], *seen, right, lse, rules, deterministic=False)
        for found, wanted in ((out[:, rows], right), (dq[:, rows], grads[0])):
            difference = (found.detach().double() - wanted).square().mean() / wanted.square().mean()
            errors.append(difference.sqrt().item())
    return max(errors, key=lambda x: float("inf") if x != x else x)


def _transformer_engine(stream: Any) -> Callable[..., torch.Tensor]:
    """Megatron's own context parallelism: the module that it builds, with `cp_comm_type="p2p"`."""
    modules: dict[tuple[int, int, int], Any] = {}

    def apply(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads, width, kv_heads = key = q.shape[2], q.shape[3], k.shape[2]
        if key not in modules:
            modules[key] = import_module("transformer_engine.pytorch").DotProductAttention(
                heads,
                width,
                num_gqa_groups=kv_heads,
                attention_dropout=0.0,
                qkv_format="bshd",
                attn_mask_type="causal",
            )
            ranks = list(range(dist.get_world_size()))
            modules[key].set_context_parallel_group(dist.group.WORLD, ranks, stream, cp_comm_type="p2p")
        return modules[key](q, k, v).unflatten(-1, (heads, width))

    return apply


def _on_the_world(function: Any) -> Callable[..., torch.Tensor]:
    def apply(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return function(q, k, v, causal=True, group=dist.group.WORLD)

    return apply
