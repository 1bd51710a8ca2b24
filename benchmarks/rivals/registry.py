"""Who takes part on a given number of ranks, and who cannot, with the reason."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from benchmarks.rivals.interface import Contestant, Shape
from benchmarks.rivals.internevo import InternEvoDoubleRing
from benchmarks.rivals.others import DeepSpeedUlysses, RingFlashAttn, YunchangUlysses, YunchangUSP
from benchmarks.rivals.ours import ComputeAlone, Loong
from benchmarks.rivals.torch_cp import TorchContextParallel
from megatron_loong.config import LoongConfig, divisors

#: Implementations without an adapter, whatever the shape.
NO_ADAPTER = {
    "TransformerEngine (Megatron's own CP)": "needs a GPU",
    "MagiAttention": "its engine needs a GPU",
    "ring-flash-attn llama3 and basic": "no adapter: not balanced, up to 1.75 times the work on one of 4 ranks",
    "axolotl-ringmaster": "no adapter: its rings live inside transformers' attention interface",
    "ring-attention-pytorch": "no adapter: its own naive kernel, so not the same work",
}


def all_contestants(world_size: int) -> list[Contestant]:
    """Every contestant for a world of `world_size` ranks: our layouts first, then the rivals."""
    n = world_size
    ours = [
        Loong(LoongConfig(n, hp, w, placement))
        for placement in ("head_first", "context_first")
        for hp in divisors(n)
        for w in divisors(n // hp)
        # A ring of inner rings of one is the single ring over again; head parallel 1 and n have one placement.
        if (w > 1 or hp == n) and (placement == "head_first" or 1 < hp < n)
    ]
    usp = [YunchangUSP(n, u, first) for u in divisors(n) if 1 < u < n for first in (True, False)]
    ring = [TorchContextParallel(n, rotation) for rotation in ("all-gather", "all-to-all")]
    internevo = [InternEvoDoubleRing(n, u, w) for u in divisors(n) for w in divisors(n // u) if 1 < w < n // u]
    return [
        ComputeAlone(n),
        *ours,
        *usp,
        YunchangUlysses(n),
        DeepSpeedUlysses(n),
        RingFlashAttn(n),
        *ring,
        *internevo,
    ]


def choose(
    world_size: int, shape: Shape, patterns: Sequence[str] = ("*",)
) -> tuple[list[Contestant], list[tuple[str, str]]]:
    """(those whose name matches a pattern and that can run, (name, reason) of the others).

    Patterns are those of a shell. Raises `ValueError` when one of them matches nobody.
    """
    everyone = all_contestants(world_size)
    names = [one.name for one in everyone]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"--only {pattern!r} matches nobody; there are: {'; '.join(names)}")
    wanted = [one for one in everyone if any(fnmatch.fnmatch(one.name, pattern) for pattern in patterns)]
    reasons = {one.name: one.why_not(shape) for one in wanted}
    left_out = [(name, reason) for name, reason in reasons.items() if reason is not None]
    return [one for one in wanted if reasons[one.name] is None], [*left_out, *NO_ADAPTER.items()]
