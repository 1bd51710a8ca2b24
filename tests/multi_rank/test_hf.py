"""`megatron_loong.hf.parallelize` on models of Hugging Face's transformers: the loss and gradients of one rank."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="install transformers to test megatron_loong.hf")

from tests.multi_rank.pool import PRELOAD, WorkerPool

PRELOAD += [
    f"transformers.models.{name}.modeling_{name}"
    for name in ("llama", "mistral", "qwen2", "gemma2", "gpt_oss", "qwen3", "qwen3_moe", "phi3")
]

SEQ_LEN = 64
OLD = importlib.util.find_spec("transformers.masking_utils") is None
"""transformers up to 4.52, which makes masks without asking the attention."""


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
    from megatron_loong.hf import parallelize, shard_batch

    groups = build_groups(LoongConfig(4, 2, placement=placement), range(4))
    try:
        if groups.cp_rank is None:
            return None
        tokens, labels = batch()
        model = tiny_llama("eager", **changes).train()
        parallelize(model, groups)
        loss = model(**shard_batch({"input_ids": tokens, "labels": labels}, groups)).loss
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


LEFT = [24, 0]
RIGHT = [5, 40]


def padded(left: list[int], right: list[int], length: int = SEQ_LEN) -> dict[str, Any]:
    """Rows padded by so much on each side, with labels on tokens alone; positions count tokens."""
    tokens = batch()[0][:, :length]
    mask = torch.ones_like(tokens)
    for row, (a, b) in enumerate(zip(left, right, strict=True)):
        mask[row, :a] = 0
        mask[row, length - b :] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    if OLD:  # what a padding token attends to, and so predicts, is another thing in each of their implementations
        labels.scatter_(1, mask.argmax(1, keepdim=True), -100)
    return {"labels": labels, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def packed(*rows: list[int]) -> dict[str, Any]:
    """A row of documents of these lengths each."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    return {"position_ids": positions, "labels": batch()[0][: len(rows), : positions.shape[1]]}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "left-padding": ("Llama", {}, padded(LEFT, [0, 0])),
    "both-paddings": ("Llama", {"use_cache": True}, padded(LEFT, RIGHT)),
    "padding-and-positions-of-columns": ("Llama", {}, {**padded(LEFT, RIGHT), "position_ids": None}),
    "all-ones": ("Llama", {}, padded([0, 0], [0, 0])),
    "packed": ("Llama", {}, packed([20, 44], [1, 30, 30, 3])),
    "packed-odd-length": ("Llama", {}, packed([20, 17])),
    "checkpointed": ("Llama", {"checkpointing": True}, packed([20, 44], [1, 30, 30, 3])),
    "bidirectional": ("Llama", {"is_causal": False}, padded([0, 0], RIGHT)),
    "window": ("Mistral", {"sliding_window": 7}, {"labels": batch()[1]}),
    "window-packed": ("Mistral", {"sliding_window": 7}, packed([20, 44], [64])),
    "window-padded": ("Mistral", {"sliding_window": 7}, padded(LEFT, RIGHT)),
    "windows-of-some-layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        padded(LEFT, RIGHT),
    ),
    "sinks": (
        "GptOss",
        {
            "sliding_window": 7,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "experts_implementation": "eager",
        },
        padded(LEFT, RIGHT),
    ),
    "soft-cap": ("Gemma2", {"sliding_window": 7, "head_dim": 8, "query_pre_attn_scalar": 8}, packed([20, 44])),
}


def tiny(
    family: str, attention: str, checkpointing: bool = False, dtype: torch.dtype = torch.float64, **changes: Any
) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.6,
        "use_cache": False,
    }
    config = getattr(transformers, f"{family}Config")(**{**sizes, "attn_implementation": attention, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


#: A tiny model of each architecture, with what is its own: the table of docs/huggingface.md.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama": CASES["both-paddings"],
    "Mistral": CASES["window-packed"],
    "Qwen2": CASES["windows-of-some-layers"],
    "Qwen3": ("Qwen3", {"head_dim": 8}, packed([20, 44], [1, 30, 30, 3])),
    "Qwen3-MoE": (
        "Qwen3Moe",
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "experts_implementation": "eager",
        },
        padded([0, 0], RIGHT),
    ),
    "Phi-3": ("Phi3", {"sliding_window": 7, "pad_token_id": 0}, {"labels": batch()[1]}),
    "Gemma-2": CASES["soft-cap"],
    "gpt-oss": CASES["sinks"],
}
MODERATE = {"initializer_range": 0.2}  # in float32; 0.6 would make attention a choice of one key


def sharded_against_whole(rank: int, name: str, shard_by_hand: bool, backend: str | None = None) -> tuple[float, ...]:
    """Loss of the sharded model and of one rank, and the largest gradient error, on ranks 0 to 3."""
    import torch.distributed as dist

    from megatron_loong import LoongConfig, build_groups, shard_sequence
    from megatron_loong.hf import parallelize, shard_batch

    family, changes, given = CASES.get(name) or ARCHITECTURES[name]
    if name in ARCHITECTURES:
        changes = {**changes, **MODERATE, "dtype": torch.float32}
    tokens = batch()[0][: len(given["labels"]), : given["labels"].shape[1]]
    groups = build_groups(LoongConfig(4, 2), range(4))
    try:
        if groups.cp_rank is None:
            return ()
        shards = shard_batch({"input_ids": tokens, **({"labels": given["labels"]} if shard_by_hand else given)}, groups)
        if shard_by_hand:
            shards |= {k: shard_sequence(x, groups, 1) for k, x in given.items() if x is not None and k != "labels"}
        model = tiny(family, "eager", **changes)
        parallelize(model, groups)
        call = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
        loss = call(**shards).loss
        loss.backward()
        # Only eager attention has sinks and soft caps.
        reference = tiny(family, "eager" if family in ("GptOss", "Gemma2") else "sdpa", **changes)
        whole = reference(input_ids=tokens, **given).loss
        whole.backward()
        for value in [loss.data, *(p.grad for p in model.parameters() if p.grad is not None)]:
            for axis in ("inner", "head"):
                dist.all_reduce(value, group=groups.handle(axis).process_group)
        pairs = [(a.grad, b.grad) for a, b in zip(model.parameters(), reference.parameters(), strict=True)]
        errors = [((a - b).norm() / b.norm()).item() for a, b in pairs if b is not None and b.norm()]
        return loss.item(), whole.item(), max(errors)
    finally:
        torch._dynamo.reset()
        groups.destroy()


def skip_what_this_transformers_lacks(family: str, given: dict[str, Any]) -> None:
    import transformers

    if not hasattr(transformers, f"{family}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    if OLD and family == "Qwen2":
        pytest.skip(f"transformers {transformers.__version__} has Qwen2's windows in flash attention alone")
    masks = getattr(transformers, "masking_utils", None)
    packs = given.get("position_ids") is not None and "attention_mask" not in given
    if packs and not hasattr(masks, "find_packed_sequence_indices"):
        pytest.skip(f"transformers {transformers.__version__} itself lets packed documents see one another")


@pytest.mark.parametrize(
    ("name", "shard_by_hand"), [*((name, False) for name in CASES), ("left-padding", True), ("packed", True)]
)
def test_masks_windows_and_packs_are_those_of_one_rank(pool: WorkerPool, name: str, shard_by_hand: bool) -> None:
    """Sharded by `shard_batch`, and by hand with `shard_sequence`."""
    skip_what_this_transformers_lacks(CASES[name][0], CASES[name][2])
    limit = 1e-5 if name == "soft-cap" else 1e-6  # Gemma 2's eager attention takes the softmax in float32
    for loss, whole, gradient_error in pool.run(sharded_against_whole, name, shard_by_hand)[:4]:
        assert abs(loss - whole) <= 1e-6 * whole
        assert gradient_error <= limit


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_in_float32_are_as_on_one_rank(pool: WorkerPool, name: str) -> None:
    skip_what_this_transformers_lacks(ARCHITECTURES[name][0], ARCHITECTURES[name][2])
    results = pool.run(sharded_against_whole, name, False)[:4]
    print(name, max(abs(loss - whole) / whole for loss, whole, _ in results), max(r[2] for r in results))
    for loss, whole, gradient_error in results:
        assert abs(loss - whole) <= 1e-5 * whole
        assert gradient_error <= 1e-5


@pytest.mark.parametrize(
    ("name", "backend"), [("window", "eager"), ("both-paddings", "aot_eager"), ("window-packed", "aot_eager")]
)
@pytest.mark.skipif(OLD, reason="torch.compile needs transformers 4.53 or newer")
def test_a_compiled_model_is_one_graph_with_the_same_numbers(pool: WorkerPool, name: str, backend: str) -> None:
    for loss, whole, gradient_error in pool.run(sharded_against_whole, name, False, backend)[:4]:
        assert abs(loss - whole) <= 1e-6 * whole
        assert gradient_error <= 1e-6


LLAMA4 = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 64}


def refusals(rank: int, layout: str) -> dict[str, str]:
    """What each mistake raises on this rank of two."""
    import transformers

    from megatron_loong import LoongConfig, build_groups
    from megatron_loong.hf import parallelize, shard_batch

    groups = build_groups(LoongConfig(2, 2, sequence_layout=layout), range(2))
    try:
        if groups.cp_rank is None:
            return {}
        tokens, labels = batch()
        whole = {"input_ids": tokens, "labels": labels}
        llama = tiny("Llama", "eager")
        parallelize(llama, groups)
        good, raised = shard_batch(whole, groups), {}

        def attempt(name: str, call: Any) -> None:
            try:
                call()
                raised[name] = "nothing"
            except (ValueError, NotImplementedError) as error:
                raised[name] = f"{type(error).__name__}: {error}"

        def without(*names: str) -> dict[str, Any]:
            return {k: x for k, x in good.items() if k not in names}

        attempt("good", lambda: llama(**good))
        attempt("whole batch", lambda: llama(input_ids=tokens))
        attempt("no positions", lambda: llama(**without("position_ids")))
        other = torch.where(torch.tensor([[False], [True]]), tokens + rank, tokens)
        attempt("other rows", lambda: llama(**shard_batch({**whole, "input_ids": other}, groups)))
        attempt("whole mask", lambda: llama(**good, attention_mask=torch.ones_like(tokens)))
        holes = torch.ones_like(tokens)
        holes[1, 30] = 0
        attempt("holes", lambda: llama(**shard_batch({**whole, "attention_mask": holes}, groups)))
        attempt("mask tensor", lambda: llama(**good, attention_mask=torch.ones(2, 1, 32, 32, dtype=torch.bool)))
        packs = packed([20, 44], [64])["position_ids"]
        with_mask = shard_batch({**whole, "attention_mask": torch.ones_like(tokens), "position_ids": packs}, groups)
        attempt("packs beside a mask", lambda: llama(**with_mask))
        attempt(
            "packs and a cache", lambda: llama(**shard_batch({**whole, "position_ids": packs}, groups), use_cache=True)
        )
        attempt("cu_seq_lens", lambda: llama(**good, cu_seq_lens_q=torch.tensor([0, 64])))
        rope = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}
        key = "rope_scaling" if OLD else "rope_parameters"
        dynamic = tiny("Llama", "eager", **{key: rope}, max_position_embeddings=32)
        parallelize(dynamic, groups)
        attempt("dynamic rope", lambda: dynamic(**good))
        for what, layers in () if OLD else (("chunks", [1, 1]), ("temperature", [0, 0])):
            kinds = ["chunked_attention" if x else "full_attention" for x in layers]
            config = transformers.Llama4TextConfig(
                **LLAMA4, vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
                num_key_value_heads=2, attention_chunk_size=16, layer_types=kinds, no_rope_layers=layers,
            )  # fmt: skip
            llama4 = transformers.Llama4ForCausalLM(config)
            attempt(what, lambda llama4=llama4: parallelize(llama4, groups))
        attempt("good again", lambda: llama(**good))
        return raised
    finally:
        groups.destroy()


REFUSED = {
    "good": "nothing",
    "whole batch": "ValueError: each rank's position_ids count from 0: they are missing, or every rank was handed",
    "no positions": "ValueError: each rank's position_ids count from 0: they are missing",
    "other rows": "ValueError: the ranks were given different batches: rows [1] are not the same on every rank",
    "whole mask": "ValueError: logical rank 0 holds 32 tokens of each row, but positions of 32 and an",
    "holes": "NotImplementedError: .* an attention_mask that is 0 between tokens (rows [1])",
    "mask tensor": "NotImplementedError: .* a mask tensor of its own making",
    "packs beside a mask": "ValueError: position_ids of row 0 do not go on at place 20 of 64, beside an attention_mask",
    "packs and a cache": "ValueError: position_ids restart, .* set use_cache=False",
    "cu_seq_lens": "NotImplementedError: .* cu_seq_lens_q: use a model without; documents of a pack are told by",
    "dynamic rope": "NotImplementedError: .* rope_type='dynamic' for 64 tokens: beyond 32 it depends on the length",
    "chunks": "NotImplementedError: .* layers of chunked_attention; supported: full_attention and sliding_attention",
    "temperature": "NotImplementedError: .* attn_temperature_tuning, which counts positions from 0 on every rank",
    "good again": "nothing",
}


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_what_is_no_shard_or_not_to_be_had_is_refused_on_every_rank_alike(pool: WorkerPool, layout: str) -> None:
    first, second = pool.run(refusals, layout)[:2]
    assert first == second
    assert first.keys() == REFUSED.keys() - ({"chunks", "temperature"} if OLD else set())
    for name, message in {} if OLD else REFUSED.items():
        pattern = ".*".join(re.escape(part) for part in message.split(".*"))
        assert re.match(pattern, first[name]), (name, first[name])
    for name, message in REFUSED.items():
        assert (first.get(name, message) == "nothing") == (message == "nothing"), (name, first[name])


LLAMA_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout=0.1; set it to 0"),
}


@pytest.mark.parametrize("name", LLAMA_FAULTS)
def test_a_model_that_could_not_be_right_is_refused_by_name(name: str) -> None:
    from megatron_loong.hf import parallelize

    changes, words = LLAMA_FAULTS[name]
    with pytest.raises(NotImplementedError, match=re.escape(words)):
        parallelize(tiny_llama("eager", **changes), (1,))


def test_sizes_that_do_not_divide_the_world_are_refused() -> None:
    from megatron_loong.hf import parallelize

    with pytest.raises(ValueError, match=r"context_parallel_size=4 does not divide the 1 ranks.*one of \[1\]"):
        parallelize(tiny_llama("eager"), (4, 2))


def test_a_model_that_counts_positions_or_takes_its_loss_itself_is_refused() -> None:
    from transformers import BartConfig, BartForCausalLM, RobertaConfig, RobertaForCausalLM

    from megatron_loong.hf import parallelize

    bart = BartForCausalLM(BartConfig(vocab_size=40, d_model=16, decoder_layers=1, decoder_attention_heads=2))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = RobertaForCausalLM(RobertaConfig(vocab_size=40, is_decoder=True, **sizes))
    for model in (bart, roberta):
        model.config.attention_dropout = 0.0
        with pytest.raises(NotImplementedError, match=f"does not work with {type(model).__name__}"):
            parallelize(model, (1,))


def test_under_autocast_q_and_k_are_narrowed_as_v_is() -> None:
    from megatron_loong.hf import parallelize, shard_batch

    tokens = torch.randint(0, 40, (1, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = tiny_llama("sdpa").float()
        batch: dict[str, Any] = {"input_ids": tokens, "labels": tokens}
        if ours:
            batch = shard_batch(batch, parallelize(model, (1,)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
