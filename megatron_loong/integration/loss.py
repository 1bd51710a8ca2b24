"""One average over all tokens of a micro-batch, where Megatron averages on each rank and then over the ranks.

Megatron divides a rank's loss by the rank's own number of tokens with loss and averages gradients over the ranks. That
is the average over all tokens only where every rank has equally many: not with packs, padding or masked prompts.
`--calculate-per-token-loss` divides once by all tokens and needs none of this; MTP's loss does with and without it
(upstream issues 3943, 7498), see `data_hooks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def sum_over(x: torch.Tensor, cp_group: Any) -> torch.Tensor:
    """`x` summed over the context-parallel group, in float32 (token counts are exact to 2^24). Collective."""
    total = x.detach().to(torch.float32, copy=True)
    dist.all_reduce(total, group=cp_group)
    return total


def weighed_by_tokens(loss_func: Callable[..., Any], cp_group: Any) -> Callable[..., Any]:
    """`loss_func` (output -> loss sum, number of tokens, report) with the loss times this rank's share of the tokens.

    Megatron's division by the rank's own number and its average over the ranks then give the average over all tokens.
    A loss function of the older kind (loss, report) averages by itself and stays as it is. Collective.
    """

    def weighed(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        results = loss_func(output, *args, **kwargs)
        if len(results) != 3:
            return results
        loss, tokens, report = results
        mean = sum_over(tokens, cp_group).clamp(min=1) / cp_group.size()
        return loss * (tokens.clamp(min=1) / mean).to(loss.dtype), tokens, report

    return weighed
