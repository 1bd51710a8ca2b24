"""The table behind test_matrix.py: what a recipe is made of, which combinations exist, and which of them to run.

No tests and no Megatron in here: arithmetic on names, so that the choice of cases can itself be tested.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

#: Axis -> value -> flags. The product of the sizes in them, times data parallel, is the number of ranks.
AXES: dict[str, dict[str, str]] = {
    "tensor": {"tp1": "", "tp2": "--tensor-model-parallel-size 2"},
    "pipeline": {
        "pp1": "",
        "pp2": "--pipeline-model-parallel-size 2",
        "vpp2": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    },
    "data": {"dp1": "", "dp2": ""},
    "optimizer": {
        # SGD, for Adam forgives a gradient that is wrong by a factor; sharded optimizers know only Adam.
        "sgd": "",
        "distributed": "--use-distributed-optimizer --optimizer adam --lr 1e-3",
        "instances2": "--use-distributed-optimizer --num-distributed-optimizer-instances 2 --optimizer adam --lr 1e-3",
    },
    "model": {
        "dense": "",
        "weighted": "--calculate-per-token-loss --eod-mask-loss",  # on data whose real tokens lie unevenly
        "moe-ep2": "--num-experts 4 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall",
        "moe-etp2": "--num-experts 4 --expert-tensor-parallel-size 2",
        "moe-aux": "--num-experts 4 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01",
        "mla": "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 "
        "--v-head-dim 8",
        "mtp": "--mtp-num-layers 1",
    },
    "layout": {
        "head2": "--context-parallel-size 2 --loong-head-parallel-size 2",
        "ring2": "--context-parallel-size 2 --loong-head-parallel-size 1",
        "head2-ring2": "--context-parallel-size 4 --loong-head-parallel-size 2",
        "double-ring": "--context-parallel-size 4 --loong-head-parallel-size 1 --loong-inner-ring-size 2",
        "context-first": "--context-parallel-size 4 --loong-head-parallel-size 2 --loong-placement context_first",
    },
}

#: Flags of an axis that a one-rank run has to leave out: how a model is divided is not what it computes.
DIVISION = ("--expert-model-parallel-size", "--expert-tensor-parallel-size")


@dataclass(frozen=True)
class Recipe:
    """One value of each axis."""

    tensor: str
    pipeline: str
    data: str
    optimizer: str
    model: str
    layout: str

    def __str__(self) -> str:
        return "-".join(vars(self).values())

    @property
    def flags(self) -> list[str]:
        """Everything but `--context-parallel-impl loong`."""
        return [word for axis, value in vars(self).items() for word in AXES[axis][value].split()]

    @property
    def world_size(self) -> int:
        """TP x PP x DP x CP."""
        sizes = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size")
        flags = self.flags
        return math.prod(int(flags[flags.index(size) + 1]) for size in sizes if size in flags) * int(self.data[2:])

    @property
    def reference_flags(self) -> list[str]:
        """The same model and optimizer on one rank."""
        words = AXES["model"][self.model].split()
        for flag in DIVISION:
            if flag in words:
                at = words.index(flag)
                del words[at : at + 2]
        return words + ([] if self.optimizer == "sgd" else ["--optimizer", "adam", "--lr", "1e-3"])

    @property
    def divides_initialization(self) -> bool:
        """Whether Megatron draws other initial weights than on one rank."""
        return self.pipeline != "pp1" or any(flag in self.flags for flag in DIVISION)

    def problem(self) -> str | None:
        """Why Megatron does not run this on a CPU, or at all; None when it does."""
        if self.tensor != "tp1" and self.model.startswith("moe"):
            return "Megatron trains MoE with tensor parallelism only with --sequence-parallel, which needs a GPU"
        return None


def recipes(largest_world: int) -> list[Recipe]:
    """The whole product, as far as it runs, on at most `largest_world` ranks."""
    everything = (Recipe(*values) for values in itertools.product(*AXES.values()))
    return [recipe for recipe in everything if recipe.world_size <= largest_world and recipe.problem() is None]


def values_of(recipe: Recipe) -> frozenset[tuple[tuple[str, str], ...]]:
    """What a recipe shows of each axis alone."""
    return frozenset((item,) for item in vars(recipe).items())


def pairs_of(recipe: Recipe) -> frozenset[tuple[tuple[str, str], ...]]:
    """What a recipe shows of each two axes together."""
    return frozenset(itertools.combinations(vars(recipe).items(), 2))


def covering(
    candidates: Sequence[Recipe], shown_by: Callable[[Recipe], Iterable[tuple[tuple[str, str], ...]]]
) -> list[Recipe]:
    """Few recipes that show together whatever any of the candidates shows: greedy, of equals the smallest."""
    shown = {recipe: frozenset(shown_by(recipe)) for recipe in candidates}
    missing = set().union(*shown.values())
    chosen = []
    while missing:
        best = max(candidates, key=lambda recipe: (len(shown[recipe] & missing), -recipe.world_size, str(recipe)))
        chosen.append(best)
        missing -= shown[best]
    return chosen
