"""Compositions of Megatron's flags, drawn by a seed: the generator behind test_drawn.py. No tests and no Megatron.

matrix.py meets each value, or each pair of values, of a few axes; here is a draw from all of them at once.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

#: What is computed. Axis -> value -> flags of both runs; the first value is what most models have, and drawn most.
MODEL: dict[str, dict[str, str]] = {
    "heads": {"gqa": "", "mha": "--num-query-groups 8", "mqa": "--num-query-groups 1"},
    "window": {
        "": "",
        "window": "--window-size 11,0",
        "window-skip": "--window-size 11,0 --window-attn-skip-freq 2",
    },
    "sinks": {"": "", "off-by-one": "--softmax-type off-by-one", "sinks": "--softmax-type learnable"},
    "experts": {
        "": "",
        "moe": "--num-experts 4 --moe-router-topk 2",
        "moe-aux": "--num-experts 4 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1",
        "moe-seq-aux": "--num-experts 4 --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.1",
    },
    "mtp": {
        "": "",
        "mtp1": "--mtp-num-layers 1 --mtp-loss-scaling-factor 1.0",
        "mtp2": "--mtp-num-layers 2 --mtp-loss-scaling-factor 1.0",
    },
    # unequal: on data whose tokens with loss lie in one eighth of a sequence; packs: prompts have no loss.
    "text": {"": "", "unequal": "--eod-mask-loss", "packs": "--sft"},
    "loss": {"": "", "per-token": "--calculate-per-token-loss"},
    "length": {"": "", "48": "--seq-length 48", "30": "--seq-length 30", "63": "--seq-length 63"},
    "batch": {"": "", "mb2": "--micro-batch-size 2"},
    # Without momentum, so that a run may begin anywhere; this Adam is SGD but for large gradients.
    "optimizer": {"": "--sgd-momentum 0", "adam": "--optimizer adam --adam-beta1 0 --adam-beta2 0 --adam-eps 1"},
}

_CP, _HP = "--context-parallel-size", "--loong-head-parallel-size"

#: How it is divided. Flags of the drawn run alone.
DIVISION: dict[str, dict[str, str]] = {
    "tensor": {"": "", "tp2": "--tensor-model-parallel-size 2"},
    "pipeline": {
        "": "",
        "pp2": "--pipeline-model-parallel-size 2",
        "vpp2": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    },
    "data": {"": "", "dp2": ""},
    "expert": {"": "", "ep2": "--expert-model-parallel-size 2"},
    "states": {"": "", "sharded": "--use-distributed-optimizer"},
    "recompute": {
        "": "",
        "selective": "--recompute-granularity selective",
        "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "sc++": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
        "--loong-selective-checkpoint all",
    },
    "layout": {
        "r2": f"{_CP} 2 {_HP} 1",
        "h2": f"{_CP} 2 {_HP} 2",
        "h4": f"{_CP} 4 {_HP} 4",
        "r4": f"{_CP} 4 {_HP} 1 --loong-inner-ring-size 4",
        "r2x2": f"{_CP} 4 {_HP} 1 --loong-inner-ring-size 2",
        "h2r2": f"{_CP} 4 {_HP} 2",
        "h2r2-context-first": f"{_CP} 4 {_HP} 2 --loong-placement context_first",
        "r2x2-outer-first": f"{_CP} 4 {_HP} 1 --loong-inner-ring-size 2 --loong-placement outer-inner-head",
        "h2r2x2": f"{_CP} 8 {_HP} 2 --loong-inner-ring-size 2",
        "h2r2x2-inner-first": f"{_CP} 8 {_HP} 2 --loong-inner-ring-size 2 --loong-placement inner-head-outer",
    },
}
AXES = {**MODEL, **DIVISION}
GLOBAL_BATCH = 4


@dataclass(frozen=True)
class Composition:
    """One value of each axis, in the order of `AXES`."""

    values: tuple[str, ...]

    def __getitem__(self, axis: str) -> str:
        return self.values[list(AXES).index(axis)]

    def __str__(self) -> str:
        return "-".join(value for value in self.values if value)

    def flags(self, axes: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
        """The flags of these axes."""
        return tuple(word for axis, values in axes.items() for word in values[self[axis]].split())

    def _number(self, flag: str, otherwise: int = 1) -> int:
        flags = self.flags(AXES)
        return int(flags[flags.index(flag) + 1]) if flag in flags else otherwise

    @property
    def data_parallel(self) -> int:
        """DP."""
        return 2 if self["data"] else 1

    @property
    def world_size(self) -> int:
        """TP x PP x DP x CP."""
        sizes = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", _CP)
        return math.prod(self._number(size) for size in sizes) * self.data_parallel

    def problem(self) -> str | None:
        """Why Megatron, or this package, does not run it on a CPU; None where it does."""
        tp, cp = self._number("--tensor-model-parallel-size"), self._number(_CP)
        rows = self._number("--micro-batch-size") * self.data_parallel
        reasons = {
            "Megatron trains MoE with TP only with --sequence-parallel, which needs a GPU": self["experts"] and tp > 1,
            "no experts to divide": self["expert"] and not self["experts"],
            "padding beside MoE is refused": self["experts"] and self._number("--seq-length", 64) % (2 * cp),
            "a packed micro-batch is one row": self["text"] == "packs" and self["batch"],
            "a stage in the middle of a pipeline reads no batch, and so no documents": self["text"] == "packs"
            and self["pipeline"] == "vpp2",
            "the distributed optimizer knows only Adam": self["states"] and not self["optimizer"],
            "Adam is here for the distributed optimizer": self["optimizer"] and not self["states"],
            "interleaving needs a multiple of PP micro-batches": self["pipeline"] == "vpp2"
            and GLOBAL_BATCH // rows % 2,
            "--loong-head-parallel-size is more than the heads of a TP rank": self._number(_HP) > 8 // tp,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)


def composition(**values: str) -> Composition:
    """The first value of every axis that is not named."""
    return Composition(tuple(values.pop(axis, next(iter(choices))) for axis, choices in AXES.items()))


def draw(seed: int, largest_world: int) -> Composition:
    """A composition that runs on 2 to `largest_world` ranks; the same for a seed wherever it is drawn.

    >>> draw(0, 4) == draw(0, 4) != draw(1, 4)
    True
    """
    source = random.Random(seed)
    while True:
        values = []
        for choices in AXES.values():
            first, *others = choices
            # Two axes in five leave the usual: enough to meet each other, few enough that a draw often runs.
            values.append(source.choice(others) if source.random() < 0.4 else first)
        drawn = Composition(tuple(values))
        if drawn.world_size <= largest_world and drawn.problem() is None:
            return drawn


def varied(seeds: Iterable[int], largest_world: int, count: int) -> list[int]:
    """So many of these seeds whose compositions meet, together, many pairs of values: greedy."""
    pairs = {
        seed: set(itertools.combinations(zip(AXES, draw(seed, largest_world).values, strict=True), 2)) for seed in seeds
    }
    chosen: list[int] = []
    met: set[object] = set()
    while len(chosen) < count:
        best = max(pairs, key=lambda seed: len(pairs[seed] - met))
        chosen.append(best)
        met |= pairs.pop(best)
    return chosen
