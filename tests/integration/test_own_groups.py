"""Users who bring their own process groups never call `initialize_model_parallel`: the first layer builds ours."""

from __future__ import annotations

import types

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

from tests.dense import dense_attention
from tests.multi_rank.pool import WorkerPool

CP_GROUPS = ([0, 1, 2, 3], [4, 5])


def build_and_attend(rank: int) -> list[str]:
    """Two layers on each of two context-parallel groups, met by their members alone; what the user would see."""
    members = next((group for group in CP_GROUPS if rank in group), None)
    if members is None:
        return []  # ranks 6 and 7 know nothing of it, and nobody waits for them
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_loong import shard_sequence
    from megatron_loong.integration import install, runtime, uninstall
    from megatron_loong.integration.core_attention import LoongCoreAttention

    cp = len(members)
    install({"context_parallel_impl": "loong", "loong_head_parallel_size": 2})
    try:
        one = dist.new_group([rank], use_local_synchronization=True)
        mine = dist.new_group(members, use_local_synchronization=True)
        config = TransformerConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            context_parallel_size=cp,
            attention_dropout=0.0,
            use_cpu_initialization=True,
        )
        spec = get_gpt_layer_local_spec().submodules.self_attention
        collection = types.SimpleNamespace(cp=mine, tp=one)
        layers = [
            build_module(spec, config=config, layer_number=number, pg_collection=collection).core_attention
            for number in (1, 2)
        ]
        assert all(type(layer) is LoongCoreAttention for layer in layers)
        assert layers[0].groups is layers[1].groups and len(runtime.active().groups) == 1

        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 8 * cp, 4, 8, dtype=torch.float64) for _ in range(3))
        local = [shard_sequence(x, layers[0].groups).transpose(0, 1) for x in (q, k, v)]
        out = layers[0](*local, None, attn_mask_type=AttnMaskType.causal)
        expected = shard_sequence(dense_attention(q, k, v, causal=True), layers[0].groups).transpose(0, 1).flatten(2)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        runtime.active().groups.release()
        assert len(runtime.active().groups) == 1  # kept: see GroupCache.release
        return sorted(runtime.active()._said)
    finally:
        uninstall()


def test_the_first_layer_builds_groups_with_its_members_alone() -> None:
    # Workers of its own: the user's groups below leave torch's count of groups different on every rank.
    pool = WorkerPool()
    try:
        said = pool.run(build_and_attend)
        assert said[0][0] == "2D-Attention: cp 4 = head 2 x ring 2 (outer 1 x inner 2), placement head_first, zigzag"
        assert said[4][0] == "2D-Attention: cp 2 = head 2 x ring 1 (outer 1 x inner 1), placement head_first, zigzag"
        assert said[0][1].startswith("attention kernel ") and said[6] == []
        # Once more in the same world, after uninstall: made anew, and not mistaken for the old ones.
        assert pool.run(build_and_attend) == said
    finally:
        pool.stop()
