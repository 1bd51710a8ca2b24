"""In how many parts the heads go through: for costing what `schedule.parts` decides for running."""

from __future__ import annotations

from megatron_loong.config import LoongConfig
from megatron_loong.planner.links import Site
from megatron_loong.planner.traffic import AttentionShape
from megatron_loong.schedule.parts import Queries, parts_of_heads


def head_parts(config: LoongConfig, shape: AttentionShape, site: Site) -> int:
    """What `attention_2d` does unless told otherwise."""
    hp = config.head_parallel_size
    if hp == 1 or shape.kv_heads % hp:
        return 1
    between = site.cp_ranks_in_node < config.context_parallel_size
    rows = shape.batch * shape.seq_len // config.ring_size * (shape.heads // hp)
    row_bytes = max(shape.head_dim, shape.value_dim) * shape.dtype_bytes
    queries = Queries(rows, row_bytes, gpu=not site.hardware.message_busy_s, between_nodes=between)
    return parts_of_heads(shape.kv_heads // hp, queries)
