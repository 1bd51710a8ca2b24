"""The search: what it considers, that it finds the best, how much work it does, what it says; hardware files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_loong
from megatron_loong.__main__ import main
from megatron_loong.config import LoongConfig
from megatron_loong.planner import fit
from megatron_loong.planner.candidate import Candidate, Limits, Workload
from megatron_loong.planner.choose import best_layout
from megatron_loong.planner.flags import connections, flag_value, flags_of, model_flags
from megatron_loong.planner.hardware import Curve, hardware_to_text
from megatron_loong.planner.links import Site
from megatron_loong.planner.model import MODELS, ModelShape, model_from
from megatron_loong.planner.profiles import PROFILES, load_hardware
from megatron_loong.planner.reasons import describe
from megatron_loong.planner.search import layouts, search
from megatron_loong.planner.simulate import simulate_pass
from megatron_loong.planner.step import step_cost
from megatron_loong.planner.traffic import AttentionShape

PLAN = "--hardware a100 --gpus 32 --model llama2-7b-gqa --seq-length 128K --global-batch-size 32".split()


def seconds(config: LoongConfig, shape: AttentionShape, site: Site) -> float:
    return sum(simulate_pass(config, shape, site, backward=backward).seconds for backward in (False, True))


@pytest.mark.parametrize("name", ["a100", "h100"])
@pytest.mark.parametrize("cp", [8, 16, 32])
@pytest.mark.parametrize("seq_len", [1 << 15, 1 << 18])
def test_the_best_layout_is_the_best_of_all(name: str, cp: int, seq_len: int) -> None:
    """Bounds only save work: exhaustive simulation finds nothing that is faster by more than what is worth it."""
    shape, site = AttentionShape(seq_len, 16, 4, 128), Site(PROFILES[name], 8)
    least = min(seconds(config, shape, site) for config in layouts(cp, shape.heads))
    assert seconds(best_layout(cp, shape, site), shape, site) <= least * 1.002


def test_slow_nics_change_the_layout() -> None:
    """With few KV heads, hops are small beside an all-to-all of many query heads: slow NICs call for rings."""
    shape = AttentionShape(1 << 16, 32, 2, 128)
    fast = Site(PROFILES["h100"], 8)
    slow = Site(PROFILES["h100"].with_network(nics_per_node=1, nic_gbit_per_s=10), 8)
    on_fast, on_slow = (best_layout(32, shape, site) for site in (fast, slow))
    assert on_slow.head_parallel_size < on_fast.head_parallel_size
    assert seconds(on_slow, shape, slow) < 0.9 * seconds(on_fast, shape, slow)


def test_what_is_given_stays() -> None:
    shape, site = AttentionShape(1 << 16, 32, 8, 128), Site(PROFILES["a100"], 8)
    config = best_layout(16, shape, site, head_parallel_size=2, inner_ring_size=2, placement="inner-head-outer")
    assert (config.head_parallel_size, config.inner_ring_size, config.placement) == (2, 2, "inner-head-outer")
    with pytest.raises(ValueError, match="no layout of --context-parallel-size 16 .* head-parallel size 3"):
        best_layout(16, shape, site, head_parallel_size=3)


@pytest.mark.parametrize("name, seq_len", [("llama3-70b", 1 << 20), ("llama3-8b", 1 << 17)])
def test_1024_gpus_are_searched_with_little_work(name: str, seq_len: int) -> None:
    """The time of a search follows from these counts; docs/planner.md states the time that was measured."""
    outcome = search(Workload(MODELS[name], 1024, seq_len, 1024), PROFILES["h100"])
    assert outcome.plans
    assert outcome.effort.layouts <= 2500
    assert outcome.effort.simulations <= 1000
    assert outcome.effort.candidates <= 8000


def test_slow_nics_keep_the_optimizer_in_the_node() -> None:
    """Over the ranks of a node, a share of the gradients crosses nodes; over all, gradients and parameters do."""
    work = Workload(MODELS["llama2-7b-gqa"], 64, 1 << 15, 64)
    slow = PROFILES["h200"].with_network(nics_per_node=1, nic_gbit_per_s=10)
    plan = search(work, slow, limits=Limits(tensor=1, pipeline=1)).plans[0]
    best = plan.candidate
    ranks = best.data * best.context
    assert best.zero.optimizer * best.tensor <= 8 < ranks * best.tensor
    everywhere = dataclasses.replace(best, zero=best.zero._replace(optimizer=ranks))
    costs = [step_cost(c, work, slow, plan.passes).terms_s["DP collectives"] for c in (best, everywhere)]
    assert 0 < costs[0] < costs[1]
    assert sum(fit.peak_bytes(everywhere, work).values()) < sum(fit.peak_bytes(best, work).values())
    flags = " ".join(flags_of(best, work))
    assert f"--num-distributed-optimizer-instances {ranks // best.zero.optimizer}" in flags
    assert "--num-distributed" not in " ".join(flags_of(everywhere, work))
    assert f"optimizer over {best.zero.optimizer} of {ranks} ranks" in describe(best)


def test_gradients_are_sharded_before_parameters() -> None:
    """Megatron-FSDP is for what does not fit; parameters are gathered only where sharded gradients are not enough."""
    kinds = {}
    for tensor, gpus in ((4, 8), (1, 16), (4, 16), (4, 64)):
        work = Workload(MODELS["llama3-70b"], gpus, 1 << 13, gpus)
        plans = search(work, PROFILES["h200"], limits=Limits(tensor=tensor, pipeline=1)).plans
        kinds[tensor, gpus] = None if not plans else "".join("1" if x == 1 else "k" for x in plans[0].candidate.zero)
        if plans and gpus == 16:
            strategy = "optim_grads" if tensor == 4 else "optim_grads_params"
            words = flags_of(plans[0].candidate, work)
            assert words[-4:-2] == ["--data-parallel-sharding-strategy", strategy]
            assert flag_value(words, "--ckpt-format") == "fsdp_dtensor" and connections(words) is None
    assert kinds == {(4, 8): None, (1, 16): "kkk", (4, 16): "1kk", (4, 64): "11k"}


def test_plans_are_ranked_and_fit() -> None:
    work, hardware = Workload(MODELS["llama2-7b-gqa"], 32, 1 << 17, 32), PROFILES["a100"]
    plans = search(work, hardware).plans
    assert len(plans) == 8
    for plan in plans:
        c = plan.candidate
        assert c.gpus == 32 and work.global_batch_size % c.data == 0 and work.seq_len % (2 * c.context) == 0
        assert fit.fits(plan.memory, hardware)
        assert plan.cost.seconds == pytest.approx(sum(plan.cost.terms_s.values()))
        assert math.isclose(plan.cost.tokens_per_gpu_s * 32 * plan.cost.seconds, 32 * work.seq_len)
    times = [plan.cost.seconds for plan in plans]
    assert all(b >= a * 0.995 for a, b in itertools.pairwise(times))


def test_a_term_more_is_never_faster() -> None:
    """Recomputation, slower links and a bubble cost time; that is all that the closed form has to get right."""
    work, hardware = Workload(MODELS["llama2-7b"], 16, 1 << 16, 16), PROFILES["a100"]
    base = Candidate(2, 1, 1, LoongConfig(8, 2, 4), recompute="none")
    passes = tuple(
        simulate_pass(base.attention, base.attention_shape(work), base.site(hardware), backward=b)
        for b in (False, True)
    )
    costs = [
        step_cost(dataclasses.replace(base, recompute=r), work, hardware, passes).seconds  # type: ignore[arg-type]
        for r in ("none", "selective", "full")
    ]
    assert costs == sorted(costs) and costs[0] < costs[1] < costs[2]
    slower = dataclasses.replace(hardware, node_link_bytes_per_s=hardware.node_link_bytes_per_s / 4)
    assert step_cost(base, work, slower, passes).seconds > costs[0]  # type: ignore[arg-type]


def test_mfu_is_its_formula() -> None:
    model = MODELS["llama2-7b"]
    seq_len = 4096
    params = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 32000 * 4096
    assert model.flops_per_token(seq_len) == 6 * params + 6 * 32 * 4096 * seq_len
    plan = search(Workload(model, 8, seq_len, 64), PROFILES["h100"]).plans[0]
    useful = model.flops_per_token(seq_len) * 64 * seq_len
    assert plan.cost.mfu == pytest.approx(useful / (8 * plan.cost.seconds * 989e12))
    assert 0.2 < plan.cost.mfu < 0.8


def test_published_sizes_of_models() -> None:
    billions = {name: round(model.total_params / 1e9, 1) for name, model in MODELS.items()}
    assert billions["llama2-7b"] == 6.7 and billions["llama3-8b"] == 8.0 and billions["llama3-70b"] == 70.6
    assert billions["mixtral-8x7b"] == 46.7 and billions["qwen3-30b-a3b"] == 30.5


def test_nothing_fits_says_by_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *PLAN, "--gpus", "2", "--seq-length", "4M", "--model", "llama3-70b"]) == 1
    assert "nothing fits: the leanest of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changed, message",
    [
        (["--hardware", "abacus"], "--hardware abacus: neither a file nor a profile; the profiles are a100"),
        (["--model", "gpt-9"], "--model gpt-9 is unknown; use one of llama2-7b"),
        (["--seq-length", "12345"], "--seq-length 12345: 12344 or 12346 would work .a multiple of 2 x CP"),
        (["--tensor-model-parallel-size", "3"], "--tensor-model-parallel-size 3: 1, 2, 4 or 8 would work"),
        (["--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size 0: 1, 2, 4 or 8 would work"),
        (["--context-parallel-size", "5"], "--context-parallel-size 5: 1, 2, 4, 8, 16 or 32 would work"),
        (["--pipeline-model-parallel-size", "3"], "--pipeline-model-parallel-size 3: 1, 2, 4, 8, 16 or 32 would"),
        (["--expert-model-parallel-size", "4"], "--expert-model-parallel-size 4: 1 would work"),
        (["--loong-head-parallel-size", "3"], "--loong-head-parallel-size 3: 1, 2, 4, 8, 16 or 32 would work"),
        (["--recompute", "selective", "--context-parallel-size", "1"], "--recompute selective: none or full would"),
        (["--gpus", "7"], "--gpus 7: 4 or 8 would work .*\n.*\n.*--global-batch-size 32: 28 or 35 would work"),
        (["--gpus", "12"], "--gpus 12: 8 or 16 would work"),
        (["--gpus", "24"], "--gpus 24: 16 or 32 would work"),
        (["--global-batch-size", "0"], "--global-batch-size 0 must be a whole number of at least 1"),
        (["--nics-per-node", "3"], "nics_per_node=3 and gpus_per_node=8 must divide one another"),
        (["--num-query-groups", "5"], "--num-attention-heads 32 is not a multiple of --num-query-groups 5"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_named(changed: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *PLAN, *changed]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(message, captured.err), captured.err


def test_the_text_says_why_and_with_which_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *PLAN, "--context-parallel-size", "32"]) == 0
    text = capsys.readouterr().out
    for part in ("Why", "NICs at once", "Runner-ups", "What would change the choice", "--context-parallel-impl loong"):
        assert part in text
    for part in ("--normalization RMSNorm", "--position-embedding-type rope", "--tokenizer-type", " min "):
        assert part in text
    assert "e+0" not in text


def test_json_holds_what_the_text_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *PLAN, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    plan = values["plan"]
    sizes = [plan[f"{name}_parallel_size"] for name in ("tensor", "pipeline", "data", "context")]
    assert math.prod(sizes) == 32 and values["modelled"] is True
    flags = values["flags"]
    assert flags[flags.index("--context-parallel-size") + 1] == str(plan["context_parallel_size"])
    assert plan["peak_memory_bytes"] == sum(plan["memory_bytes"].values()) and values["reasons"]


def test_an_sbatch_file_runs_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("megatron_loong.launch.slurm")
    path = tmp_path / "jobs" / "train.sbatch"
    assert main(["plan", *PLAN, "--context-parallel-size", "32", "--sbatch", str(path)]) == 0
    text = path.read_text()
    for part in ("#SBATCH --nodes=4", "--context-parallel-impl", "--num-query-groups", "pretrain_gpt.py"):
        assert part in text
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}" in text
    assert json.loads(path.with_suffix(".plan.json").read_text())["plan"]["context_parallel_size"] == 32


def test_flags_name_the_model() -> None:
    words = model_flags(MODELS["qwen3-30b-a3b"])
    given = dict(itertools.pairwise(words))
    assert given["--num-experts"] == "128" and given["--kv-channels"] == "128" and given["--num-query-groups"] == "4"
    assert "--swiglu" in words and "--group-query-attention" not in model_flags(MODELS["llama2-7b"])


def test_numbers_of_the_model_can_be_changed(capsys: pytest.CaptureFixture[str]) -> None:
    changes = "--rotary-base 5000000 --no-use-rope-scaling --norm-epsilon 1e-6 --qk-layernorm --num-layers 16".split()
    assert main(["plan", *PLAN, "--model", "llama3-8b", *changes, "--json"]) == 0
    words = json.loads(capsys.readouterr().out)["model_flags"]
    given = dict(itertools.pairwise(words))
    assert (given["--rotary-base"], given["--norm-epsilon"], given["--num-layers"]) == ("5000000", "1e-06", "16")
    assert "--qk-layernorm" in words and "--use-rope-scaling" not in words
    assert main(["plan", *PLAN, "--norm-epsilon", "2"]) == 2
    assert "--norm-epsilon 2.0 must be a number from 0 to 1" in capsys.readouterr().err


def test_an_mfu_above_100_percent_is_remarked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "slow.json"
    path.write_text('{"base": "a100", "peak_flops_per_s": 1e14}')
    assert main(["plan", *PLAN, "--hardware", str(path)]) == 0
    assert "an MFU above 100% cannot be" in capsys.readouterr().out
    assert main(["plan", *PLAN]) == 0
    assert "above 100%" not in capsys.readouterr().out


def test_a_reader_that_goes_and_a_folder_that_cannot_be_written_are_no_tracebacks() -> None:
    command = [sys.executable, "-m", "megatron_loong"]
    writer = subprocess.Popen(
        [*command, "plan", *PLAN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert writer.stdout is not None and writer.stderr is not None
    writer.stdout.close()
    assert (writer.stderr.read(), writer.wait(60)) == ("", 141)
    for flag in ("--sbatch", "--pictures"):
        ended = subprocess.run([*command, "plan", *PLAN, flag, "/dev/null/x/y"], capture_output=True, text=True)
        assert ended.returncode == 2 and "/dev/null" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("words", [["--version"], ["plan", "--version"], ["sbatch", "--version"]])
def test_the_version_is_said(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out == f"megatron_loong {megatron_loong.__version__}\n"


def test_what_is_decided_stays_decided() -> None:
    limits = Limits(tensor=2, pipeline=2, context=4, head_parallel=2, recompute="full")
    for plan in search(Workload(MODELS["llama2-7b-gqa"], 32, 1 << 16, 32), PROFILES["a100"], limits=limits).plans:
        c = plan.candidate
        assert (c.tensor, c.pipeline, c.context, c.attention.head_parallel_size, c.recompute) == (2, 2, 4, 2, "full")


def test_plans_ask_only_for_what_the_plugin_can_do() -> None:
    """No tiled experts, and no Selective Checkpoint++ without a context-parallel group."""
    moe = search(Workload(MODELS["mixtral-8x7b"], 16, 1 << 16, 16), PROFILES["h100"], keep=30)
    assert moe.plans and not any(plan.candidate.tiled_mlp for plan in moe.plans)
    short = search(Workload(MODELS["llama3-8b"], 8, 1 << 13, 64), PROFILES["h100"], limits=Limits(context=1), keep=30)
    assert {plan.candidate.recompute for plan in short.plans} <= {"none", "full"}
    long = search(Workload(MODELS["llama3-8b"], 8, 1 << 18, 8), PROFILES["h100"], keep=30)
    assert any(p.candidate.tiled_logits for p in long.plans)


def test_experts_are_placed() -> None:
    work = Workload(MODELS["mixtral-8x7b"], 64, 1 << 15, 64)
    plans = search(work, PROFILES["h100"]).plans
    assert plans and all(8 % plan.candidate.expert == 0 for plan in plans)


# ---- models and hardware ----


def test_models_from_flags() -> None:
    assert model_from("llama2-7b", {"num_layers": 16, "vocab_size": None}).num_layers == 16
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128}
    assert model_from(None, sizes) == ModelShape(2, 64, 4, 4, 128)
    with pytest.raises(ValueError, match="not known without --ffn-hidden-size, --hidden-size"):
        model_from(None, {"num_layers": 2, "num_attention_heads": 4})


@pytest.mark.parametrize("name", PROFILES)
def test_every_number_of_a_profile_has_its_source(name: str) -> None:
    hardware = PROFILES[name]
    derived = {"name", "sources", "gpus_per_node", "kernel_overhead_s", "dtype_bytes"}
    derived |= {"node_fabric_bytes_per_s", "nic_order"}
    derived |= {"message_busy_s", "node_link_busy_s_per_byte", "nic_busy_s_per_byte"}  # of machines without NVLink
    for field in dataclasses.fields(hardware):
        key = "attention" if field.name.startswith("attention") else field.name
        assert field.name in derived or hardware.sources.get(key), f"{name}: no source for {field.name}"
    assert hardware.matmul_flops_per_s < hardware.peak_flops_per_s
    for curve in (hardware.attention_forward, hardware.attention_backward):
        assert all(rate < hardware.peak_flops_per_s for _, rate in curve.points)


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    for name, hardware in PROFILES.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(hardware_to_text(hardware))
        assert load_hardware(str(path)) == hardware


def test_a_file_changes_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "ours.json"
    path.write_text('{"base": "h100", "name": "ours", "nics_per_node": 2}')
    assert load_hardware(str(path)) == dataclasses.replace(PROFILES["h100"], name="ours", nics_per_node=2)


def test_other_yaml_is_read_where_pyyaml_is(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text("base: h100\nnics_per_node: 4   # two rails are down\n")
    try:
        import yaml  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="needs PyYAML"):
            load_hardware(str(path))
    else:
        assert load_hardware(str(path)).nics_per_node == 4


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"base": "h100", "nisc_per_node": 2}', "no field nisc_per_node"),
        ('{"base": "pentium"}', "base 'pentium' is unknown"),
        ('{"name": "x"}', "missing attention_backward"),
        ('{"base": "h100", "nic_order": "random"}', "nic_order='random' is unknown"),
        ('{"base": "h100", "nic_bytes_per_s": 0}', "nic_bytes_per_s=0 must be above 0"),
        ('{"base": "h100", "attention_forward": 5}', "attention_forward must map block lengths"),
        ("[1, 2]", "must hold a mapping"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_hardware(str(path))


def test_a_curve_is_ascending() -> None:
    with pytest.raises(ValueError, match="ascending"):
        Curve(((2048, 1.0), (1024, 2.0)))


def test_planning_does_not_import_torch() -> None:
    command = (
        "import sys; from megatron_loong.__main__ import main;"
        f"code = main(['plan', *{PLAN!r}]);"
        "assert code == 0 and 'torch' not in sys.modules, sorted(m for m in sys.modules if 'torch' in m)"
    )
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)
