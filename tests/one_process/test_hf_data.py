"""Batches as Hugging Face's collators make them, cut for each rank: pure, without process groups or transformers."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from megatron_loong import LoongConfig, build_groups
from megatron_loong.hf import ShardCollator, data_loader, shard_batch

CONFIG = LoongConfig(3, 1)
TOKENS = torch.arange(1, 12).unsqueeze(0)


def given(features: Any) -> Any:
    return features


def shards(**batch: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [pickle.loads(pickle.dumps(ShardCollator(given, CONFIG, rank)))(batch) for rank in range(3)]


def whole(parts: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    """The rows again, by where each token stands."""
    order = torch.cat([p["position_ids"] for p in parts], 1).argsort(1)
    return torch.cat([p[name] for p in parts], 1).gather(1, order)


def test_every_token_is_on_one_rank_with_the_label_that_follows_it() -> None:
    parts = shards(input_ids=TOKENS, labels=TOKENS, attention_mask=torch.ones_like(TOKENS))
    assert torch.equal(whole(parts, "input_ids"), TOKENS)
    assert whole(parts, "labels").tolist() == [[*range(2, 12), -100]]
    assert all(torch.equal(p["labels"], p["shift_labels"]) and "attention_mask" not in p for p in parts)
    assert len({p["loong_digest"].item() for p in parts}) == 1
    other = shards(input_ids=TOKENS + 1, labels=TOKENS)[0]
    assert other["loong_digest"] != parts[0]["loong_digest"]


def test_boundaries_alone_become_positions_that_restart() -> None:
    boundaries = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    parts = shards(input_ids=TOKENS, cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries)
    positions = torch.cat([torch.arange(4), torch.arange(1), torch.arange(6)]).unsqueeze(0)
    by_positions = shards(input_ids=TOKENS, position_ids=positions)
    assert all(torch.equal(a["position_ids"], b["position_ids"]) for a, b in zip(parts, by_positions, strict=True))
    assert all("cu_seq_lens_q" not in p for p in parts)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "images": (
        {"input_ids": TOKENS, "pixel_values": torch.ones(1, 3)},
        NotImplementedError,
        "a batch with pixel_values cannot be cut .*; supported: input_ids, labels",
    ),
    "too short": (
        {"input_ids": TOKENS[:, :2]},
        ValueError,
        "a batch of 2 tokens is too short for context_parallel_size=3",
    ),
    "no tokens": ({"labels": TOKENS}, ValueError, r"must have input_ids \[b, S\]; this one has labels \[1, 11\]"),
    "other length": (
        {"input_ids": TOKENS, "labels": TOKENS[:, 1:]},
        ValueError,
        r"labels must be \[b, S\] as input_ids",
    ),
    "a pack by seq_idx alone": (
        {"input_ids": TOKENS, "seq_idx": torch.zeros_like(TOKENS)},
        ValueError,
        "a batch with seq_idx needs position_ids or cu_seq_lens_q too",
    ),
    "boundaries": (
        {"input_ids": TOKENS, "cu_seq_lens_q": torch.tensor([0, 4])},
        ValueError,
        r"cu_seq_lens_q=\[0, 4\] must go from 0 to the 11 tokens of one row",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_batch_that_cannot_be_cut_is_refused(name: str) -> None:
    batch, kind, words = WRONG[name]
    with pytest.raises(kind, match=words):
        shards(**batch)


def test_data_loader_and_shard_batch_of_one_rank_hold_all_tokens() -> None:
    groups = build_groups(LoongConfig(1), [0])
    rows = [{"input_ids": torch.arange(i, i + 5), "labels": torch.arange(i, i + 5)} for i in range(6)]
    batches = list(data_loader(rows, groups, batch_size=2))
    assert [b["input_ids"][:, 0].tolist() for b in batches] == [[0, 1], [2, 3], [4, 5]]
    shard = shard_batch({k: x.unsqueeze(0) for k, x in rows[0].items()}, groups)
    assert shard["num_items_in_batch"] == 4
    with pytest.raises(NotImplementedError, match="give each group its part of a stream yourself"):
        data_loader(torch.utils.data.ChainDataset([]), groups)
