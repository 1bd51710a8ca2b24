"""`attn_implementation="loong"` in a Llama of Hugging Face's transformers: the loss and gradients of one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="install transformers to test attn_implementation='loong'")

from tests.multi_rank.pool import WorkerFailure, WorkerPool

SEQ_LEN = 64


def tiny_llama(attention: str, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": SEQ_LEN,
            "attn_implementation": attention,
            **changes,
        }
    )
    return LlamaForCausalLM(config).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and labels of which one sequence has only few, all in one part."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 97, (2, SEQ_LEN), generator=generator)
    labels = tokens.clone()
    labels[1, 8:] = -100
    return tokens, labels


def sharded_step(rank: int, placement: str, **changes: Any) -> tuple[float, float] | None:
    """Loss, and largest gradient error relative to one rank's, of a step on ranks 0 to 3."""
    import torch.distributed as dist

    from megatron_loong import LoongConfig, build_groups
    from megatron_loong.integration.hf import register, shard_batch

    groups = build_groups(LoongConfig(4, 2, placement=placement), range(4))
    try:
        if groups.cp_rank is None:
            return None
        register(groups)
        tokens, labels = batch()
        model = tiny_llama("loong", **changes).train()
        loss = model(**shard_batch(tokens, groups, labels)).loss
        loss.backward()
        reference = tiny_llama("eager").train()
        reference(input_ids=tokens, labels=labels).loss.backward()
        # Summed over the four ranks through the groups that exist: along the ring, then along the heads.
        for value in [loss.data, *(p.grad for p in model.parameters())]:
            for name in ("inner", "head"):
                dist.all_reduce(value, group=groups.handle(name).process_group)
        pairs = zip(model.parameters(), reference.parameters(), strict=True)
        return loss.item(), max(((a.grad - b.grad).norm() / b.grad.norm()).item() for a, b in pairs)
    finally:
        groups.destroy()


@pytest.mark.parametrize("placement", ["head_first", "context_first"])
def test_a_sharded_llama_has_the_loss_and_gradients_of_one_rank(pool: WorkerPool, placement: str) -> None:
    tokens, labels = batch()
    expected = tiny_llama("eager")(input_ids=tokens, labels=labels).loss.item()
    for loss, gradient_error in pool.run(sharded_step, placement)[:4]:
        assert abs(loss - expected) <= 1e-6 * expected  # transformers takes the loss in float32
        assert gradient_error <= 1e-6


def refusal(rank: int, kwargs: dict[str, Any]) -> str:
    from megatron_loong import LoongConfig, build_groups
    from megatron_loong.integration.hf import loong_attention

    groups = build_groups(LoongConfig(1), [rank])
    q = torch.zeros(1, 2, 4, 8)
    given = {"attention_mask": None, **kwargs}
    with pytest.raises(NotImplementedError) as caught:
        loong_attention(None, q, q, q, groups=groups, **given)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"attention_mask": torch.ones(1, 4)}, "does not work with an attention mask: give no attention_mask"),
        ({"dropout": 0.1}, "does not work with dropout=0.1: set the model's attention_dropout to 0"),
        ({"sliding_window": 128}, "does not work with sliding_window: use a model without"),
    ],
)
def test_what_would_be_left_out_is_refused(kwargs: dict[str, Any], message: str) -> None:
    assert message in refusal(0, kwargs)


def test_dropout_in_the_model_is_refused_and_not_ignored(pool: WorkerPool) -> None:
    with pytest.raises(WorkerFailure, match=r"dropout=0\.1: set the model's attention_dropout to 0"):
        pool.run(sharded_step_with_dropout)


def sharded_step_with_dropout(rank: int) -> None:
    sharded_step(rank, "head_first", attention_dropout=0.1)
