"""What a plan is held against, and experts: never cut, their states spread over fewer copies than the rest's."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_loong.__main__ import main
from megatron_loong.config import LoongConfig
from megatron_loong.planner.baselines import baselines
from megatron_loong.planner.candidate import Candidate, Workload, ZeroSizes
from megatron_loong.planner.error_band import ERROR_BAND
from megatron_loong.planner.fit import host_bytes, memory_plan
from megatron_loong.planner.flags import flags_of
from megatron_loong.planner.memory import MemoryPlan, state_bytes
from megatron_loong.planner.model import MODELS
from megatron_loong.planner.profiles import PROFILES
from megatron_loong.planner.search import search
from megatron_loong.planner.step import experts_in_node


def test_a_plan_names_what_the_job_takes_without_this_package(capsys: pytest.CaptureFixture[str]) -> None:
    job = ["plan", "--hardware", "h100", "--gpus", "64", "--model", "llama3-8b", "--seq-length", "1M"]
    job += ["--global-batch-size", "8"]
    assert main(job) == 0
    text = capsys.readouterr().out
    rows, median, largest = ERROR_BAND["h100"]
    assert f"published training runs on this GPU: within {largest}%, half of {rows} within {median}%" in text
    assert main([*job, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    native, fsdp = plan["baselines"]
    assert (native["name"], native["recompute"]) == ("Megatron's native CP (a2a+p2p)", "full")
    for one in (native, fsdp):
        assert one["times_the_plan"] == one["step_s"] / plan["plan"]["step_s"] > 1.15
        assert f"{one['times_the_plan']:.2f}x the time" in text
    assert plan["error_band"] == {"rows": rows, "median_percent": median, "largest_percent": largest}
    assert main(["plan", "--hardware", "h800", *job[3:]]) == 0
    assert "no published training run on this GPU" in capsys.readouterr().out


def test_native_context_parallelism_splits_no_more_heads_than_there_are_kv_heads() -> None:
    work, hardware = Workload(MODELS["llama3-8b"], 64, 1 << 20, 8), PROFILES["h100"]
    for tensor, most in ((1, 8), (2, 4), (4, 2), (8, 1)):
        winner = Candidate(tensor, 1, 1, LoongConfig(64 // tensor), "selective")
        native = baselines(winner, work, hardware)[0]
        assert native.candidate.attention.head_parallel_size <= most
        assert native.candidate.recompute == "full"


def test_experts_are_not_cut_and_their_states_are_spread_over_their_copies() -> None:
    """TP 2, CP 8, EP 4: of 16 ranks, 4 hold the same experts, and 8 the same rest."""
    model, layers = MODELS["mixtral-8x7b"], 32
    plan = MemoryPlan(
        1 << 15, tensor_parallel_size=2, context_parallel_size=8, expert_parallel_size=4, zero_optimizer_size=8
    )
    experts = layers * 8 * model.expert_params // 4
    dense = (model.total_params - 4 * experts) // 2
    norms = (2 * layers + 1) * model.hidden_size
    states = state_bytes(model, plan)
    assert states["parameters"] == 2 * (dense + norms + experts)
    assert states["optimizer states"] == 12 * ((dense + norms) // 8 + experts // 4)
    work = Workload(model, 16, 1 << 15, 1)
    candidate = Candidate(2, 1, 1, LoongConfig(8), zero=ZeroSizes(1, 1, 8), expert=4)
    assert candidate.stage_params(work) == dense + experts
    assert candidate.stage_params(work, 8) == dense / 8 + experts / 4
    words = flags_of(candidate, work)
    assert words[words.index("--expert-tensor-parallel-size") + 1] == "1" and "--moe-grouped-gemm" in words


@pytest.mark.parametrize(
    "placement, tensor, expert, in_node",
    [
        ("head_first", 1, 8, 8),
        (
            "context_first",
            1,
            8,
            2,
        ),  # eight neighbours: two ring ranks of four heads, each head on a node
        ("inner-head-outer", 1, 8, 2),
        ("head_first", 2, 8, 8),
        ("head_first", 1, 16, 8),
        ("head_first", 1, 64, 8),
    ],
)
def test_experts_stand_where_the_placement_puts_them(placement: str, tensor: int, expert: int, in_node: int) -> None:
    config = LoongConfig(32, 4, 8, placement)
    candidate = Candidate(tensor, 1, 2, config, expert=expert)
    assert experts_in_node(candidate, PROFILES["h100"]) == in_node


def test_what_no_memory_holds_names_what_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    job = ["plan", "--hardware", "h100", "--model", "llama3-8b", "--global-batch-size", "1", "--gpus", "8"]
    assert main([*job, "--seq-length", "6M"]) == 1
    error = capsys.readouterr().err
    assert "--gpus 8: 16 would do" in error
    length = error.rsplit("--seq-length 6M: ")[1].split()[0]
    assert main([*job, "--seq-length", length, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["plan"]["offload_activations"] and plan["host_memory_bytes"] > 0
    assert "--loong-offload-activations" in plan["flags"]


def test_no_plan_takes_more_host_memory_than_a_node_has() -> None:
    work, hardware = Workload(MODELS["llama3-8b"], 8, 1 << 20, 1), PROFILES["h100"]
    best = search(work, hardware).plans[0]
    host = host_bytes(work.model, memory_plan(best.candidate, work))
    assert best.candidate.offload and 0 < 8 * host <= 0.92 * hardware.host_memory_bytes
    small = dataclasses.replace(hardware, host_memory_bytes=8 * host)
    other = search(work, small).plans[0]
    assert 8 * host_bytes(work.model, memory_plan(other.candidate, work)) < 8 * host
    assert other.cost.seconds > best.cost.seconds


@pytest.mark.parametrize(
    "words, message",
    [
        (["--loong-head-parallel-size", "3"], "--loong-head-parallel-size 3 does not divide --gpus / (TP x PP) of 8"),
        (["--loong-inner-ring-size", "3", "--loong-head-parallel-size", "1"], "--loong-inner-ring-size 3 does not"),
        (["--loong-inner-ring-size", "0", "--loong-head-parallel-size", "1"], "try one of [1, 2, 4, 8]"),
    ],
)
def test_memory_names_the_flag_at_fault(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--gpus", "8", *words]) == 2
    assert message in capsys.readouterr().err


def test_fine_grained_experts_are_placed_as_in_public_recipes() -> None:
    """Qwen3-30B-A3B: EP 8 in Megatron-Bridge's recipe, whatever the other sizes."""
    best = search(Workload(MODELS["qwen3-30b-a3b"], 64, 1 << 17, 64), PROFILES["h100"]).plans[0].candidate
    assert (best.expert, best.tensor) == (8, 1)
