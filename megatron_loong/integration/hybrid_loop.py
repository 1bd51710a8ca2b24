"""Hooks without which Megatron's own `--hybrid-context-parallel` does not come to its first step.

Each acts only where it is asked for together with 2D-Attention, and stands aside where Megatron has been mended
(upstream pull requests 6820 and 6822, and 6816 on what is broken):

| megatron-core | what fails there | here |
|---|---|---|
| 0.18, 0.19 | sequences come as [t] without boundaries, and are wanted as [1, t] with them | `batch` |
| 0.17, 0.18 | its schedule calls `backward_step` with an argument that it no longer has | `backward_step` |
| 0.16 on | the rerun state machine refuses the scheduler's iterator | `iterator` |
| 0.16, 0.17 | on one rank, the rotary embedding takes the static group | `one_rank` |
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.rerun_state_machine import RerunDataIterator

from megatron_loong.integration.dynamic import OneRank
from megatron_loong.integration.runtime import Runtime


def _hook_batch(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    """`get_batch_on_this_tp_rank(batch, ...)` of 0.18 on: one sequence becomes a pack of one document."""

    @functools.wraps(original)
    def get_batch_on_this_tp_rank(batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tokens = batch.get("tokens")
        if state.hybrid and tokens is not None and tokens.dim() == 1:
            length = torch.tensor([len(tokens)], dtype=torch.int32, device=tokens.device)
            batch = {key: x[None] if x is not None and x.dim() == 1 else x for key, x in batch.items()}
            batch.update(cu_seqlens=torch.nn.functional.pad(length, (1, 0))[None], max_seqlen=length)
        return original(batch, *args, **kwargs)

    return get_batch_on_this_tp_rank


def _hook_iterator(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    """`iter(HybridCPDataLoaderWrapper(...))` as the rerun state machine wants it."""

    @functools.wraps(original)
    def __iter__(self: Any) -> Any:
        return RerunDataIterator(original(self)) if state.hybrid else original(self)

    return __iter__


def _hook_backward_step(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    """`backward_step(input, output, output_grad, config)`, called as when `model_type` stood before `config`."""
    taken = len(inspect.signature(original).parameters)

    @functools.wraps(original)
    def backward_step(*args: Any, **kwargs: Any) -> Any:
        if state.hybrid and len(args) == 5 and taken == 4:
            args = (*args[:3], args[4])
        return original(*args, **kwargs)

    return backward_step


def _hook_one_rank(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    """`get_batch_on_this_hybrid_cp_rank` of 0.16 and 0.17: names the one rank, and refuses what it cannot cut."""

    @functools.wraps(original)
    def get_batch_on_this_hybrid_cp_rank(batch: dict[str, Any], local_cp_size: int, *args: Any, **kwargs: Any) -> Any:
        if not state.hybrid:
            return original(batch, local_cp_size, *args, **kwargs)
        tokens = len(batch["tokens"])
        if local_cp_size > 1 and tokens % (2 * local_cp_size):
            raise ValueError(
                f"a sequence of {tokens} tokens on {local_cp_size} ranks is no multiple of {2 * local_cp_size}, which "
                "this megatron-core's --hybrid-context-parallel needs; pad the documents of a pack to a multiple of "
                "2 x data parallel x context parallel, or use megatron-core 0.18 on, where 2D-Attention pads them"
            )
        batch, params = original(batch, local_cp_size, *args, **kwargs)
        if params.cp_group is None:
            params.cp_group = OneRank()
        return batch, params

    return get_batch_on_this_hybrid_cp_rank


HOOKS: dict[str, Callable[[Runtime, Any], Any]] = {
    "hybrid_batch": _hook_batch,
    "hybrid_iterator": _hook_iterator,
    "hybrid_backward_step": _hook_backward_step,
    "hybrid_one_rank": _hook_one_rank,
}
