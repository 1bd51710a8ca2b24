"""Language-model head and cross-entropy over tiles of tokens, so that the logits of a sequence never exist at once.

The same idea as the tiled compute of Arctic ALST (arXiv 2506.13996) and Liger's fused linear cross-entropy (arXiv
2410.10989). Those know the gradient of a mean in the forward; Megatron weighs tokens after the loss, so here the
logits of a tile are computed again in the backward: one more product of the head, a third of its cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


def tiled_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    tile: int = 1024,
    tp_group: dist.ProcessGroup | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of every token, of logits `logit_scale * hidden @ weight.T`, in float32 (float64 for float64).

    Shapes: hidden [..., n], labels [...] (int64), weight [v, n]; returns [...]. With `tp_group`, rank r of it holds
    rows `r * v` to `(r + 1) * v` of the whole weight, every rank has the same hidden and labels, and hidden's gradient
    is this rank's part of a sum over the group, which is the caller's to take (as Megatron's regions do).
    `label_smoothing` is Megatron's, a share for all other tokens alike, over the whole vocabulary (Megatron's own takes
    the mean of each TP rank's part). `z_loss` adds `z_loss * lse ** 2`. With `softcap` logits become `softcap *
    tanh(logits / softcap)`. `tile` tokens at a time have logits: about `tile * v * (4 + itemsize)` bytes.

    Differentiable (once) in hidden and weight. Raises `ValueError` for shapes that do not fit.
    """
    if tile < 1:
        raise ValueError(f"tile={tile} must be at least 1 token")
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1] or weight.dim() != 2:
        raise ValueError(
            f"hidden [..., n], weight [v, n] and labels [...] do not fit together: "
            f"{list(hidden.shape)}, {list(weight.shape)}, {list(labels.shape)}"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 1")
    head = _Head(tile, tp_group, label_smoothing, z_loss, logit_scale, softcap)
    losses = _TiledCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), head)
    return losses.view(labels.shape)


@dataclass(frozen=True)
class _Head:
    tile: int
    tp_group: dist.ProcessGroup | None
    label_smoothing: float
    z_loss: float
    logit_scale: float
    softcap: float

    @property
    def tp_size(self) -> int:
        return 1 if self.tp_group is None else dist.get_world_size(self.tp_group)

    def first_token(self, local_vocab: int) -> int:
        return 0 if self.tp_group is None else dist.get_rank(self.tp_group) * local_vocab

    def reduce_(self, x: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        if self.tp_size > 1:
            dist.all_reduce(x, op=op, group=self.tp_group)
        return x

    def smoothing(self, vocab: int) -> float:
        """Weight of the mean over all tokens, so that a share `label_smoothing` goes to the wrong ones."""
        return self.label_smoothing * vocab / (vocab - 1) if self.label_smoothing else 0.0

    def logits(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[tile, v] in float32 or wider."""
        logits = rows @ weight.t()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.logit_scale != 1.0:
            logits.mul_(self.logit_scale)
        return logits.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else logits


class _TiledCrossEntropy(torch.autograd.Function):
    """Saves hidden, weight, labels and one lse per token; logits live for one tile, forward and backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, head: _Head) -> Any:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses, lse = (torch.empty(labels.shape, dtype=wide, device=hidden.device) for _ in range(2))
        for rows in _tiles(hidden.shape[0], head.tile):
            losses[rows], lse[rows] = _tile_forward(hidden[rows], weight, labels[rows], head)
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.head = head
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        hidden, weight, labels, lse = ctx.saved_tensors
        head: _Head = ctx.head
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=lse.dtype) if ctx.needs_input_grad[1] else None
        for rows in _tiles(hidden.shape[0], head.tile):
            d_logits = _tile_backward(hidden[rows], weight, labels[rows], lse[rows], grad[rows], head)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[rows])
            if d_weight is not None:
                # Summed in float32: a bfloat16 sum over tiles would lose what one product keeps.
                d_weight += d_logits.t() @ hidden[rows]
            del d_logits  # or it would live on beside the next tile's
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None


def _tiles(count: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, count)) for start in range(0, count, tile)]


def _tile_forward(
    rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, head: _Head
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, lse) [tile]. Two messages per tile over the TP group: the maxima, then three sums at once."""
    logits = head.logits(rows, weight)
    highest = head.reduce_(logits.amax(dim=-1), dist.ReduceOp.MAX)
    logits -= highest.unsqueeze(-1)
    here, index = _local_labels(labels, weight.shape[0], head)
    of_label = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1).masked_fill_(~here, 0.0)
    all_logits = logits.sum(dim=-1) if head.label_smoothing else torch.zeros_like(of_label)
    sums = head.reduce_(torch.stack([logits.exp_().sum(dim=-1), of_label, all_logits]))
    log_sum, of_label, all_logits = sums[0].log(), sums[1], sums[2]
    vocab = weight.shape[0] * head.tp_size
    smoothing = head.smoothing(vocab)
    loss = (1 - smoothing) * (log_sum - of_label) + smoothing * (log_sum - all_logits / vocab)
    lse = log_sum + highest
    return loss + head.z_loss * lse.square() if head.z_loss else loss, lse


def _tile_backward(
    rows: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    head: _Head,
) -> torch.Tensor:
    """Gradient of this rank's logits [tile, v] with respect to `rows @ weight.T`, in the dtype of `rows`."""
    logits = head.logits(rows, weight)
    slope = 1 - (logits / head.softcap).square_() if head.softcap else None  # of softcap * tanh(x / softcap)
    softmax = logits.sub_(lse.unsqueeze(-1)).exp_()
    if head.z_loss:
        softmax *= (1 + 2 * head.z_loss * lse).unsqueeze(-1)
    here, index = _local_labels(labels, weight.shape[0], head)
    vocab = weight.shape[0] * head.tp_size
    smoothing = head.smoothing(vocab)
    softmax.scatter_add_(-1, index.unsqueeze(-1), ((smoothing - 1) * here.to(softmax.dtype)).unsqueeze(-1))
    if smoothing:
        softmax -= smoothing / vocab
    softmax *= (grad * head.logit_scale).unsqueeze(-1)
    if slope is not None:
        softmax *= slope
    return softmax.to(rows.dtype)


def _local_labels(labels: torch.Tensor, local_vocab: int, head: _Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether a label's logit is on this rank, and its column there (0 where it is not)."""
    index = labels - head.first_token(local_vocab)
    here = (index >= 0) & (index < local_vocab)
    return here, index.masked_fill(~here, 0)
