"""How a kernel's k and v are made from the rows of a KV block, and the block's gradient from theirs."""

from __future__ import annotations

import functools
from typing import Protocol

import torch

from megatron_loong.attention.merge import accumulator_dtype


class Expansion(Protocol):
    """From rows that travel to the k, v that a kernel takes, and back; both [b, s, heads, d]."""

    def expand(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v for the kernel, of some rows of a block."""
        ...

    def reduce(
        self, dk: torch.Tensor, dv: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The adjoint of `expand`: gradients of the rows k, v from those of what the kernel took, float32 or wider."""
        ...


class PlainHeads:
    """The block as it is, or, where the kernel's own rule does not fit, one KV head per query head."""

    def __init__(self, places: tuple[int, ...] | None) -> None:
        # A kernel has query head i read KV head i // (h // g). Where a rank's query heads begin or end in the middle of
        # a KV head's readers that would be wrong; with a copy of its KV head for each query head it is right.
        self._places = places
        """`HeadShares.kv_of_query`."""

    def expand(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """KV heads [..., g, d] -> [..., h, d] where places are given."""
        if self._places is None:
            return k, v
        places = _index(self._places, k.device)
        return k.index_select(-2, places), v.index_select(-2, places)

    def reduce(
        self, dk: torch.Tensor, dv: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the query heads of each KV head."""
        if self._places is None:
            return dk, dv
        places = _index(self._places, dk.device)
        wide = accumulator_dtype(k.dtype)
        dk, dv = (
            torch.zeros(x.shape, dtype=wide, device=x.device).index_add_(-2, places, grad.to(wide))
            for x, grad in ((k, dk), (v, dv))
        )
        return dk, dv


class LatentHeads:
    """Multi-latent attention: the latent travels, and is expanded where it is attended to.

    k of the block is the latent [b, s, 1, r], v its part of k that carries the position [b, s, 1, d_rope].
    DeepSeek-V2 (arXiv 2405.04434) section 2.1: k = [W_k latent, k_rope], v = W_v latent.
    """

    def __init__(self, weight: torch.Tensor, value_dim: int) -> None:
        self._weight = weight
        """[h, d_nope + dv, r]: the up-projection of this rank's heads."""
        self._nope = weight.shape[1] - value_dim
        self.weight_gradient = torch.zeros(weight.shape, dtype=accumulator_dtype(weight.dtype), device=weight.device)
        """Sum over all rows that were reduced."""

    def expand(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latent and k_rope -> k [b, s, h, d_nope + d_rope], v [b, s, h, dv]."""
        # Expanded for one tile at a time, and forgotten after it: keys and values of all heads never exist for more
        # than a tile, and the backward pass expands them again.
        up = torch.einsum("bsr,her->bshe", k.squeeze(2), self._weight)
        rope = v.expand(-1, -1, up.shape[2], -1)
        return torch.cat([up[..., : self._nope], rope], -1), up[..., self._nope :]

    def reduce(
        self, dk: torch.Tensor, dv: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of latent and k_rope; adds to that of the weight."""
        # k = [W_k latent, k_rope] for every head, so k_rope's gradient is a sum over the heads.
        wide = self.weight_gradient.dtype
        up = torch.cat([dk[..., : self._nope], dv], -1).to(wide)
        self.weight_gradient += torch.einsum("bshe,bsr->her", up, k.squeeze(2).to(wide))
        latent = torch.einsum("bshe,her->bsr", up, self._weight.to(wide)).unsqueeze(2)
        return latent, dk[..., self._nope :].to(wide).sum(2, keepdim=True)


@functools.lru_cache(maxsize=64)
def _index(places: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64, made once: making it stops the host until the device has it."""
    return torch.tensor(places, device=device)
