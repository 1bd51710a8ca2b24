"""What a pack of documents costs each rank: our assignment beside plain zigzag with padding. Counted, not timed."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from megatron_loong.config import LoongConfig
from megatron_loong.layout.packing import imbalance, packed_layout
from megatron_loong.schedule.steps import ring_schedule
from megatron_loong.schedule.tiles import Mask, documents_in


@dataclass(frozen=True)
class PackCost:
    """Attention and ring traffic of one pack under one assignment; per ring rank, forward, one layer."""

    pairs: tuple[int, ...]
    """(query, key) pairs that each ring rank computes; FLOPs are 4 * head_dim per pair and head."""
    kv_rows_sent: tuple[int, ...]
    """KV rows that each ring rank sends; bytes are 2 * head_dim * dtype bytes per row and KV head."""
    tokens: int
    """Tokens of the pack, padding included."""

    @property
    def balance(self) -> float:
        """The most loaded rank over the mean."""
        return imbalance(self.pairs)


def draw_mix(rng: random.Random, tokens: int) -> tuple[int, ...]:
    """Boundaries of a long-tailed pack of `tokens`: log-normal lengths, and one in thirty a good part of the whole."""
    boundaries = [0]
    while boundaries[-1] < tokens:
        length = int(rng.lognormvariate(6.2, 1.6))
        if rng.random() < 1 / 30:
            length = int(tokens * rng.uniform(0.2, 1.0))
        boundaries.append(min(tokens, boundaries[-1] + max(1, length)))
    return tuple(boundaries)


def cost_of_ours(config: LoongConfig, documents: tuple[int, ...]) -> PackCost:
    """Causal attention over a pack as `attention_2d` runs it."""
    layout = packed_layout(config, documents)
    schedule = ring_schedule(layout, layout, Mask(right=0), config.inner_ring_size or 1)
    pairs, sent = [], []
    for rank in range(config.ring_size):
        runs = [x for run in layout.ring_runs(rank) for x in documents_in(documents, run)]
        pairs.append(sum(_triangle(stop - documents[i]) - _triangle(start - documents[i]) for i, (start, stop) in runs))
        steps = schedule.steps(rank, backward=False)
        sent.append(sum(hop.row_count for step in steps for hop in step.sends))
    return PackCost(tuple(pairs), tuple(sent), documents[-1])


def cost_of_padded_zigzag(config: LoongConfig, documents: tuple[int, ...]) -> PackCost:
    """The same with every document padded to a multiple of 2 * cp_size and cut in zigzag, as TransformerEngine has it.

    Every rank does an equal part of every document, and hands all of its KV round the whole ring.
    """
    multiple, ring = 2 * config.context_parallel_size, config.ring_size
    lengths = [-(-(b - a) // multiple) * multiple for a, b in itertools.pairwise(documents)]
    pairs = sum(map(_triangle, lengths)) // ring
    sent = (ring - 1) * sum(lengths) // ring
    return PackCost((pairs,) * ring, (sent,) * ring, sum(lengths))


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


@dataclass(frozen=True)
class Mix:
    """One drawn pack under both assignments."""

    documents: int
    longest: int
    ours: PackCost
    padded: PackCost


def draw_mixes(config: LoongConfig, mixes: int, tokens_per_rank: int) -> list[Mix]:
    """Packs with seeds 0, 1, ... and what they cost."""
    found = []
    for seed in range(mixes):
        documents = draw_mix(random.Random(seed), tokens_per_rank * config.context_parallel_size)
        longest = max(b - a for a, b in itertools.pairwise(documents))
        costs = cost_of_ours(config, documents), cost_of_padded_zigzag(config, documents)
        found.append(Mix(len(documents) - 1, longest, *costs))
    return found
