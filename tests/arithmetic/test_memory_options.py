"""The memory switches: which choices are refused, by which words; and the memory model's own arithmetic."""

from __future__ import annotations

import dataclasses
import re
import types
from typing import Any

import pytest

from megatron_loong.__main__ import main
from megatron_loong.integration.memory_options import check_recompute, check_tiled
from megatron_loong.integration.options import LoongOptions
from megatron_loong.planner.memory import MemoryPlan, peak, state_bytes
from megatron_loong.planner.memory_table import longest_sequence
from megatron_loong.planner.model import MODELS
from megatron_loong.planner.units import tokens

LLAMA = MODELS["llama3-8b"]


def loong(**fields: Any) -> LoongOptions:
    return LoongOptions("loong", **{f"loong_{name}": value for name, value in fields.items()})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loong_selective_checkpoint": "all"}, "needs --context-parallel-impl loong, which is native"),
        ({"loong_offload_attention": True}, "--loong-offload-attention says how .* add --loong-selective-checkpoint"),
        ({"loong_keep_exchange": "1"}, "--loong-keep-exchange says how"),
        ({"context_parallel_impl": "loong", "loong_selective_checkpoint": "4-2"}, "'4-2' must be all, off, or layers"),
        ({"loong_tiled_loss": -1}, "--loong-tiled-loss -1 must be"),
        ({"loong_tiled_mlp": "4"}, "--loong-tiled-mlp '4' must be"),
    ],
)
def test_values_that_can_never_work(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoongOptions(**fields)


@pytest.mark.parametrize(
    ("fields", "holder", "message"),
    [
        ({"selective_checkpoint": "all"}, {}, "--loong-selective-checkpoint .* needs --recompute-granularity full"),
        ({"offload_activations": True}, {"recompute_granularity": "selective"}, "granularity is selective"),
        ({"selective_checkpoint": "9"}, {"recompute_granularity": "full", "num_layers": 8}, "names layer 9, but"),
        (
            {"offload_activations": True},
            {"recompute_granularity": "full", "distribute_saved_activations": True},
            "both move the checkpointed inputs",
        ),
    ],
)
def test_recomputation_that_does_not_go_with_them(fields: dict[str, Any], holder: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_recompute(loong(**fields), types.SimpleNamespace(**holder))


@pytest.mark.parametrize("attribute", ["num_experts", "num_moe_experts", "add_bias_linear", "fp8"])
def test_what_a_tiled_mlp_does_not_go_with(attribute: str) -> None:
    with pytest.raises(NotImplementedError, match="supported: dense MLPs"):
        check_tiled(LoongOptions(loong_tiled_mlp=4), types.SimpleNamespace(**{attribute: 8}))
    check_tiled(LoongOptions(), types.SimpleNamespace(**{attribute: 8}))


def test_eighteen_bytes_a_parameter() -> None:
    states = state_bytes(LLAMA, MemoryPlan(seq_len=8192))
    assert sum(states.values()) == 18 * (LLAMA.total_params + (2 * LLAMA.num_layers + 1) * LLAMA.hidden_size)
    spread = state_bytes(LLAMA, MemoryPlan(seq_len=8192, zero_optimizer_size=8))
    assert spread["optimizer states"] * 8 == states["optimizer states"]


@pytest.mark.parametrize("kernels", ["local", "fused"])
@pytest.mark.parametrize("selective", ["ring", "exchange"])
def test_the_stash_costs_what_design_section_5_says(kernels: str, selective: str) -> None:
    """2 S h d / N of out and 4 S h / N of lse for every layer, on top of full recomputation, while the loss is made."""
    plan = MemoryPlan(seq_len=1 << 17, context_parallel_size=8, kernels=kernels)
    kept = peak(LLAMA, dataclasses.replace(plan, selective_checkpoint=selective)).terms["attention out and lse"]
    heads, width, tokens = LLAMA.num_attention_heads, LLAMA.head_dim, (1 << 17) // 8
    ring = tokens * (2 * heads * width + 4 * heads)
    exchange = ring + 2 * tokens * width * (heads + 2 * LLAMA.num_query_groups)
    assert kept == LLAMA.num_layers * (ring if selective == "ring" else exchange)


def test_the_longest_sequence_fits_and_the_next_does_not() -> None:
    plan = MemoryPlan(seq_len=1, context_parallel_size=8, zero_param_size=8, zero_grad_size=8, zero_optimizer_size=8)
    budget = 70 * 10**9
    found = longest_sequence(LLAMA, plan, budget)
    assert found is not None
    seq_len, report = found
    assert report.peak_bytes <= budget < peak(LLAMA, dataclasses.replace(plan, seq_len=seq_len + 8192)).peak_bytes
    assert longest_sequence(LLAMA, plan, 10**9) is None


def test_each_switch_lengthens_the_sequence_on_eight_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--model", "llama3-8b", "--gpus", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    lengths = [tokens(line[48:65].strip()) for line in lines[3:8]]
    assert lengths == sorted(lengths) and len(set(lengths)) == 5
    assert "MODELLED" in lines[0] and "ZeRO-3" in lines[1]
    offload = next(line for line in lines if line.startswith("+ --loong-offload-activations"))
    assert re.search(r" 3904K +131 ", offload)  # 32 layers x 499,712 tokens x 4096 x 2 bytes


def test_lengths_are_written_as_for_plan(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for length in ("65536", "64K"):
        assert main(["memory", "--gpus", "8", "--seq-length", length]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and "--seq-length 64K" in texts[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpus 0", "--gpus 0 is not a multiple"),
        ("--tensor-model-parallel-size 0", "--tensor-model-parallel-size 0 x"),
        ("--gpus 6 --tensor-model-parallel-size 3", "--tensor-model-parallel-size 3 does not divide the 32 heads"),
    ],
)
def test_sizes_that_cannot_be(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_command_line_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--model", "gpt-9"]) == 2
    assert "--model gpt-9 is unknown" in capsys.readouterr().err
