"""Selective Checkpoint++ and activation offload inside Megatron's full recomputation.

`tensor_parallel.random.CheckpointFunction` is looked up at every call of `tensor_parallel.checkpoint`, through which
uniform, block and MTP recomputation go. What stands in its place hands Megatron's own class a function that records
in its first run and replays in its second; the class itself does the rest, RNG states and distribution included.
Under fp8 and fp4 Megatron takes TransformerEngine's checkpoint (`te_checkpoint`), which runs a function twice in the
same way and brings back its autocast for the second run; it is handed the same function.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from megatron_loong.attention.stash import Level
from megatron_loong.integration.memory_options import check_recompute, layers_of
from megatron_loong.integration.options import LoongOptions
from megatron_loong.recompute.offload import Parking, inputs_wait_in
from megatron_loong.recompute.selective import StashedFunction


class RecomputeState:
    """What the checkpoints of one installation share: where offloaded tensors wait."""

    def __init__(self) -> None:
        self.offload_attention = False
        self.offload_inputs = False
        self.attention_parking = Parking()
        self.input_parking = Parking()

    def note(self, options: LoongOptions) -> None:
        """Remember what a layer under construction asks of the checkpoints around it."""
        self.offload_attention = options.loong_offload_attention
        self.offload_inputs = options.loong_offload_activations

    def stashed(self, function: Callable[..., Any]) -> StashedFunction:
        """A checkpointed function that records in its first run and replays in its second."""
        return StashedFunction(function, *([self.attention_parking.lot().park] if self.offload_attention else []))

    def saving(self, args: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
        """Around a checkpoint of `args`: where it keeps them."""
        return inputs_wait_in(self.input_parking.lot(), args) if self.offload_inputs else _AS_IT_IS


def level_of_layer(options: LoongOptions, config: object, layer_number: int) -> Level:
    """How much of the attention of one layer a checkpoint keeps; `ValueError` when nothing is recomputed at all."""
    check_recompute(options, config)
    if layer_number not in layers_of(options.loong_selective_checkpoint, "--loong-selective-checkpoint"):
        return "nothing"
    return "exchange" if layer_number in layers_of(options.loong_keep_exchange, "--loong-keep-exchange") else "ring"


def checkpoint_function(state: RecomputeState, original: Any) -> type:
    """A class to stand where `original` (Megatron's `CheckpointFunction`) stood."""

    class LoongCheckpointFunction(original):
        """Megatron's checkpoint of a function that keeps attention's results, and whose inputs may wait on the host."""

        @classmethod
        def apply(cls, run_function: Callable[..., Any], distribute_saved_activations: Any, *args: Any) -> Any:
            with state.saving(args):
                return original.apply(state.stashed(run_function), distribute_saved_activations, *args)

    return LoongCheckpointFunction


def te_checkpoint(state: RecomputeState, original: Callable[..., Any]) -> Callable[..., Any]:
    """What stands where `original` (Megatron's call of TransformerEngine's checkpoint) stood."""

    @functools.wraps(original)
    def checkpoint(
        forward_func: Callable[..., Any], distribute: Any, rng_tracker: Any, tp_group: Any, *args: Any, **kwargs: Any
    ) -> Any:
        with state.saving(args):
            return original(state.stashed(forward_func), distribute, rng_tracker, tp_group, *args, **kwargs)

    return checkpoint


_AS_IT_IS: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
