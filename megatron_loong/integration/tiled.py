"""Tiled loss and tiled MLP inside Megatron's models.

Between a GPTModel's head and its loss lies only a call of `output_layer`, whose result goes to
`compute_language_model_loss`, once for the model and once per MTP depth. During a forward with labels the head
returns `PendingLogits`, a promise that the loss redeems tile by tile.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_loong.integration.options import LoongOptions
from megatron_loong.recompute.tiled import tiled
from megatron_loong.recompute.tiled_loss import tiled_cross_entropy

#: What an installed plugin answers for a TransformerConfig.
OptionsOf = Callable[[Any], LoongOptions]


@dataclass(frozen=True)
class PendingLogits:
    """`scale * hidden @ weight.T`, not computed; [s, b, v] if it were."""

    hidden: torch.Tensor
    """[s, b, n], of the whole sequence of a tensor-parallel group."""
    weight: torch.Tensor
    """[v, n]: this rank's part of the vocabulary."""
    tp_group: Any
    scale: float = 1.0

    def __mul__(self, factor: float) -> PendingLogits:
        """MuP scales logits."""
        return replace(self, scale=self.scale * factor)

    __rmul__ = __mul__

    def losses(self, labels: torch.Tensor, tile: int) -> torch.Tensor:
        """[b, s] for labels [b, s], as `compute_language_model_loss`."""
        group = self.tp_group if self.tp_group is not None and self.tp_group.size() > 1 else None
        losses = tiled_cross_entropy(
            self.hidden, self.weight, labels.t().contiguous(), tile=tile, tp_group=group, logit_scale=self.scale
        )
        return losses.t().contiguous()


def model_forward(options_of: OptionsOf, original: Callable[..., Any]) -> Callable[..., Any]:
    """`GPTModel.forward` whose head promises its logits where there are labels to make a loss of."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        tile = options_of(self.config).loong_tiled_loss
        if not tile or given.get("labels") is None or not getattr(self, "post_process", False):
            return original(self, *args, **kwargs)
        head = self.output_layer
        _refuse_head(self, head, given)
        head.forward = functools.partial(_promise, head)
        try:
            return original(self, *args, **kwargs)
        finally:
            del head.forward  # the class's own is found again

    return forward


def _promise(
    head: Any, hidden: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
) -> tuple[PendingLogits, None]:
    """In the place of `ColumnParallelLinear.forward`: the same regions around hidden, and no product."""
    group = head.tp_group
    if head.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
    return PendingLogits(hidden, head.weight if weight is None else weight, group), None


def _refuse_head(model: Any, head: Any, given: dict[str, Any]) -> None:
    reason = None
    if given.get("output_processor") is not None:
        reason = "an output processor, which may want the logits,"
    elif getattr(model.config, "defer_embedding_wgrad_compute", False):
        reason = "--defer-embedding-wgrad-compute"
    elif given.get("runtime_gather_output") or getattr(head, "gather_output", False):
        reason = "a head that gathers the vocabulary"
    elif getattr(head, "bias", None) is not None:
        reason = "a head with a bias"
    if reason:
        raise NotImplementedError(
            f"--loong-tiled-loss does not work with {reason} yet; supported: a vocabulary-parallel head without bias "
            "in bf16, fp16 or fp32 (or leave --loong-tiled-loss out)"
        )


def language_model_loss(options_of: OptionsOf, original: Callable[..., Any]) -> Callable[..., Any]:
    """`LanguageModule.compute_language_model_loss` that redeems a promise; logits that exist are an error."""

    @functools.wraps(original)
    def compute_language_model_loss(self: Any, labels: torch.Tensor, logits: Any) -> torch.Tensor:
        tile = options_of(self.config).loong_tiled_loss
        if isinstance(logits, PendingLogits):
            return logits.losses(labels, tile)
        if tile:
            raise NotImplementedError(
                f"--loong-tiled-loss is not in effect in {type(self).__name__}, which computed all logits; supported: "
                "GPTModel (or leave --loong-tiled-loss out)"
            )
        return original(self, labels, logits)

    return compute_language_model_loss


def acceptance_counts(options_of: OptionsOf, original: Callable[..., Any]) -> Callable[..., Any]:
    """0.19 logs how often an MTP head's best token is right: counted tile by tile, from logits made for it."""

    @functools.wraps(original)
    def counts(logits: Any, labels: torch.Tensor, loss_mask: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(logits, PendingLogits):
            return original(logits, labels, loss_mask, *args, **kwargs)
        correct = total = None
        tile = max(1, 1024 // labels.shape[0])
        with torch.no_grad():
            for start in range(0, labels.shape[1], tile):
                rows = slice(start, start + tile)
                part = logits.hidden[rows] @ logits.weight.t()
                found = original(part, labels[:, rows], loss_mask[:, rows], *args, **kwargs)
                correct, total = found if correct is None else (correct + found[0], total + found[1])
        return correct, total

    return counts


def mlp_forward(options_of: OptionsOf, original: Callable[..., Any]) -> Callable[..., Any]:
    """`MLP.forward` over tiles of its rows; subclasses with a forward of their own are not reached, nor experts."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tiles = options_of(self.config).loong_tiled_mlp
        if not tiles or args or any(value is not None for value in kwargs.values()):
            return original(self, hidden_states, *args, **kwargs)
        bias: list[torch.Tensor | None] = [None]

        def rows(x: torch.Tensor) -> torch.Tensor:
            out, bias[0] = original(self, x)
            return out

        return tiled(rows, hidden_states, list(self.parameters()), tiles), bias[0]

    return forward
