"""Selective Checkpoint++ over real rings: bit-identical, half the ring forwards, bytes kept as the formula says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_loong import LoongConfig, attention_2d, build_groups, shard_sequence
from megatron_loong.attention import call as attention_module
from megatron_loong.attention import stash
from megatron_loong.comm.ledger import count_bytes
from megatron_loong.recompute import selective
from tests.multi_rank.pool import WorkerPool

SEQ_LEN, HEADS, KV_HEADS, WIDTH, LAYERS = 64, 8, 2, 16, 3
AXES_OF_RINGS = {"inner", "outer"}
#: Documents of 30, 1, 9, 20 and 4 tokens: the long ones are cut over the ring, the short ones dealt whole.
PACK = (0, 30, 31, 40, 60, 64)


def three_ways(
    rank: int, config: LoongConfig, dtype: torch.dtype, cu_seqlens: tuple[int, ...] | None = None
) -> dict[str, Any] | None:
    """Gradients, ring forwards, bytes sent and bytes kept, for each of `WAYS` to recompute."""
    groups = build_groups(config, range(config.context_parallel_size))
    try:
        if groups.cp_rank is None:
            return None
        torch.manual_seed(0)
        x = torch.randn(1, SEQ_LEN, HEADS * WIDTH, dtype=dtype)
        weights = [torch.randn(HEADS * WIDTH, (HEADS + 2 * KV_HEADS) * WIDTH, dtype=dtype) / 8 for _ in range(LAYERS)]

        def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            q, k, v = (x @ weight).unflatten(-1, (-1, WIDTH)).split([HEADS, KV_HEADS, KV_HEADS], dim=2)
            return x + attention_2d(q, k, v, groups, cu_seqlens=cu_seqlens, seq_len=SEQ_LEN).flatten(2)

        mine = shard_sequence(x, groups, cu_seqlens=cu_seqlens)
        return {way: _one_way(mine, weights, layer, way) for way in WAYS}
    finally:
        groups.destroy()


WAYS = ("none", "full", "ring", "exchange")


def _one_way(x: torch.Tensor, weights: list[torch.Tensor], layer: Any, way: str) -> dict[str, Any]:
    rings, kept_bytes = 0, []
    forward, add = attention_module.ring_forward, stash.Stash.add

    def counted(*args: Any) -> Any:
        nonlocal rings
        rings += 1
        return forward(*args)

    def weighed(self: Any, signature: Any, tensors: Any) -> None:
        kept_bytes.append(
            sum(n for _, n in {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors})
        )
        add(self, signature, tensors)

    attention_module.ring_forward, stash.Stash.add = counted, weighed  # type: ignore[method-assign]
    try:
        inputs = [x.clone().requires_grad_(), *(w.clone().requires_grad_() for w in weights)]
        h = inputs[0]
        with count_bytes() as sent:
            for weight in inputs[1:]:
                if way == "none":
                    h = layer(h, weight)
                elif way == "full":
                    h = torch.utils.checkpoint.checkpoint(layer, h, weight, use_reentrant=False)
                else:
                    with stash.keeping(way):  # type: ignore[arg-type]
                        h = selective.checkpoint(_at(way, layer), h, weight)
            h.float().square().sum().backward()
    finally:
        attention_module.ring_forward, stash.Stash.add = forward, add  # type: ignore[method-assign]
    return {"grads": [i.grad for i in inputs], "rings": rings, "sent": dict(sent.sent_bytes), "kept": kept_bytes}


def _at(level: Any, function: Any) -> Any:
    def run(*args: Any) -> Any:
        with stash.keeping(level):
            return function(*args)

    return run


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [LoongConfig(4, 1, 2), LoongConfig(4, 2), LoongConfig(4, 4), LoongConfig(8, 2, 2, least_rows_to_cut=4)],
    ids=LoongConfig.describe,
)
def test_selective_checkpoint(pool: WorkerPool, config: LoongConfig, dtype: torch.dtype) -> None:
    cp, hp = config.context_parallel_size, config.head_parallel_size
    numbers: dict[str, Any] = {
        "seq_len": SEQ_LEN, "batch": 1, "heads": HEADS, "value_head_dim": WIDTH, "cp_size": cp, "dtype": dtype
    }  # fmt: skip
    ring_bytes = selective.kept_bytes(**numbers)
    all_bytes = selective.kept_bytes(**numbers, qk_head_dim=WIDTH, kv_heads=KV_HEADS, head_parallel_size=hp)
    assert ring_bytes == SEQ_LEN * HEADS * WIDTH * dtype.itemsize // cp + max(4, dtype.itemsize) * SEQ_LEN * HEADS // cp
    for rank, ways in enumerate(pool.run(three_ways, config, dtype)[:cp]):
        for way in ("ring", "exchange"):
            equal = [torch.equal(a, b) for a, b in zip(ways[way]["grads"], ways["full"]["grads"], strict=True)]
            assert all(equal), f"rank {rank}, {way}: gradients differ from full recomputation's: {equal}"
        assert {way: ways[way]["rings"] for way in WAYS} == {
            "none": LAYERS, "full": 2 * LAYERS, "ring": LAYERS, "exchange": LAYERS
        }, f"rank {rank}"  # fmt: skip
        assert ways["ring"]["kept"] == [ring_bytes] * LAYERS, f"rank {rank}"
        assert ways["exchange"]["kept"] == [all_bytes] * LAYERS, f"rank {rank}"
        sent = {way: ways[way]["sent"] for way in WAYS}
        assert sent["exchange"] == sent["none"], f"rank {rank}: nothing is sent twice"
        for axis in AXES_OF_RINGS & set(sent["none"]):
            assert sent["ring"][axis] == sent["none"][axis] < sent["full"][axis], f"rank {rank}, {axis}"


@pytest.mark.parametrize(
    "config", [LoongConfig(4, 1, 2), LoongConfig(4, 2), LoongConfig(4, 4)], ids=LoongConfig.describe
)
def test_selective_checkpoint_of_packed_documents(pool: WorkerPool, config: LoongConfig) -> None:
    """As above; a rank whose documents are all its own may send nothing, so what is saved is counted over the ranks."""
    found = pool.run(three_ways, config, torch.float64, PACK)[: config.context_parallel_size]
    shape: dict[str, Any] = {"seq_len": SEQ_LEN, "batch": 1, "heads": HEADS, "value_head_dim": WIDTH}
    ring_bytes = selective.kept_bytes(**shape, cp_size=config.context_parallel_size, dtype=torch.float64)
    for rank, ways in enumerate(found):
        for way in ("ring", "exchange"):
            equal = [torch.equal(a, b) for a, b in zip(ways[way]["grads"], ways["full"]["grads"], strict=True)]
            assert all(equal), f"rank {rank}, {way}: gradients differ from full recomputation's: {equal}"
            assert ways[way]["rings"] == ways["none"]["rings"] == LAYERS < ways["full"]["rings"], f"rank {rank}, {way}"
        assert ways["ring"]["kept"] == [ring_bytes] * LAYERS, f"rank {rank}"
        assert ways["exchange"]["sent"] == ways["none"]["sent"], f"rank {rank}: nothing is sent twice"
    ring_sent = {way: sum(ways[way]["sent"].get(axis, 0) for ways in found for axis in AXES_OF_RINGS) for way in WAYS}
    assert ring_sent["ring"] == ring_sent["none"], "no ring is run twice"
    if config.ring_size > 1:
        assert 0 < ring_sent["none"] < ring_sent["full"]
