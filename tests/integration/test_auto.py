"""`auto` asks the planner where the hardware is known, and goes by its rule of thumb where it is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_loong.integration import compat
from megatron_loong.integration.job import job_of
from megatron_loong.integration.options import LoongOptions, resolve
from megatron_loong.integration.runtime import Runtime
from megatron_loong.planner.choose import choose_layout
from megatron_loong.planner.profiles import PROFILES

ARGS = {
    "num_attention_heads": 32,
    "group_query_attention": True,
    "num_query_groups": 2,
    "hidden_size": 4096,
    "kv_channels": None,
    "seq_length": 1 << 16,
    "tensor_model_parallel_size": 1,
    "micro_batch_size": 1,
}


def resolved(options: LoongOptions, **changes: Any) -> str:
    job = job_of(options, SimpleNamespace(**{**ARGS, **changes}))
    config = resolve(options, context_parallel_size=32, heads=32, cp_ranks_in_node=8, job=job)
    assert config is not None
    return config.describe()


def test_nothing_known_of_the_hardware_keeps_the_rule() -> None:
    assert job_of(LoongOptions("loong"), SimpleNamespace(**ARGS)) is None  # no GPU here
    expected = "cp 32 = head 8 x ring 4 (outer 4 x inner 1), placement head_first, zigzag"
    assert resolved(LoongOptions("loong")) == expected
    assert resolved(LoongOptions("loong", loong_placement="auto")) == expected


def test_the_gpu_names_its_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    job = job_of(LoongOptions("loong"), SimpleNamespace(**ARGS))
    assert job is not None and (job.hardware.name, job.kv_heads, job.head_dim) == ("h100", 2, 128)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 4090")
    assert job_of(LoongOptions("loong"), SimpleNamespace(**ARGS)) is None


def test_auto_is_the_planners_answer() -> None:
    options = LoongOptions("loong", loong_placement="auto", loong_hardware="a100")
    job = job_of(options, SimpleNamespace(**ARGS))
    assert job is not None
    assert resolved(options) == choose_layout(32, 32, 8, job).describe()


def test_what_is_given_stays() -> None:
    options = LoongOptions("loong", 4, 2, loong_hardware="a100", loong_placement="auto")
    assert resolved(options).startswith("cp 32 = head 4 x ring 8 (outer 4 x inner 2)")
    by_hand = LoongOptions("loong", 4, 2, loong_hardware="a100", loong_placement="context_first")
    assert resolved(by_hand) == "cp 32 = head 4 x ring 8 (outer 4 x inner 2), placement context_first, zigzag"


def test_args_before_and_after_megatrons_validation_agree() -> None:
    options = LoongOptions("loong", loong_hardware="h100")
    assert job_of(options, SimpleNamespace(**ARGS)) == job_of(options, SimpleNamespace(**{**ARGS, "kv_channels": 128}))
    without = {**ARGS, "group_query_attention": False, "num_query_groups": 1}
    job = job_of(options, SimpleNamespace(**without))
    assert job is not None and job.kv_heads == 32


def test_sizes_that_are_unknown_keep_the_rule() -> None:
    options = LoongOptions("loong", loong_hardware="h100")
    assert job_of(options, None) is None
    assert job_of(options, SimpleNamespace(num_attention_heads=32)) is None


def test_heads_that_are_unknown_leave_it_open() -> None:
    options = LoongOptions("loong", 4, loong_placement="auto", loong_hardware="h100")
    job = job_of(options, SimpleNamespace(**ARGS))
    assert resolve(options, context_parallel_size=32, heads=None, cp_ranks_in_node=8, job=job) is None


def test_a_misspelt_profile_is_named() -> None:
    with pytest.raises(ValueError, match=r"--loong-hardware h1000: neither a file nor a profile; .* a100, a800"):
        job_of(LoongOptions("loong", loong_hardware="h1000"), SimpleNamespace(**ARGS))


def test_every_profile_is_found_by_its_name() -> None:
    from megatron_loong.planner.choose import hardware_of_gpu

    for name, profile in PROFILES.items():
        assert hardware_of_gpu(f"NVIDIA {name.upper()} 80GB") is profile


def test_the_planner_is_asked_once_for_all_layers() -> None:
    options = LoongOptions("loong", loong_placement="auto", loong_hardware="h800")
    resolved(options)
    before = choose_layout.cache_info()
    resolved(options)
    after = choose_layout.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


@pytest.mark.parametrize(("hardware", "placement"), [("a100", "inner-head-outer"), ("auto", None)])
def test_ranks_are_placed_as_the_planner_says(
    hardware: str, placement: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 KV heads of 32: on A100 the planner puts a ring of two inside the node. Unknown hardware moves nobody."""
    options = LoongOptions(
        "loong", loong_placement="auto", loong_hardware=hardware, loong_head_parallel_size=8 if placement else "auto"
    )
    runtime = Runtime(compat.find_megatron(), {})
    monkeypatch.setattr(runtime, "args", lambda: SimpleNamespace(**{**ARGS, "num_query_groups": 32}))
    for name, value in {"RANK": "1", "WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    planned = runtime.plan_placement(
        options, world_size=32, tp=1, cp=32, pp=1, num_attention_heads=32, order="tp-cp-ep-dp-pp"
    )
    if placement is None:
        assert planned is None
    else:
        assert planned is not None
        rank, config = planned
        assert config.placement == placement and rank == config.head_parallel_size
        again = runtime.plan_placement(
            options, world_size=32, tp=1, cp=32, pp=1, num_attention_heads=32, order="tp-cp-ep-dp-pp"
        )
        assert again == planned
