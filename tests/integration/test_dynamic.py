"""Micro-batches that bring ranks of their own: every size against dense attention, mixed and at the same time."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

from megatron_loong.integration import dynamic, hybrid_loop
from megatron_loong.integration.checks import check_parts, refuse_beside_hybrid
from megatron_loong.integration.options import LoongOptions, resolve_part
from tests.dense import band, dense_attention
from tests.multi_rank.pool import WorkerPool

WORLD = 4
#: Step by step, the ranks that share a micro-batch, and the lengths of its documents. Ranks 0 to 3 are DP 2 x CP 2.
STEPS = (
    {(0, 1, 2, 3): [64]},
    {(0, 1): [32], (2,): [7], (3,): [10, 5]},
    {(0,): [9], (1,): [8], (2, 3): [16, 15, 1]},
    {(0, 1, 2, 3): [40, 24]},
    {(0, 1): [12, 20], (2, 3): [24]},
)


def build_layer(static: Any) -> Any:
    """A self-attention's core attention, as Megatron builds it on ranks of its own."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        context_parallel_size=static.size(),
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    spec = get_gpt_layer_local_spec().submodules.self_attention
    collection = types.SimpleNamespace(cp=static, tp=dist.new_group([dist.get_rank()], use_local_synchronization=True))
    return build_module(spec, config=config, layer_number=1, pg_collection=collection).core_attention


def attend(layer: Any, group: Any, ranks: tuple[int, ...], lengths: list[int], qkv_format: str) -> None:
    """One micro-batch on `ranks`, forward and backward, in float64 against dense attention to 1e-12."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_loong import shard_sequence
    from megatron_loong.integration import runtime

    torch.manual_seed(sum(lengths) + len(ranks))
    total = sum(lengths)
    q, k, v, dout = (torch.randn(1, total, heads, 8, dtype=torch.float64) for heads in (4, 2, 2, 4))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = band(total, total, (-1, 0)) & (document[:, None] == document[None])
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = dense_attention(*whole, allowed=allowed)
    grads = torch.autograd.grad(expected, whole, dout)

    params = PackedSeqParams(qkv_format, cu_seqlens, cu_seqlens, local_cp_size=len(ranks), cp_group=group)
    groups = layer._groups_of(params)
    assert groups.config.context_parallel_size == len(ranks) and groups.cp_global_ranks == ranks
    shards = {"cu_seqlens": cu_seqlens} if qkv_format == "thd" else {}
    mine = [shard_sequence(x, groups, **shards).transpose(0, 1) for x in (q, k, v, dout, expected, *grads)]
    mine = [x.squeeze(1) if qkv_format == "thd" else x for x in mine]
    q, k, v, dout, out, *grads = mine
    local = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    runtime.active().sliced_packs = True  # as the batch hook would say
    found = layer(*local, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=params)
    found.backward(dout.flatten(-2))
    results = (found, *(x.grad for x in local))
    for name, x, wanted in zip(("out", "dq", "dk", "dv"), results, (out.flatten(-2), *grads), strict=True):
        error = (x - wanted).abs().max().item()
        assert error <= 1e-12, f"{name} of {ranks} on rank {dist.get_rank()}: {error:.1e} > 1e-12"


def mixed_sizes(rank: int, options: dict[str, Any], qkv_format: str) -> list[str]:
    """Every step of `STEPS` in turn, twice; on each, several sizes at the same time. The layouts of this rank."""
    from megatron_loong.integration import install, runtime, uninstall

    sub_groups = {ranks: dist.new_group(list(ranks)) for ranks in ((0, 1), (2, 3), (0, 1, 2, 3))}
    install({"context_parallel_impl": "loong", **options})
    try:
        layer = build_layer(sub_groups[(0, 1) if rank < 2 else (2, 3)])
        for step in (*STEPS, *STEPS):
            ranks = next(ranks for ranks in step if rank in ranks)
            whole = [sum(step[ranks]) // (2 * len(ranks)) * 2 * len(ranks)]
            attend(layer, sub_groups.get(ranks), ranks, step[ranks] if qkv_format == "thd" else whole, qkv_format)
        return [config.describe().partition(",")[0] for config in runtime.active().groups.configs()]
    finally:
        uninstall()


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    """Workers of these tests alone: groups that only members make differ from rank to rank."""
    pool = WorkerPool(WORLD)
    yield pool
    pool.stop()


@pytest.mark.parametrize("qkv_format", ["thd", "sbhd"], ids=["pack", "one-sequence-before-0.18"])
@pytest.mark.parametrize(
    ("options", "layouts"),
    [
        (
            {"loong_head_parallel_size": 2},
            {
                "cp 1 = head 1 x ring 1 (outer 1 x inner 1)",
                "cp 2 = head 2 x ring 1 (outer 1 x inner 1)",
                "cp 4 = head 2 x ring 2 (outer 1 x inner 2)",
            },
        ),
        (
            {"loong_head_parallel_size": 1, "loong_inner_ring_size": 2},
            {
                "cp 1 = head 1 x ring 1 (outer 1 x inner 1)",
                "cp 2 = head 1 x ring 2 (outer 1 x inner 2)",
                "cp 4 = head 1 x ring 4 (outer 2 x inner 2)",
            },
        ),
    ],
    ids=["head2", "double-ring"],
)
def test_sizes_mixed_between_micro_batches(
    pool: WorkerPool, options: dict[str, Any], layouts: set[str], qkv_format: str
) -> None:
    for found in pool.run(mixed_sizes, options, qkv_format):
        assert len(found) == 3 and set(found) == layouts, "one entry for each size, and the second round makes none"


# ---- without processes ----


class Group:
    """A process group of one rank, as far as `members_of` asks."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def params(**values: Any) -> Any:
    return types.SimpleNamespace(**{"local_cp_size": None, "cp_group": None, **values})


def test_members_are_those_that_the_micro_batch_names() -> None:
    assert dynamic.members_of(None) is None and dynamic.members_of(params()) is None
    assert dynamic.members_of(types.SimpleNamespace()) is None, "a PackedSeqParams older than hybrid parallelism"
    for given in ({"local_cp_size": 1}, {"cp_group": Group()}, {"local_cp_size": 1, "cp_group": dynamic.OneRank()}):
        assert dynamic.members_of(params(**given)) == dynamic.Members((0,), 0)
    with pytest.raises(ValueError, match="local_cp_size=2, but packed_seq_params.cp_group is missing"):
        dynamic.members_of(params(local_cp_size=2))
    with pytest.raises(ValueError, match="local_cp_size=2, but packed_seq_params.cp_group has 1 ranks"):
        dynamic.members_of(params(local_cp_size=2, cp_group=Group()))


@pytest.mark.parametrize(
    ("hp", "inner", "size", "layout"),
    [
        (4, "auto", 8, "cp 8 = head 4 x ring 2 (outer 1 x inner 2)"),
        (4, "auto", 4, "cp 4 = head 4 x ring 1 (outer 1 x inner 1)"),
        (4, "auto", 2, "cp 2 = head 2 x ring 1 (outer 1 x inner 1)"),
        (4, "auto", 6, "cp 6 = head 2 x ring 3 (outer 1 x inner 3)"),
        (1, 4, 8, "cp 8 = head 1 x ring 8 (outer 2 x inner 4)"),
        (1, 4, 2, "cp 2 = head 1 x ring 2 (outer 1 x inner 2)"),
        ("auto", 2, 8, "cp 8 = head 8 x ring 1 (outer 1 x inner 1)"),
        ("auto", "auto", 1, "cp 1 = head 1 x ring 1 (outer 1 x inner 1)"),
    ],
)
def test_the_layout_of_a_part_follows_the_flags(hp: Any, inner: Any, size: int, layout: str) -> None:
    options = LoongOptions("loong", hp, inner)
    found = resolve_part(options, size, heads=8, cp_ranks_in_node=size)
    assert found is not None and found.describe() == f"{layout}, placement head_first, zigzag"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"multi_latent_attention": True}, "multi-latent-attention .*supported: dense models"),
        ({"mtp_num_layers": 1}, "mtp-num-layers"),
        ({"num_experts": 8}, "num-experts"),
        ({"num_moe_experts": 8}, "num_moe_experts"),
        ({"hybrid_layer_pattern": "M*M*"}, "hybrid-layer-pattern"),
        ({"eval_iters": 100}, "--eval-iters 100 .*supported: --eval-iters 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_still_talks_to_the_static_group_is_refused(asked: dict[str, Any], message: str) -> None:
    options = LoongOptions("loong")
    with pytest.raises(NotImplementedError, match=rf"--hybrid-context-parallel does not work with .*{message}"):
        refuse_beside_hybrid(options, types.SimpleNamespace(hybrid_context_parallel=True, **asked))
    refuse_beside_hybrid(options, types.SimpleNamespace(hybrid_context_parallel=False, **asked))


def test_a_placement_other_than_head_first_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="--loong-placement context_first .*supported: .*head_first"):
        refuse_beside_hybrid(
            LoongOptions("loong", loong_placement="context_first"),
            types.SimpleNamespace(hybrid_context_parallel=True),
        )


def test_sizes_have_to_fit_all_of_data_and_context_parallel() -> None:
    check_parts(LoongOptions("loong", 4, 2), 8)
    with pytest.raises(ValueError, match=r"head_parallel_size=3 does not divide .*=8; .*context parallel = 8 ranks"):
        check_parts(LoongOptions("loong", 3), 8)


# ---- what keeps Megatron's own loop from running ----


def test_backward_step_is_called_without_the_argument_that_is_gone() -> None:
    hook = hybrid_loop.HOOKS["hybrid_backward_step"]
    now = hook(types.SimpleNamespace(hybrid=True), lambda given, out, out_grad, config: (given, out, out_grad, config))
    assert now(1, 2, 3, "model type", 4) == now(1, 2, 3, 4) == (1, 2, 3, 4)
    before = hook(types.SimpleNamespace(hybrid=True), lambda given, out, out_grad, model_type, config: config)
    assert before(1, 2, 3, "model type", 4) == 4


def test_one_sequence_becomes_a_pack_of_one_document() -> None:
    hook = hybrid_loop.HOOKS["hybrid_batch"]
    batch = {"tokens": torch.arange(5), "loss_mask": torch.ones(5), "attention_mask": None}
    found = hook(types.SimpleNamespace(hybrid=True), lambda batch: batch)(batch)
    assert found["tokens"].shape == found["loss_mask"].shape == (1, 5) and found["attention_mask"] is None
    assert found["cu_seqlens"].tolist() == [[0, 5]] and found["max_seqlen"].tolist() == [5]
    assert hook(types.SimpleNamespace(hybrid=False), lambda batch: batch)(batch) is batch
    mended = {"tokens": torch.zeros(1, 5)}
    assert hook(types.SimpleNamespace(hybrid=True), lambda batch: batch)(mended) is mended


def test_before_0_18_one_rank_is_named_and_other_lengths_than_multiples_are_refused() -> None:
    hook = hybrid_loop.HOOKS["hybrid_one_rank"]
    cut = hook(types.SimpleNamespace(hybrid=True), lambda batch, size: (batch, params(local_cp_size=size)))
    _, given = cut({"tokens": torch.arange(7)}, 1)
    assert dynamic.members_of(given) == dynamic.Members((0,), 0) and given.cp_group.size() == 1
    with pytest.raises(ValueError, match="a sequence of 7 tokens on 2 ranks is no multiple of 4"):
        cut({"tokens": torch.arange(7)}, 2)
