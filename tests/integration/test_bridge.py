"""The hook for Megatron-Bridge recipes: same checks, same options. Its training needs TransformerEngine and a GPU."""

from __future__ import annotations

import importlib.util
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_loong.integration import LoongOptions, runtime, uninstall
from megatron_loong.integration.bridge import use_loong


@pytest.fixture(autouse=True)
def _uninstalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    uninstall()
    yield
    uninstall()


def recipe(**changes: Any) -> types.SimpleNamespace:
    """What a ConfigContainer is to the hook: a model config and a group of settings called dist."""
    fields = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "context_parallel_size": 4}
    model = TransformerConfig(**{**fields, "attention_dropout": 0.0, **changes})
    return types.SimpleNamespace(model=model, dist=types.SimpleNamespace(use_tp_pp_dp_mapping=False))


def test_the_hook_installs_the_options_and_places_the_process() -> None:
    assert use_loong(recipe(), head_parallel_size=2, placement="context_first").loong_head_parallel_size == 2
    assert runtime.active().options() == LoongOptions("loong", 2, loong_placement="context_first")
    assert os.environ["RANK"] == "2"  # the second process stands where the ring's next rank belongs


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"context_parallel_size": 1}, {}, ValueError, "needs --context-parallel-size above 1"),
        ({}, {"head_parallel_size": 3}, ValueError, "head_parallel_size=3 does not divide"),
        ({}, {"head_size": 2}, ValueError, "no option 'head_size'"),
        ({"cp_comm_type": "a2a"}, {}, ValueError, "--cp-comm-type a2a"),
        ({"fp8_multi_head_attention": True}, {}, NotImplementedError, "fp8_multi_head_attention"),
    ],
)
def test_the_hook_refuses_what_the_flags_refuse(
    changes: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        use_loong(recipe(**changes), **options)


def test_bridge_still_makes_its_groups_where_we_listen() -> None:
    """Of the real package, as far as it can be read without TransformerEngine: its sources."""
    found = importlib.util.find_spec("megatron.bridge")
    if found is None or not found.submodule_search_locations:
        pytest.skip("install megatron-bridge")
    folder = Path(found.submodule_search_locations[0]) / "training"
    sources = (folder / "initialize.py").read_text() + (folder / "config.py").read_text()
    for needed in ("parallel_state.initialize_model_parallel(", "self.model.context_parallel_size", "cp_comm_type"):
        assert needed in sources
