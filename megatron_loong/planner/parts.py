"""In how many parts an attention goes through: for costing what `schedule.parts` decides for running."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from megatron_loong.config import LoongConfig
from megatron_loong.planner.links import Site
from megatron_loong.planner.traffic import AttentionShape
from megatron_loong.schedule.parts import Queries, parts_of_heads, parts_of_sequence


class Parts(NamedTuple):
    """Of heads and of the sequence; one of them is 1."""

    heads: int
    sequence: int

    @property
    def count(self) -> int:
        """All of them."""
        return self.heads * self.sequence

    def shape(self, whole: AttentionShape) -> AttentionShape:
        """The shape of one part of the heads."""
        return replace(whole, heads=whole.heads // self.heads, kv_heads=whole.kv_heads // self.heads)


def parts_of(config: LoongConfig, shape: AttentionShape, site: Site) -> Parts:
    """What `attention_2d` does unless told otherwise."""
    hp = config.head_parallel_size
    if hp == 1:
        return Parts(1, 1)
    between = site.cp_ranks_in_node < config.context_parallel_size
    rows = shape.batch * shape.seq_len // config.ring_size * (shape.heads // hp)
    row_bytes = max(shape.head_dim, shape.value_dim) * shape.dtype_bytes
    queries = Queries(rows, row_bytes, gpu=not site.hardware.message_busy_s, between_nodes=between)
    heads = parts_of_heads(shape.kv_heads // hp, queries) if shape.kv_heads % hp == 0 else 1
    halved = heads == 1 and config.ring_size == 1 and shape.causal and config.sequence_layout == "zigzag"
    return Parts(heads, parts_of_sequence(queries, shape.seq_len // config.sequence_multiple) if halved else 1)
