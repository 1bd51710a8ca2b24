"""A plan's flags are the model and can start: parsed, validated and built by Megatron's own functions."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

from megatron_loong.integration import compat
from megatron_loong.integration.validation import validated
from megatron_loong.planner.candidate import Workload
from megatron_loong.planner.flags import flags_of, model_flags
from megatron_loong.planner.model import MODELS, ModelShape
from megatron_loong.planner.profiles import PROFILES
from megatron_loong.planner.search import search
from tests.integration import megatron_runs

#: Name -> GPUs, tokens, sequences a step; the first two of them cannot do without Megatron-FSDP, and some not without
#: the offloads.
JOBS = {
    "llama3-405b": (512, 1 << 17, 64),
    "llama3-8b": (7, 7 << 17, 7),
    "llama2-7b": (8, 1 << 20, 1),
    "llama2-7b-gqa": (32, 1 << 17, 32),
    "llama2-13b": (16, 1 << 19, 2),
    "llama2-70b": (64, 1 << 17, 64),
    "llama3-70b": (64, 1 << 20, 4),
    "qwen2.5-14b": (32, 1 << 17, 32),
    "qwen3-8b": (8, 1 << 20, 1),
    "qwen3-32b": (32, 1 << 20, 1),
    "qwen3-30b-a3b": (64, 1 << 17, 64),
    "mixtral-8x7b": (64, 1 << 15, 64),
}
FSDP = ("llama3-405b", "llama3-8b")


@pytest.fixture(autouse=True)
def _megatron_has_a_training_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    megatron = compat.find_megatron()
    if megatron.arguments is None:
        pytest.skip(f"no megatron.training: {megatron.why_no_arguments}")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)


def planned(name: str) -> tuple[list[str], int]:
    gpus, seq_len, sequences = JOBS[name]
    work = Workload(MODELS[name], gpus, seq_len, sequences)
    return [*model_flags(work.model), *flags_of(search(work, PROFILES["h100"]).plans[0].candidate, work)], gpus


@pytest.mark.parametrize("name", MODELS)
def test_megatron_accepts_every_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words, gpus = planned(name)
    args = validated(words, gpus, 8)
    assert args.use_megatron_fsdp is (name in FSDP)
    assert args.context_parallel_size == 1 or args.context_parallel_impl == "loong"
    if name in FSDP:  # what the batch scripts set for all other plans
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        with pytest.raises(ValueError, match="FSDP requires CUDA_DEVICE_MAX_CONNECTIONS"):
            validated(words, gpus, 8)


# ---- the model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """scripts/pretrain_gpt.py, in a world of one rank."""
    path = megatron_runs.own_script()
    if path is None:
        pytest.skip("scripts/pretrain_gpt.py needs the megatron.training of megatron-core 0.17 or newer")
    from megatron.core import parallel_state

    spec = importlib.util.spec_from_file_location("pretrain_gpt", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    store = Path(tmp_path_factory.mktemp("store")) / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield module
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


#: One rank, no TransformerEngine, weights that nobody draws.
ONE_RANK = (
    "--seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 1 --bf16 --transformer-impl local "
    "--use-cpu-initialization --no-persist-layer-norm --no-gradient-accumulation-fusion --no-rope-fusion"
).split()


def parameters_of(model: ModelShape) -> int:
    """What the planner counts, and what it leaves out because it is small: norms, biases, routers."""
    norms = 2 * model.hidden_size + 2 * model.head_dim * model.qk_layernorm
    biases = model.head_dim * (model.num_attention_heads + 2 * model.num_query_groups) * model.add_qkv_bias
    router = model.hidden_size * (model.num_experts or 0)
    return model.total_params + model.num_layers * (norms + biases + router) + model.hidden_size


@pytest.mark.parametrize("name", MODELS)
def test_the_flags_are_the_model(name: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]
    assert validated([*model_flags(model), *ONE_RANK], 1, 1).num_layers == model.num_layers
    if model.num_experts:  # thousands of modules, which even empty take their time
        model = dataclasses.replace(model, num_layers=4)
    args = validated([*model_flags(model), *ONE_RANK], 1, 1)
    monkeypatch.setattr(script, "get_args", lambda: args)
    with torch.device("meta"):
        built: Any = script.provide_model()
    expected = parameters_of(model)
    assert sum(p.numel() for p in built.parameters()) == expected
    assert abs(model.total_params / expected - 1) < 1e-3
    config = built.config
    assert built.position_embedding_type == "rope" and not built.share_embeddings_and_output_weights
    assert (config.hidden_dropout, config.attention_dropout) == (0, 0)
    assert config.normalization == "RMSNorm" and config.layernorm_epsilon == model.norm_epsilon
    assert config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
    assert rotary(args) == (model.rotary_base, model.use_rope_scaling, 8.0)
    if model.num_experts:
        assert (config.moe_router_load_balancing_type, config.moe_aux_loss_coeff > 0) == ("aux_loss", True)


def rotary(args: argparse.Namespace) -> tuple[int, bool, float]:
    return args.rotary_base, args.use_rope_scaling, args.rope_scaling_factor
