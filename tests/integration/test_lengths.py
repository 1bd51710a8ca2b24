"""Lengths that the ranks cannot share out: what is padded, what is told to Megatron, and what is refused."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_loong.integration import lengths, loss


def plugin(cp: int = 4, tp: int = 1, **args: Any) -> Any:
    parallel_state = types.SimpleNamespace(
        get_context_parallel_world_size=lambda: cp, get_tensor_model_parallel_world_size=lambda: tp
    )
    said: list[str] = []
    return types.SimpleNamespace(
        megatron=types.SimpleNamespace(parallel_state=parallel_state),
        args=lambda: types.SimpleNamespace(**args),
        padded=False,
        hybrid=False,
        say=said.append,
        said=said,
    )


def batch(seq_len: int) -> dict[str, Any]:
    text = torch.arange(1, 2 * seq_len + 1).view(2, seq_len)
    mask = torch.ones(2, 1, seq_len, seq_len, dtype=torch.bool).triu(1)
    loss_mask, position_ids = torch.ones(2, seq_len), torch.arange(seq_len).expand(2, -1)
    return {
        "tokens": text,
        "labels": text + 1,
        "loss_mask": loss_mask,
        "position_ids": position_ids,
        "attention_mask": mask,
        "max_seqlen": None,
    }


def test_padding_is_token_0_without_loss_that_nothing_attends_to() -> None:
    state, given = plugin(), batch(30)
    padded = lengths.pad_batch(state, given)
    for key in ("tokens", "labels", "loss_mask", "position_ids"):
        assert torch.equal(padded[key][:, :30], given[key])
        assert torch.equal(padded[key][:, 30:], torch.full((2, 2), 29 if key == "position_ids" else 0))
    assert torch.equal(padded["attention_mask"][..., :30, :30], given["attention_mask"])
    assert padded["attention_mask"][..., 30:].all() and padded["attention_mask"].dtype == torch.bool
    assert padded["max_seqlen"] is None and state.padded
    assert state.said and "sequences of 30 tokens are padded at their end to 32" in state.said[0]


def test_a_length_that_fits_is_left_alone() -> None:
    state, given = plugin(), batch(32)
    assert lengths.pad_batch(state, given) is given and not state.padded and not state.said


def test_sequence_parallel_ranks_share_out_the_tokens_too() -> None:
    assert lengths.length_for_megatron(plugin(cp=2, tp=8), 30) == 32
    assert lengths.length_for_megatron(plugin(cp=4, tp=8, sequence_parallel=True), 34) == 64
    assert lengths.length_for_megatron(plugin(cp=4, tp=8, sequence_parallel=False), 34) == 40


def test_a_batch_without_a_loss_mask_cannot_be_padded() -> None:
    with pytest.raises(ValueError, match="30 tokens must be padded by 2, which needs a loss_mask"):
        lengths.pad_batch(plugin(), {**batch(30), "loss_mask": None})


def test_megatron_accepts_the_length_under_its_other_name() -> None:
    args = types.SimpleNamespace(seq_length=30, encoder_seq_length=None, context_parallel_size=4)
    lengths.let_megatron_accept(args)
    assert (args.seq_length, args.encoder_seq_length) == (None, 30)
    args = types.SimpleNamespace(seq_length=32, encoder_seq_length=None, context_parallel_size=4)
    lengths.let_megatron_accept(args)
    assert (args.seq_length, args.encoder_seq_length) == (32, None)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"num_experts": 4, "moe_z_loss_coeff": 0.1}, "--moe-z-loss-coeff: it averages on each rank"),
        ({"num_experts": 4, "pipeline_model_parallel_size": 2}, "--pipeline-model-parallel-size: later stages"),
        (
            {"num_experts": 4, "calculate_per_token_loss": True, "moe_aux_loss_coeff": [0.1]},
            "--calculate-per-token-loss",
        ),
        ({"num_experts": 4, "mtp_num_layers": 1}, "--mtp-num-layers: its experts"),
        ({"num_experts": 4, "moe_router_load_balancing_type": "sinkhorn"}, "sinkhorn: it would balance padding too"),
        ({"qk_clip": True}, "--qk-clip"),
        ({"tp_comm_overlap": True}, "--tp-comm-overlap"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl"),
    ],
)
def test_what_would_see_the_padding_is_refused(beside: dict[str, Any], message: str) -> None:
    args = types.SimpleNamespace(seq_length=30, encoder_seq_length=None, context_parallel_size=4, **beside)
    with pytest.raises(
        NotImplementedError, match=rf"--seq-length 30 is not .* 8 .*{message}.* need none are 24 and 32"
    ):
        lengths.let_megatron_accept(args)


def test_experts_without_a_loss_over_padding_are_let_through() -> None:
    args = types.SimpleNamespace(
        seq_length=30, encoder_seq_length=None, context_parallel_size=4, num_experts=4,
        moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"], pipeline_model_parallel_size=1,
    )  # fmt: skip
    lengths.let_megatron_accept(args)
    assert args.encoder_seq_length == 30


def test_attention_that_is_not_causal_would_see_the_padding() -> None:
    lengths.refuse_seen_padding(plugin(seq_length=30), causal=True)
    lengths.refuse_seen_padding(plugin(seq_length=32), causal=False)
    with pytest.raises(NotImplementedError, match="not causal would see the padding of a sequence"):
        lengths.refuse_seen_padding(plugin(seq_length=30), causal=False)
    state = plugin(seq_length=None)
    lengths.pad_batch(state, batch(30))
    with pytest.raises(NotImplementedError, match="not causal would see the padding of a sequence"):
        lengths.refuse_seen_padding(state, causal=False)


def test_ranks_average_over_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, losses = [3, 0, 8, 5], [torch.randn(n).sum() for n in (3, 0, 8, 5)]
    monkeypatch.setattr(loss.dist, "all_reduce", lambda x, group: x.fill_(sum(tokens)))
    group = types.SimpleNamespace(size=lambda: 4)
    averages = []
    for rank in range(4):
        of_rank = loss.weighed_by_tokens(lambda _, r=rank: (losses[r], torch.tensor(tokens[r]), {}), group)
        value, count, _ = of_rank(torch.empty(0))
        averages.append(value / count.clamp(min=1))  # as Megatron divides
    torch.testing.assert_close(sum(averages) / 4, sum(losses) / 16)
