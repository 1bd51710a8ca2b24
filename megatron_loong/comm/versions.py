"""The versions that must be equal on all ranks, for two versions may send other messages in another order."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import megatron_loong


def versions() -> str:
    """What this rank says to the others."""
    return f"megatron_loong {megatron_loong.__version__}, torch {torch.__version__}"


def check_versions(by_rank: Mapping[int, str]) -> None:
    """Raise the same error on every rank if two ranks, which may be on different nodes, run different code."""
    ranks: dict[str, list[int]] = {}
    for rank, said in by_rank.items():
        ranks.setdefault(said or "an older megatron_loong", []).append(rank)
    if len(ranks) > 1:
        *few, (common, rest) = sorted(ranks.items(), key=lambda item: len(item[1]))
        named = [f"{said} on rank{'s' * (len(who) > 1)} {', '.join(map(str, who))}" for said, who in few]
        raise ValueError(
            f"the ranks run different versions: {'; '.join(named)}; {common} on the other {len(rest)} (rank {rest[0]} "
            "among them); install the same versions on every node"
        )
