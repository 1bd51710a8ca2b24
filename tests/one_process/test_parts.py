"""How many parts attention goes through in is decided in one place: what runs is what the planner costs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.local_copies import LocalCopies
from benchmarks.simulate import groups_without_processes
from megatron_loong.attention.options import AttentionOptions, CallArguments
from megatron_loong.attention.prepare import prepare
from megatron_loong.config import LoongConfig
from megatron_loong.planner.links import Site
from megatron_loong.planner.parts import head_parts
from megatron_loong.planner.profiles import PROFILES
from megatron_loong.planner.traffic import AttentionShape

CPU = dataclasses.replace(PROFILES["a100"], message_busy_s=1e-3)  # processors that move messages: no GPU


@pytest.mark.parametrize(
    ("config", "shape", "nodes", "expected"),
    [
        (LoongConfig(8, 4, 2), (4096, 8, 8), 2, 2),
        (LoongConfig(8, 4, 2), (4096, 8, 8), 1, 1),
        (LoongConfig(8, 8), (8192, 8, 8), 2, 1),
        (LoongConfig(8, 8), (8192, 32, 32), 2, 4),
        (LoongConfig(8, 2, 4), (4096, 8, 2), 2, 1),
        (LoongConfig(8, 2, 4), (16384, 16, 16), 1, 2),
        (LoongConfig(8, 1, 8), (16384, 16, 16), 2, 1),
    ],
    ids=str,
)
def test_what_runs_is_what_is_costed(
    config: LoongConfig, shape: tuple[int, int, int], nodes: int, expected: int
) -> None:
    """By size, place and mask."""
    seq_len, heads, kv_heads = shape
    site = Site(CPU, config.context_parallel_size // nodes)
    assert head_parts(config, AttentionShape(*shape, 64), site) == expected

    groups = groups_without_processes(config, 0, LocalCopies)
    groups.nodes = nodes
    q, k, v = (torch.zeros(1, seq_len // 8, n, 64, dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads))
    _, call = prepare((q, k, v), groups, AttentionOptions(), CallArguments(seq_len=seq_len))
    assert call.head_parts == expected


def test_a_gpu_has_to_be_filled() -> None:
    """Parts large enough to be sent are too small to compute on."""
    config, shape = LoongConfig(8, 4, 2), AttentionShape(4096, 8, 8, 64)
    assert head_parts(config, shape, Site(PROFILES["a100"], 4)) == 1
    assert head_parts(config, dataclasses.replace(shape, seq_len=1 << 17), Site(PROFILES["a100"], 4)) == 2
