"""One way to run a training job: everything that the planner chooses, and the job that it chooses for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_loong.config import LoongConfig
from megatron_loong.planner.hardware import Hardware
from megatron_loong.planner.links import Site
from megatron_loong.planner.model import ModelShape
from megatron_loong.planner.traffic import AttentionShape

RECOMPUTE = ("none", "selective", "full")
"""`selective` is Selective Checkpoint++: everything but the attention is run again."""


class ZeroSizes(NamedTuple):
    """Over how many data x context ranks the states are sharded; 1: every rank holds a copy."""

    params: int = 1
    grads: int = 1
    optimizer: int = 1


NO_ZERO = ZeroSizes()


@dataclass(frozen=True)
class Limits:
    """What the user has decided already; None: the planner decides."""

    tensor: int | None = None
    pipeline: int | None = None
    context: int | None = None
    expert: int | None = None
    head_parallel: int | None = None
    recompute: str | None = None


@dataclass(frozen=True)
class Workload:
    """The job. Raises `ValueError` from the constructor, naming the flag."""

    model: ModelShape
    gpus: int
    seq_len: int
    global_batch_size: int
    """Sequences of one optimizer step."""
    micro_batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("gpus", "seq_len", "global_batch_size", "micro_batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be a whole number of at least 1")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of "
                f"--micro-batch-size {self.micro_batch_size}"
            )


@dataclass(frozen=True)
class Candidate:
    """Sizes that multiply to the number of GPUs, the layout of the attention, and the switches for memory."""

    tensor: int
    pipeline: int
    data: int
    attention: LoongConfig
    """Its `context_parallel_size` is the fourth factor."""
    recompute: str = "selective"
    zero: ZeroSizes = NO_ZERO
    expert: int = 1
    """Expert-parallel size, inside TP x data x context ranks: experts are not cut by TP."""
    tiled_mlp: bool = False
    tiled_logits: bool = False
    offload: bool = False
    """The inputs of recomputed layers wait in host memory."""
    offload_attention: bool = False
    """So does what Selective Checkpoint++ keeps."""

    @property
    def context(self) -> int:
        """Context-parallel size."""
        return self.attention.context_parallel_size

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return self.tensor * self.pipeline * self.data * self.context

    def leaner(self, work: Workload) -> Iterator[Candidate]:
        """This; with the loss in tiles; the MLP too; with the inputs of recomputed layers on the host; all they keep.

        Experts are not tiled: the plugin refuses it.
        """
        yield self
        yield (lean := dataclasses.replace(self, tiled_logits=True))
        if not work.model.num_experts:
            yield (lean := dataclasses.replace(lean, tiled_mlp=True))
        if self.recompute != "none":
            yield (lean := dataclasses.replace(lean, offload=True))
        if self.recompute == "selective":
            yield dataclasses.replace(lean, offload_attention=True)

    def layers(self, work: Workload) -> int:
        """Layers of one pipeline stage."""
        return work.model.num_layers // self.pipeline

    def micro_batches(self, work: Workload) -> int:
        """Micro-batches that one pipeline runs in a step."""
        return work.global_batch_size // (work.micro_batch_size * self.data)

    def local_tokens(self, work: Workload) -> int:
        """Tokens of one micro-batch on one context-parallel rank."""
        return work.seq_len * work.micro_batch_size // self.context

    def layer_params(self, work: Workload) -> tuple[float, float]:
        """Of one layer on one rank before any ZeRO: (all but the experts, the experts)."""
        model = work.model
        if not model.num_experts:
            return model.layer_params / self.tensor, 0.0
        experts = model.num_experts * model.expert_params
        return (model.layer_params - experts) / self.tensor, experts / self.expert

    def stage_params(self, work: Workload, ranks: int = 1) -> float:
        """Parameters of one rank of a pipeline stage, spread over so many data x context ranks; an embedding on the
        first and on the last. Copies of an expert are fewer than those of the rest."""
        dense, experts = self.layer_params(work)
        tables = work.model.embedding_params * (2 if self.pipeline == 1 else 1) / self.tensor
        copies = max(1.0, ranks * self.tensor / self.expert) if ranks > 1 else 1.0
        return (self.layers(work) * dense + tables) / ranks + self.layers(work) * experts / copies

    def attention_shape(self, work: Workload) -> AttentionShape:
        """The attention of one layer as one TP rank sees it; KV heads fewer than TP ranks are copied, as Megatron
        does."""
        model = work.model
        return AttentionShape(
            work.seq_len,
            model.num_attention_heads // self.tensor,
            max(1, model.num_query_groups // self.tensor),
            model.head_dim,
            batch=work.micro_batch_size,
        )

    def site(self, hardware: Hardware) -> Site:
        """Where a context-parallel group stands: TP ranks are neighbours, CP ranks follow (Megatron's order)."""
        in_node = max(1, min(self.context, hardware.gpus_per_node // self.tensor))
        while self.context % in_node:
            in_node -= 1
        return Site(hardware, in_node, self.tensor)
