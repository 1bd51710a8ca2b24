"""Bytes that a transformers model takes beside its hidden states, counted as operators run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="install transformers to test megatron_loong.hf")

from benchmarks.live_bytes import LiveBytes

VOCAB = 8192
TILE = 64


def peak_bytes(seq_len: int, **options: Any) -> int:
    """Peak of a forward and backward of one layer, above what a model with a tiny vocabulary takes at that length."""
    return _peak(seq_len, VOCAB, **options) - _peak(seq_len, 8, **options)


def _peak(seq_len: int, vocab: int, **options: Any) -> int:
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_loong.hf import parallelize, shard_batch

    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    groups = parallelize(model, (1,), **options)
    tokens = torch.zeros(1, seq_len, dtype=torch.long)
    shard = shard_batch({"input_ids": tokens, "labels": tokens}, groups)
    with LiveBytes() as live:
        model(**shard).loss.backward()
    return live.peak_bytes


def test_tiled_loss_takes_as_much_for_logits_at_any_length() -> None:
    short, long = (peak_bytes(n, tiled_loss=TILE) for n in (256, 1024))
    whole_short, whole_long = (peak_bytes(n) for n in (256, 1024))
    print(short, long, whole_short, whole_long)
    assert long <= 1.02 * short
    assert whole_long > 3.5 * whole_short > 3.5 * short


def test_a_soft_cap_of_logits_is_in_the_tiled_loss_too() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from megatron_loong.hf import parallelize, shard_batch

    tokens = torch.randint(0, 40, (2, 37), generator=torch.Generator().manual_seed(0))
    results = []
    for tile in (0, 8):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        more = {"num_hidden_layers": 2, "head_dim": 8, "vocab_size": 40, "initializer_range": 0.4}
        config = Gemma2Config(**sizes, **more, final_logit_softcapping=2.0)  # type: ignore[arg-type]
        model = Gemma2ForCausalLM(config).double()
        groups = parallelize(model, (1,), tiled_loss=tile)
        loss = model(**shard_batch({"input_ids": tokens, "labels": tokens}, groups)).loss
        loss.backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (loss, grad), (tiled_loss, tiled_grad) = results
    assert abs(loss - tiled_loss) <= 1e-6 * loss  # the whole logits are cast to float32
    assert (grad - tiled_grad).norm() <= 1e-6 * grad.norm()
