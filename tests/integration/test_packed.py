"""Every reader of a pack's layout inside Megatron agrees with `token_positions`.

Each hook against Megatron's own on one rank with the same pack. What must not meet a pack is refused by name.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core import utils
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm import mamba_context_parallel
from megatron.core.transformer import multi_token_prediction

from megatron_loong import LoongConfig, token_positions
from megatron_loong.integration import (
    LoongOptions,
    checks,
    data_hooks,
    install,
    packed,
    rotary,
    runtime,
    slice_packed_batch,
    uninstall,
)
from tests.integration import foreign_cuts

CONFIG = LoongConfig(4, 2)
#: Documents of 9, 1, 30 and 22 tokens, and 2 tokens of the plugin's padding behind them.
DOCUMENTS, TOKENS = (0, 9, 10, 40, 62), 64
PADDED = (*DOCUMENTS, TOKENS)


class Group:
    """A context-parallel group as far as the hooks look at it."""

    def __init__(self, rank: int, size: int = 4) -> None:
        self.rank, self.size = lambda: rank, lambda: size


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The installed plugin, as if layers over 4 ranks (hp 2) had been built."""
    uninstall()
    install({"context_parallel_impl": "loong"})
    monkeypatch.setattr(runtime.active().groups, "configs", lambda: [CONFIG])
    parallel_state = runtime.active().megatron.parallel_state
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 4)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 1)
    yield runtime.active()
    monkeypatch.undo()
    uninstall()


def boundaries(*values: int) -> torch.Tensor:
    return torch.tensor(values or DOCUMENTS, dtype=torch.int32)


def params(**changes: Any) -> PackedSeqParams:
    cu_seqlens = boundaries()
    return PackedSeqParams(**{"qkv_format": "thd", "cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens, **changes})


def places(rank: int, tokens: int = TOKENS) -> torch.Tensor:
    return token_positions(CONFIG, rank, tokens, cu_seqlens=PADDED)


# ---- boundaries ----


def test_the_device_is_asked_once_for_a_tensor_and_its_views(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    original = packed.checked_boundaries
    monkeypatch.setattr(packed, "checked_boundaries", lambda values: (asked.append(values), original(values))[1])
    row = boundaries().unsqueeze(0)
    for view in (row, row.squeeze(0), row[0], row.squeeze(0)):
        assert packed.boundaries_of(view) == DOCUMENTS
    assert len(asked) == 1
    row[0, 1] = 8
    assert packed.boundaries_of(row)[1] == 8 and len(asked) == 2
    assert packed.boundaries_of(row[0, :3]) == (0, 8, 10)
    with pytest.raises(ValueError, match=r"cu_seqlens has shape \[2, 5\]: a packed micro-batch is one row"):
        packed.boundaries_of(boundaries().repeat(2, 1))


def test_attention_is_given_the_padded_boundaries_and_the_length(plugin: Any) -> None:
    whole = params(cu_seqlens_q=boundaries(*PADDED), cu_seqlens_kv=boundaries(*PADDED))
    assert packed.packed_arguments(whole, 16, 4) == {"cu_seqlens": PADDED, "seq_len": 64}
    real = boundaries(0, 7, 8, 38, 58)
    padded = params(cu_seqlens_q=real, cu_seqlens_kv=real, cu_seqlens_q_padded=boundaries(0, 9, 10, 40, 64))
    padded.cu_seqlens_kv_padded = padded.cu_seqlens_q_padded
    both = ((0, 7, 8, 38, 58), (0, 9, 10, 40, 64))
    for causal in (True, False):
        assert packed.packed_arguments(padded, 16, 4, causal=causal) == {"cu_seqlens": both, "seq_len": 64}
    across = copy.copy(padded)
    across.cu_seqlens_kv = across.cu_seqlens_kv_padded = boundaries(0, 9, 10, 40, 64)
    with pytest.raises(NotImplementedError, match="cross-attention that is not causal would see the padding"):
        packed.packed_arguments(across, 16, 4, causal=False)
    # The plugin's own padding is one document more, and documents stay pairs of queries and keys.
    plugin.sliced_packs = True
    assert packed.packed_arguments(params(), 16, 4, state=plugin) == {"cu_seqlens": PADDED, "seq_len": 64}
    short = params(cu_seqlens_q=(real := boundaries(0, 7, 8, 38, 58)), cu_seqlens_kv=real)
    short.cu_seqlens_q_padded = short.cu_seqlens_kv_padded = boundaries()
    found = packed.packed_arguments(short, 16, 4, state=plugin)
    assert found["cu_seqlens"] == ((0, 7, 8, 38, 58, 58), PADDED)
    other = params(cu_seqlens_kv=boundaries(0, 9, 9, 9, 70))
    found = packed.packed_arguments(other, 16, 4, state=plugin)
    assert (found["cu_seqlens"], found["cu_seqlens_kv"]) == (PADDED, (0, 9, 9, 9, 70, 70))


@pytest.mark.parametrize("ends", [(0, 20, 40), (0, 16)], ids=["too-short", "of-one-rank"])
def test_boundaries_that_end_before_the_tokens_are_an_error(plugin: Any, ends: tuple[int, ...]) -> None:
    """Four ranks of 16 tokens: through the packed parameters, and where the batch is cut."""
    plugin.sliced_packs = True
    short = params(cu_seqlens_q=boundaries(*ends), cu_seqlens_kv=boundaries(*ends))
    both = rf"ends at {ends[-1]}, but .* 64 tokens.* one rank's own tokens, .* padding, .* append 64"
    for state in (None, plugin):
        with pytest.raises(ValueError, match=both):
            packed.packed_arguments(short, 16, 4, state=state)
    with pytest.raises(ValueError, match=both):
        slice_packed_batch({"tokens": torch.zeros(1, 64), "cu_seqlens": boundaries(*ends)[None]}, Group(0))
    with pytest.raises(ValueError, match="must be one row of whole numbers"):
        packed.packed_arguments(params(cu_seqlens_q=boundaries().float()), 16, 4)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"qkv_format": "sbhd"}, {}, "qkv_format='sbhd' .*supported: 'thd'"),
        ({}, {"experimental_attention_variant": "gated_delta_net"}, "gated_delta_net does not work with packed"),
        ({}, {"multi_latent_attention": True, "apply_rope_fusion": True}, "supported: --no-rope-fusion"),
    ],
)
def test_refused_beside_packs(changes: dict[str, Any], config: dict[str, Any], message: str) -> None:
    if any(not hasattr(params(), name) for name in changes):
        pytest.skip("this megatron-core's PackedSeqParams cannot say so")
    with pytest.raises(NotImplementedError, match=message):
        given = params()
        vars(given).update(changes)
        packed.packed_arguments(given, 16, 4, config=types.SimpleNamespace(**config))


def test_a_pack_that_was_not_cut_by_our_layout_does_not_reach_attention(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel_state = plugin.megatron.parallel_state
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: 0)
    with pytest.raises(RuntimeError, match="the batch was not cut by the layout of --context-parallel-impl loong"):
        packed.packed_arguments(params(), 16, 4, state=plugin)
    slice_packed_batch({"tokens": torch.zeros(1, 62), "cu_seqlens": boundaries()[None]}, Group(0))
    packed.packed_arguments(params(), 16, 4, state=plugin)


def test_layers_that_share_ranks_out_differently_have_no_common_layout(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert packed.layout_config(plugin, 4) == CONFIG and packed.layout_config(plugin, 1) is None
    monkeypatch.setattr(plugin.groups, "configs", lambda: [CONFIG, LoongConfig(4, 4)])
    with pytest.raises(ValueError, match=r"head-parallel sizes \[2, 4\] are in use"):
        packed.layout_config(plugin, 4)
    monkeypatch.setattr(plugin.groups, "configs", list)
    with pytest.raises(RuntimeError, match="no attention layer has been built yet"):
        packed.layout_config(plugin, 4)


# ---- the batch ----


@pytest.mark.parametrize("rank", range(4))
def test_megatrons_own_function_cuts_a_packed_batch_by_our_layout(
    plugin: Any, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = torch.arange(1, 63)[None]
    batch = {"tokens": text, "labels": text + 1, "loss_mask": torch.ones(1, 62), "position_ids": text - 1}
    group, cu_seqlens = Group(rank), boundaries()[None]
    if hasattr(utils, "get_thd_batch_on_this_cp_rank"):
        monkeypatch.setattr(plugin.megatron.parallel_state, "get_context_parallel_group", lambda: group)
        batch, _ = utils.get_thd_batch_on_this_cp_rank(batch, cu_seqlens, None, torch.tensor([30]))
    else:
        batch = {**batch, "cu_seqlens": cu_seqlens, "cu_seqlens_padded": None, "max_seqlen": torch.tensor([30])}
        batch = utils.get_batch_on_this_cp_rank(batch, False, group)
    expected = places(rank)
    padding = expected >= 62  # 62 tokens are padded to 64
    assert torch.equal(batch["tokens"][0], (expected + 1).masked_fill(padding, 0))
    assert torch.equal(batch["labels"][0], (expected + 2).masked_fill(padding, 0))
    assert torch.equal(batch["loss_mask"][0], 1.0 - padding.float())
    assert torch.equal(batch["position_ids"][0], expected.clamp(max=61))


@pytest.mark.skipif(not hasattr(utils, "flatten_batch_for_packed_sequences"), reason="from megatron-core 0.19 on")
def test_masking_between_documents_is_cut_by_documents_too(plugin: Any) -> None:
    batch = {"tokens": torch.arange(64)[None], "cu_seqlens": boundaries(*PADDED)[None], "cu_seqlens_padded": None}
    cut = utils.get_batch_on_this_cp_rank(batch, False, Group(1), use_per_sequence_balancing=True)
    assert torch.equal(cut["tokens"][0], places(1))


def test_a_packed_batch_without_boundaries_is_an_error(plugin: Any) -> None:
    with pytest.raises(ValueError, match=r"a packed batch needs cu_seqlens; this one has \['tokens'\]"):
        slice_packed_batch({"tokens": torch.zeros(1, 64)}, Group(0))


# ---- rotary embedding ----


def rotated_whole(freqs: torch.Tensor, t: torch.Tensor, documents: tuple[int, ...]) -> torch.Tensor:
    """Megatron's own, on one rank."""
    return rotated(freqs, t, documents, Group(0, 1))


def rotated(freqs: torch.Tensor, t: torch.Tensor, documents: tuple[int, ...], group: Group) -> torch.Tensor:
    """Through Megatron's public function, which looks up the one that is hooked; interleaved, and scaled as by YaRN."""
    config: Any = types.SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=True, multi_latent_attention=False)
    cu_seqlens: Any = boundaries(*documents)
    return rope_utils.apply_rotary_pos_emb(t, freqs, config, cu_seqlens, mscale=1.25, cp_group=group)  # type: ignore[arg-type]


@pytest.mark.parametrize("positions", [30, 64], ids=["by-document", "by-pack"])
def test_rotary_embedding_is_that_of_one_rank(plugin: Any, positions: int) -> None:
    torch.manual_seed(0)
    t, freqs = torch.randn(TOKENS, 2, 8), torch.randn(positions, 1, 1, 4)
    documents = (0, 9, 10, 40, 64)
    whole = rotated_whole(freqs, t, documents)
    for rank in range(4):
        mine = token_positions(CONFIG, rank, TOKENS, cu_seqlens=documents)
        local = rotated(freqs, t[mine], documents, Group(rank))
        torch.testing.assert_close(local, whole[mine], rtol=0, atol=0)


def test_fused_rotary_embedding_gets_each_tokens_own_frequencies(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def sequence_kernel(t: torch.Tensor, freqs: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
        return rope_utils._apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=interleaved, mscale=1.25)

    def pack_kernel(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("TransformerEngine's kernel for packs knows only its own zigzag")

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", sequence_kernel)
    fused = rotary.HOOKS["fused_rotary_thd"](plugin, pack_kernel)
    torch.manual_seed(0)
    t, freqs, documents = torch.randn(TOKENS, 2, 8), torch.randn(30, 1, 1, 8), (0, 9, 10, 40, 64)
    whole = rotated_whole(freqs, t, documents)
    for rank in range(4):
        mine = token_positions(CONFIG, rank, TOKENS, cu_seqlens=documents)
        local = fused(t[mine], boundaries(*documents), freqs, cp_size=4, cp_rank=rank, interleaved=True)
        torch.testing.assert_close(local, whole[mine], rtol=0, atol=0)


def test_a_document_longer_than_the_embedding_is_an_error(plugin: Any) -> None:
    with pytest.raises(ValueError, match=r"has 29 positions .*max_seqlen_q.* but a document has 30 tokens"):
        rope_utils._apply_rotary_pos_emb_thd(
            torch.zeros(16, 2, 8), boundaries(), torch.zeros(29, 1, 1, 8), cp_group=Group(0)
        )


# ---- MTP, Mamba ----


def test_mtp_rolls_inside_documents_as_on_one_rank(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = (0, 9, 10, 40, 64)
    whole = torch.randint(1, 100, (1, TOKENS), generator=torch.Generator().manual_seed(0)).float()
    pack = params(cu_seqlens_q=boundaries(*documents))
    expected, total = multi_token_prediction.roll_tensor(whole, cp_group=Group(0, 1), packed_seq_params=pack)
    parts = [whole[:, token_positions(CONFIG, rank, TOKENS, cu_seqlens=documents)] for rank in range(4)]
    monkeypatch.setattr(
        packed.dist, "all_gather", lambda out, _, group: [a.copy_(b) for a, b in zip(out, parts, strict=True)]
    )
    for rank in range(4):
        mine = token_positions(CONFIG, rank, TOKENS, cu_seqlens=documents)
        rolled, mean = multi_token_prediction.roll_tensor(parts[rank], cp_group=Group(rank), packed_seq_params=pack)
        assert torch.equal(rolled, expected[:, mine])
        assert mean * 4 == total


def test_mamba_sees_the_pack_in_its_order(plugin: Any) -> None:
    pack = params()
    by_rank = torch.cat([places(rank) for rank in range(4)]).float()[:, None]
    in_order = mamba_context_parallel._undo_attention_load_balancing(by_rank, 4, pack)
    assert torch.equal(in_order[:, 0], torch.arange(64.0))
    assert torch.equal(mamba_context_parallel._redo_attention_load_balancing(in_order, 4, pack), by_rank)
    pack.seq_idx = torch.zeros(1, 62, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="a pack of 62 tokens was padded to 64, .* with Mamba layers"):
        mamba_context_parallel._undo_attention_load_balancing(by_rank, 4, pack)
    # Without a pack Megatron's own: 2 x cp chunks in zigzag.
    zigzag = torch.tensor([0, 7, 1, 6, 2, 5, 3, 4])[:, None]
    assert torch.equal(mamba_context_parallel._undo_attention_load_balancing(zigzag, 4)[:, 0], torch.arange(8))


# ---- layouts that programs bring ----


@pytest.fixture
def per_document(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin, with `--loong-pack-layout per_document`."""
    config = dataclasses.replace(CONFIG, pack_layout="per_document")
    monkeypatch.setattr(plugin.groups, "configs", lambda: [config])
    return plugin


FOREIGN = (0, 16, 24, 64)


@pytest.mark.parametrize("rank", range(4))
def test_megatrons_own_function_cuts_each_document_if_asked_to(per_document: Any, rank: int) -> None:
    batch = slice_packed_batch(
        {"tokens": torch.arange(64)[None], "cu_seqlens": boundaries(*FOREIGN)[None]}, Group(rank)
    )
    expected = foreign_cuts.cut_by_verl(torch.arange(64), FOREIGN, 4, rank)
    assert torch.equal(batch["tokens"][0], expected)
    with pytest.raises(
        ValueError, match=r"document 0 of the pack .* has 9 tokens, .* no multiple of 8 .* Pad this one to 16"
    ):
        slice_packed_batch({"tokens": torch.zeros(1, 62), "cu_seqlens": boundaries()[None]}, Group(rank))


def test_packs_that_are_cut_already_reach_attention(per_document: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel_state = per_document.megatron.parallel_state
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
    given = params(cu_seqlens_q=(ends := boundaries(*FOREIGN)), cu_seqlens_kv=ends)
    assert packed.packed_arguments(given, 16, 4, state=per_document) == {"cu_seqlens": FOREIGN, "seq_len": 64}
    with pytest.raises(ValueError, match="ends at 64, but the ranks together hold 96 tokens"):
        packed.packed_arguments(given, 24, 4, state=per_document)
    given.cp_partition_mode = "contiguous"
    with pytest.raises(ValueError, match="cp_partition_mode='contiguous', but --loong-pack-layout per_document"):
        packed.packed_arguments(given, 16, 4, state=per_document)


def test_gated_delta_net_puts_a_pack_cut_by_document_in_order(per_document: Any) -> None:
    """Its layers compute the order of Megatron's cut themselves: only that layout is let through."""
    common = pytest.importorskip("megatron.core.ssm.gated_delta_net.common")
    ranks = [foreign_cuts.cut_by_verl(torch.arange(64), FOREIGN, 4, rank) for rank in range(4)]
    by_rank = torch.cat(
        [
            slice_packed_batch(
                {"tokens": torch.arange(64)[None], "cu_seqlens": boundaries(*FOREIGN)[None]}, Group(rank)
            )["tokens"][0]
            for rank in range(4)
        ]
    )
    assert torch.equal(by_rank, torch.cat(ranks))
    order, back = common._build_thd_cp_a2a_perm(boundaries(*FOREIGN), 4, 64)
    assert torch.equal(by_rank[order], torch.arange(64)) and torch.equal(by_rank[order][back], by_rank)
    config: Any = types.SimpleNamespace(experimental_attention_variant="gated_delta_net")
    given = params(cu_seqlens_q=(ends := boundaries(*FOREIGN)), cu_seqlens_kv=ends)
    assert packed.packed_arguments(given, 16, 4, config=config, state=per_document)["cu_seqlens"] == FOREIGN


def test_mamba_sees_packs_of_every_layout_in_order(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = params(cu_seqlens_q=(ends := boundaries(*FOREIGN)), cu_seqlens_kv=ends)
    undo, redo = (
        mamba_context_parallel._undo_attention_load_balancing,
        mamba_context_parallel._redo_attention_load_balancing,
    )
    for layout in ("dealt", "per_document", "contiguous"):
        config = LoongConfig(4, 2, pack_layout=layout, sequence_layout="contiguous")
        monkeypatch.setattr(plugin.groups, "configs", lambda config=config: [config])
        ranks = [token_positions(config, rank, 64, cu_seqlens=FOREIGN) for rank in range(4)]
        by_rank = torch.cat(ranks)[:, None]
        assert torch.equal(undo(by_rank, 4, given)[:, 0], torch.arange(64))
        assert torch.equal(redo(undo(by_rank, 4, given), 4, given), by_rank)
        # One sequence in contiguous pieces is in order as it stands.
        assert undo(by_rank, 4) is by_rank and redo(by_rank, 4) is by_rank


def test_an_embedding_cut_as_one_sequence_does_not_reach_a_pack(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Megatron's multimodal embedding, which does not know of packs, outside of GPTModel.forward."""
    from megatron.core.models.common.embeddings import rotary_pos_embedding

    monkeypatch.setattr(rope_utils.torch.Tensor, "cuda", lambda x, **_: x)
    monkeypatch.setattr(rope_utils.torch, "tensor", lambda *x, pin_memory=False, **kw: torch.as_tensor(*x, **kw))
    rows = rotary_pos_embedding.get_pos_emb_on_this_cp_rank(torch.zeros(64, 1, 1, 8), 0, Group(1))
    with pytest.raises(NotImplementedError, match="cut as that of one sequence reached a pack"):
        rotated(rows, torch.zeros(16, 2, 8), FOREIGN, Group(1))
    plugin.in_packed_model = True
    assert len(rotary_pos_embedding.get_pos_emb_on_this_cp_rank(torch.zeros(64, 1, 1, 8), 0, Group(1))) == 64


@pytest.mark.parametrize("pieces", ["tokens", "rows", "successors"])
def test_sequences_in_contiguous_pieces(plugin: Any, monkeypatch: pytest.MonkeyPatch, pieces: str) -> None:
    """Batch, rotary embedding and MTP's roll of one sequence of 64."""
    config = dataclasses.replace(CONFIG, sequence_layout="contiguous")
    monkeypatch.setattr(plugin.groups, "configs", lambda: [config])
    whole = torch.arange(1, 65)[None]
    parts = list(whole.split(16, 1))
    monkeypatch.setattr(
        packed.dist, "all_gather", lambda out, _, group: [a.copy_(b) for a, b in zip(out, parts, strict=True)]
    )
    from megatron.core.models.common.embeddings import rotary_pos_embedding

    for rank in range(4):
        mine, group = slice(16 * rank, 16 * rank + 16), Group(rank)
        if pieces == "tokens":
            hook = data_hooks.HOOKS["slice_sequence"](plugin, None)  # type: ignore[arg-type]
            mask = torch.ones(1, 1, 64, 64)
            cut = hook({"tokens": whole.clone(), "attention_mask": mask, "cu_seqlens": None}, group)
            assert torch.equal(cut["tokens"], parts[rank]) and cut["attention_mask"].shape == (1, 1, 16, 64)
        elif pieces == "rows":
            rows = rotary_pos_embedding.get_pos_emb_on_this_cp_rank(torch.arange(64), 0, group)
            assert torch.equal(rows, torch.arange(64)[mine])
        else:
            rolled, mean = multi_token_prediction.roll_tensor(parts[rank].clone(), cp_group=group)
            assert torch.equal(rolled, torch.cat([whole[:, 1:], whole.new_zeros(1, 1)], 1)[:, mine])
            assert mean * 4 == whole[:, 1:].sum()
            with pytest.raises(
                NotImplementedError, match="rolling a tensor of contiguous pieces by -1 along dimension 0"
            ):
                multi_token_prediction.roll_tensor(parts[rank], dims=0, cp_group=group)


@pytest.mark.parametrize(
    ("holder", "message"),
    [
        ({"hybrid_context_parallel": True}, "--hybrid-context-parallel"),
        ({"mtp_hsm": True}, "--mtp-hsm"),
        ({"experimental_attention_variant": "gated_delta_net"}, "gated_delta_net .*undo Megatron's zigzag"),
    ],
)
def test_refused_beside_contiguous_pieces(holder: dict[str, Any], message: str) -> None:
    options = LoongOptions("loong", loong_sequence_layout="contiguous")
    with pytest.raises(NotImplementedError, match=f"contiguous does not work with .*{message}"):
        checks.refuse_beside_contiguous(options, types.SimpleNamespace(**holder))
    checks.refuse_beside_contiguous(LoongOptions("loong"), types.SimpleNamespace(**holder))
