"""`install` hooks at the seams and nowhere else, `native` changes nothing, `uninstall` puts the very objects back."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_loong.integration import LoongOptions, compat, install, runtime, signatures, uninstall
from megatron_loong.integration.core_attention import LoongCoreAttention
from megatron_loong.integration.spec import swapped_submodules

LOONG = {"context_parallel_impl": "loong"}


@pytest.fixture(autouse=True)
def _uninstalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:  # before a test's own patches are undone
    uninstall()
    yield
    uninstall()


@pytest.fixture
def seams() -> dict[str, compat.Seam]:
    return compat.seams(compat.find_megatron())


def swap(submodules: Any, layer: object = None, **config: Any) -> Any:
    return swapped_submodules(
        runtime.active(), layer, types.SimpleNamespace(**{"context_parallel_size": 2, **config}), submodules
    )


def local_submodules(**kwargs: Any) -> Any:
    return get_gpt_layer_local_spec(**kwargs).submodules.self_attention.submodules


def test_uninstall_restores_the_very_objects(seams: dict[str, compat.Seam]) -> None:
    before = {name: seam.original() for name, seam in seams.items()}
    install()
    assert not any(seam.original() is before[name] for name, seam in seams.items())
    uninstall()
    assert all(seam.original() is before[name] for name, seam in seams.items())


def test_install_and_uninstall_may_be_repeated(seams: dict[str, compat.Seam]) -> None:
    before = {name: seam.original() for name, seam in seams.items()}
    uninstall()
    install()
    hooked = {name: seam.original() for name, seam in seams.items()}
    install()
    assert all(seam.original() is hooked[name] for name, seam in seams.items())
    uninstall()
    uninstall()
    assert all(seam.original() is before[name] for name, seam in seams.items())


def test_options_of_a_second_install_take_the_place_of_the_first() -> None:
    install(LOONG)
    install()
    assert runtime.active().options().loong
    install(LoongOptions())
    assert not runtime.active().options().loong


def test_uninstall_refuses_to_cut_off_whoever_came_later(seams: dict[str, compat.Seam]) -> None:
    install()
    seam = seams["destroy_model_parallel"]
    ours = seam.original()
    setattr(seam.owner, seam.name, lambda: None)
    try:
        with pytest.raises(RuntimeError, match=r"parallel_state\.destroy_model_parallel was replaced after"):
            uninstall()
    finally:
        setattr(seam.owner, seam.name, ours)


@pytest.mark.parametrize("missing", ["initialize_model_parallel", "destroy_model_parallel", "RankGenerator"])
def test_a_missing_seam_names_itself_and_the_tested_versions(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(f"megatron.core.parallel_state.{missing}")
    with pytest.raises(NotImplementedError, match=rf"no megatron\.core\.parallel_state\.{missing}.*0\.16\.1.*0\.19\.2"):
        install()
    with pytest.raises(RuntimeError, match="not installed"):
        runtime.active()


def test_a_changed_constructor_is_a_missing_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = compat.find_megatron().attention_class
    monkeypatch.setattr(attention, "__init__", lambda self, submodules, config: None)
    with pytest.raises(NotImplementedError, match=r"Attention\.__init__\(self, config, submodules, \.\.\.\)"):
        install()


def changed(function: Any, *new: str) -> Any:
    """`function` as a later Megatron might have it, with further parameters."""
    old = inspect.signature(function)
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in new]

    def later(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    later.__signature__ = old.replace(parameters=[*old.parameters.values(), *more])  # type: ignore[attr-defined]
    return later


def test_the_table_of_signatures_is_this_megatron_s(seams: dict[str, compat.Seam]) -> None:
    assert compat.untested(compat.find_megatron(), seams) is None
    assert not any(signatures.news(name.partition("@")[0], seam.original()) for name, seam in seams.items())


def test_an_untested_megatron_is_said_in_one_line_with_what_differs(
    seams: dict[str, compat.Seam], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seam = seams["roll"]
    monkeypatch.setattr("megatron.core.__version__", "0.99.0")
    monkeypatch.setattr(seam.owner, seam.name, changed(seam.original(), "backwards"))
    install()
    (line,) = capsys.readouterr().out.splitlines()
    assert "megatron-core 0.99.0 was not tested" in line and "roll_tensor takes backwards" in line


@pytest.mark.parametrize("name", ["roll_packed", "rotary_thd", "mamba_undo"])
def test_an_argument_that_a_hook_would_lose_is_an_error_at_start(
    name: str, seams: dict[str, compat.Seam], monkeypatch: pytest.MonkeyPatch
) -> None:
    seam = seams[name]
    monkeypatch.setattr(seam.owner, seam.name, changed(seam.original(), "backwards"))
    with pytest.raises(NotImplementedError, match=f"no .*{seam.name} without backwards, which megatron_loong holds on"):
        install()


def test_what_megatron_passes_besides_reaches_the_original(
    seams: dict[str, compat.Seam], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    seam, passed = seams["roll"], []

    def later(tensor, shifts=-1, dims=-1, cp_group=None, packed_seq_params=None, return_sum=True):
        passed.append(return_sum)
        return tensor, None

    monkeypatch.setattr(seam.owner, seam.name, later)
    install(LOONG)
    assert seam.original()(torch.ones(4), -1, -1, None, None, return_sum=False)[1] is None
    assert passed == [False]


def test_importing_the_package_imports_neither_torch_nor_megatron() -> None:
    script = (
        "import sys; from megatron_loong.integration import LoongOptions; "
        "sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).resolve().parents[2]).returncode == 0


def test_native_leaves_submodules_and_groups_alone(capsys: pytest.CaptureFixture[str]) -> None:
    install()
    submodules = local_submodules()
    assert swap(submodules) is submodules
    assert len(runtime.active().groups) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mla", [False, True], ids=["gpt", "mla"])
def test_a_spec_made_before_install_is_swapped_and_not_written_to(mla: bool) -> None:
    submodules = local_submodules(multi_latent_attention=mla)
    install(LOONG)
    swapped = swap(submodules)
    assert swapped.core_attention is LoongCoreAttention
    assert submodules.core_attention is DotProductAttention
    others = [field.name for field in dataclasses.fields(submodules) if field.name != "core_attention"]
    assert all(getattr(swapped, name) is getattr(submodules, name) for name in others)


def test_a_config_may_ask_for_itself() -> None:
    install()
    assert swap(local_submodules(), context_parallel_impl="loong").core_attention is LoongCoreAttention


def test_the_transformer_engine_class_is_stock_even_where_it_is_a_mock() -> None:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    install(LOONG)
    submodules = dataclasses.replace(local_submodules(), core_attention=TEDotProductAttention)
    assert swap(submodules).core_attention is LoongCoreAttention


def test_builders_around_the_class_keep_what_they_carry() -> None:
    install(LOONG)
    spec = ModuleSpec(module=DotProductAttention, params={"attention_dropout": 0.0})
    swapped = swap(dataclasses.replace(local_submodules(), core_attention=spec)).core_attention
    assert (swapped.module, swapped.params) == (LoongCoreAttention, {"attention_dropout": 0.0})
    partial = functools.partial(DotProductAttention, attention_dropout=0.0)
    swapped = swap(dataclasses.replace(local_submodules(), core_attention=partial)).core_attention
    assert (swapped.func, swapped.keywords) == (LoongCoreAttention, {"attention_dropout": 0.0})
    again = dataclasses.replace(local_submodules(), core_attention=LoongCoreAttention)
    assert swap(again).core_attention is LoongCoreAttention  # MLA's constructor calls Attention's


def test_another_core_attention_is_refused_by_name() -> None:
    class HomeMade(DotProductAttention):  # a subclass may compute anything
        pass

    install(LOONG)
    with pytest.raises(NotImplementedError, match=r"HomeMade.*supported: DotProductAttention and TEDotProduct"):
        swap(dataclasses.replace(local_submodules(), core_attention=HomeMade))


def test_context_parallel_size_1_is_native_beside_the_model_and_an_error_on_the_config_that_asks() -> None:
    install(LOONG)
    submodules = local_submodules()
    assert swap(submodules, context_parallel_size=1) is submodules  # a vision tower, say
    with pytest.raises(ValueError, match="needs context_parallel_size above 1, which is 1"):
        swap(submodules, context_parallel_size=1, context_parallel_impl="loong")


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("fp8_multi_head_attention", True, "fp8_multi_head_attention .*supported: fp8_dot_product_attention"),
        ("dynamic_context_parallel", True, "--dynamic-context-parallel .*supported: --hybrid-context-parallel"),
        ("batch_invariant_mode", True, "--batch-invariant-mode"),
        ("experimental_attention_variant", "dsa", "--experimental-attention-variant dsa"),
        ("cache_mla_latents", True, "absorbed MLA"),
        ("attention_cp_layout", "contiguous", "attention_cp_layout=contiguous .*supported: zigzag"),
        ("linear_cp_layout", "contiguous", "linear_cp_layout=contiguous .*supported: zigzag"),
        ("cp_partition_mode", "contiguous", "cp_partition_mode=contiguous .*supported: zigzag, and --loong-sequence"),
        ("linear_cp_mode", "chunkwise", "linear_cp_mode=chunkwise .*supported: headwise"),
    ],
)
def test_what_does_not_work_yet_is_refused_when_the_layer_is_built(attribute: str, value: Any, message: str) -> None:
    install(LOONG)
    with pytest.raises(NotImplementedError, match=message):
        swap(local_submodules(), **{attribute: value})


def test_absorbed_mla_is_refused() -> None:
    install(LOONG)
    absorbed = runtime.active().megatron.absorbed_mla_class
    if absorbed is None:
        pytest.skip("this megatron-core has no AbsorbedMLASelfAttention")
    with pytest.raises(NotImplementedError, match="absorbed MLA"):
        swap(local_submodules(), layer=absorbed.__new__(absorbed))


def test_initialize_with_context_parallel_size_1_is_an_error_before_megatron_starts() -> None:
    from megatron.core import parallel_state

    install(LOONG)
    with pytest.raises(ValueError, match="--context-parallel-impl loong needs --context-parallel-size above 1"):
        parallel_state.initialize_model_parallel(context_parallel_size=1)
    with pytest.raises(ValueError, match="--hierarchical-context-parallel-sizes 2 2 belongs to native"):
        parallel_state.initialize_model_parallel(context_parallel_size=4, hierarchical_context_parallel_sizes=[2, 2])
