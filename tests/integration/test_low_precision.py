"""fp8 and fp4: accepted where TransformerEngine is, its checkpoint hooked, lengths fitted, the rest refused by name.

TransformerEngine is not here: what stands in for it is its presence, as Megatron sees it, and its checkpoint.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core import fp8_utils
from megatron.core.enums import Fp8Recipe
from megatron.core.extensions import transformer_engine as engine
from megatron.core.transformer import transformer_block
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_loong import LoongConfig, attention_2d, build_groups
from megatron_loong.attention.stash import keeping
from megatron_loong.integration import LoongOptions, install, lengths, runtime, uninstall
from megatron_loong.integration.checks import check_args, refuse
from megatron_loong.integration.core_attention import LoongCoreAttention
from megatron_loong.integration.latent import check_latent
from megatron_loong.integration.low_precision import kernel_of_layer, refuse_low_precision, rows_multiple
from megatron_loong.kernels import registry
from megatron_loong.kernels.cpu_flash import CpuFlashKernel
from tests.integration import te_stand_in
from tests.integration.test_lengths import batch, plugin

LOONG = LoongOptions("loong")


@pytest.fixture(autouse=True)
def _uninstalled() -> Iterator[None]:
    uninstall()
    yield
    uninstall()
    registry.forget_choices()


@pytest.fixture
def with_te(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "HAVE_TE", True)


def args(**changes: Any) -> types.SimpleNamespace:
    fields = {"context_parallel_size": 4, "num_attention_heads": 8, "transformer_impl": "transformer_engine"}
    return types.SimpleNamespace(**{**fields, "seq_length": 4096, "micro_batch_size": 1, **changes})


def config(**changes: Any) -> TransformerConfig:
    fields = {"num_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "attention_dropout": 0.0, "bf16": True}
    return TransformerConfig(**{**fields, "params_dtype": torch.bfloat16, **changes})


# ---- what is accepted, and what is refused ----


@pytest.mark.parametrize("recipe", [x.value for x in Fp8Recipe])
@pytest.mark.parametrize("asked", [{"fp8": "hybrid"}, {"fp8": "e4m3"}, {"fp4": "e2m1"}], ids=str)
@pytest.mark.usefixtures("with_te")
def test_linear_layers_in_fp8_or_fp4_are_accepted(asked: dict[str, str], recipe: str) -> None:
    check_args(LOONG, args(**asked, fp8_recipe=recipe), final=True)
    refuse(args(**asked, fp8_recipe=recipe, fp8_dot_product_attention=True))


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"transformer_impl": "local"}, "hybrid is for .*--transformer-impl is local: Megatron would train"),
        ({"fp8_multi_head_attention": True}, "supported: fp8_dot_product_attention"),
        ({"hybrid_context_parallel": True}, "does not work with --fp8-format .*any length"),
    ],
)
@pytest.mark.usefixtures("with_te")
def test_what_fp8_does_not_go_with_is_refused(beside: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        check_args(LOONG, args(fp8="hybrid", **beside), final=True)


@pytest.mark.parametrize(
    ("options", "beside", "message"),
    [
        ({"loong_tiled_mlp": 4}, {"fp8": "hybrid"}, "--loong-tiled-mlp .* would be run again without fp8"),
        ({"loong_tiled_loss": 64}, {"fp8": "e4m3", "fp8_output_proj": True}, "--loong-tiled-loss .*--fp8-output-proj"),
    ],
)
def test_tiles_of_what_runs_in_fp8_are_refused(options: dict[str, Any], beside: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        check_args(LoongOptions(**options), args(**beside), final=True)
    check_args(LoongOptions(loong_tiled_loss=64), args(fp8="hybrid"), final=True)  # its head is not in fp8


def test_fp8_that_would_not_be_in_effect_is_refused() -> None:
    if not engine.HAVE_TE:
        with pytest.raises(NotImplementedError, match="--fp.-format .*transformer_engine is not installed"):
            refuse_low_precision(args(fp8="hybrid"))
    with pytest.raises(ValueError, match="without --fp8-format or --fp4-format .* --loong-kernel auto-fp8"):
        refuse_low_precision(args(fp8_dot_product_attention=True))
    refuse_low_precision(args())


def test_the_latent_is_not_taken_from_a_projection_in_fp8() -> None:
    plain = {"sequence_parallel": False, "gradient_accumulation_fusion": False, "add_bias_linear": False}
    check_latent(types.SimpleNamespace(config=types.SimpleNamespace(**plain)))
    with pytest.raises(NotImplementedError, match=r"--fp4-format e2m1 .* does not work with --loong-mla-latent"):
        check_latent(types.SimpleNamespace(config=types.SimpleNamespace(**plain, fp4="e2m1")))


# ---- attention in fp8 ----


def test_layers_left_in_bf16_are_those_that_megatron_leaves() -> None:
    for first_last in (False, True):
        made = config(fp8="hybrid", fp8_recipe="tensorwise", fp8_dot_product_attention=True)
        made.first_last_layers_bf16, made.num_layers_at_start_in_bf16, made.num_layers_at_end_in_bf16 = first_last, 2, 1
        for number in range(1, 9):
            in_bf16 = fp8_utils.is_first_last_bf16_layer(made, number - 1)
            assert kernel_of_layer("auto", made, number) == ("auto" if in_bf16 else "auto-fp8")


def test_a_kernel_that_is_named_must_have_fp8() -> None:
    asks = args(fp8="hybrid", fp8_dot_product_attention=True)
    assert kernel_of_layer("flash_attn_3_fp8", asks, 1) == "flash_attn_3_fp8"
    assert kernel_of_layer("auto-fp8", args(), 1) == "auto-fp8"
    assert kernel_of_layer("flash_attn_2", args(fp8="hybrid"), 1) == "flash_attn_2"
    with pytest.raises(ValueError, match=r"--loong-kernel flash_attn_2 does not do; use auto, flash_attn_3_fp8, flash"):
        kernel_of_layer("flash_attn_2", asks, 1)


@pytest.mark.usefixtures("with_te")
def test_a_layer_without_a_kernel_for_it_says_what_works_when_it_is_built() -> None:
    made = config(fp8="hybrid", fp8_recipe="tensorwise", fp8_dot_product_attention=True)
    groups = build_groups(LoongConfig(1), [0])
    with pytest.raises(ValueError, match=r"fp8_dot_product_attention: --loong-kernel auto-fp8(.|\n)*\(or leave it out"):
        LoongCoreAttention(made, 1, AttnMaskType.causal, "self", groups=groups)
    made.fp8_dot_product_attention = False
    assert LoongCoreAttention(made, 1, AttnMaskType.causal, "self", groups=groups).kernel == "auto"


# ---- lengths ----


@pytest.mark.parametrize("recipe", list(Fp8Recipe))
def test_rows_are_those_that_megatron_aligns_to(recipe: Fp8Recipe) -> None:
    wanted = fp8_utils.get_fp8_align_size(recipe)
    for given in (recipe, recipe.value):
        assert rows_multiple(args(fp8="hybrid", fp8_recipe=given)) == wanted
        assert rows_multiple(args(fp8="hybrid", fp8_recipe=given, micro_batch_size=4)) == wanted // 4
    assert rows_multiple(args(fp8=None)) == rows_multiple(None) == 1


def test_batches_are_padded_to_what_fp8_multiplies() -> None:
    state = plugin(cp=4, fp8="hybrid", fp8_recipe="mxfp8", micro_batch_size=2)
    assert lengths.length_for_megatron(state, 64) == 64
    padded = lengths.pad_batch(state, batch(72))["tokens"]
    assert padded.shape == (2, 128) and padded.numel() // 4 % 32 == 0
    assert lengths.length_for_megatron(plugin(cp=4, tp=2, sequence_parallel=True, fp4="e2m1"), 8) == 256


def test_a_length_that_fp8_needs_padded_is_refused_beside_what_would_see_it() -> None:
    lengths.let_megatron_accept(args(seq_length=4096, fp8="hybrid", num_experts=8))
    kept = args(seq_length=72, fp8="hybrid")
    lengths.let_megatron_accept(kept)
    assert kept.seq_length == 72
    message = r"72 is not a multiple of 64 \(16 tokens a rank for --fp8-format hybrid x .* 64 and 128"
    with pytest.raises(NotImplementedError, match=message):
        lengths.let_megatron_accept(args(seq_length=72, fp8="hybrid", num_experts=8, moe_z_loss_coeff=1e-3))


# ---- TransformerEngine's checkpoint ----


class CountingKernel(CpuFlashKernel):
    """How often the ring would have run."""

    forwards = 0

    def forward(self, *inputs: Any) -> Any:
        self.forwards += 1
        return super().forward(*inputs)


class Layer(torch.nn.Module):
    """A residual attention layer with Megatron's interface."""

    def __init__(self, number: int, kernel: CountingKernel) -> None:
        super().__init__()
        self.layer_number, self.kernel = number, kernel
        torch.manual_seed(number)
        self.project = torch.nn.Linear(32, 96, dtype=torch.float64)
        self.groups = build_groups(LoongConfig(1), [0])

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        q, k, v = self.project(hidden_states).unflatten(-1, (3, 4, 8)).unbind(2)
        with keeping("ring"):
            out = attention_2d(q, k, v, self.groups, qkv_format="sbhd", kernel=self.kernel)
        return hidden_states + out.flatten(2), None


def recomputed_block(layers: list[Layer], hidden: torch.Tensor) -> torch.Tensor:
    """Megatron's own full recomputation of `layers` under fp8."""
    settings = types.SimpleNamespace(
        fp8="hybrid",
        fp4=None,
        distribute_saved_activations=False,
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    block = types.SimpleNamespace(
        config=settings,
        layers=layers,
        num_layers_per_pipeline_rank=len(layers),
        pg_collection=types.SimpleNamespace(tp=None),
        _get_layer=lambda index: layers[index],
    )
    function: Any = getattr(transformer_block.TransformerBlock, "_checkpointed_forward", None)
    if importlib.util.find_spec("megatron.core.recompute") is not None:
        from megatron.core import recompute

        function = recompute.checkpointed_forward
    others = list(inspect.signature(function).parameters.items())[2:]
    nothing = {name: None for name, x in others if x.default is x.empty}
    return function(block, hidden, **{**nothing, "use_inner_quantization_context": False})


@pytest.fixture
def te_checkpoint_plays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Megatron's `te_checkpoint`, where it is held by value too, with the stand-in behind it."""
    for name, module in te_stand_in.modules():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(engine, "HAVE_TE", True)
    monkeypatch.setattr(engine, "is_te_min_version", lambda *_: True)
    for holder in te_stand_in.holders():
        monkeypatch.setattr(holder, "te_checkpoint", engine.te_checkpoint, raising=False)
    yield
    uninstall()  # before the stand-ins go


def gradients(layers: list[Layer], forward: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(16, 2, 32, dtype=torch.float64, requires_grad=True)
    for layer in layers:
        layer.zero_grad()
    forward(hidden).square().sum().backward()
    return [
        x.grad.clone() for x in (hidden, *(p for layer in layers for p in layer.parameters())) if x.grad is not None
    ]


def straight(layers: list[Layer], hidden: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        hidden, _ = layer(hidden)
    return hidden


@pytest.mark.usefixtures("te_checkpoint_plays")
def test_full_recomputation_under_fp8_runs_the_ring_once() -> None:
    kernel = CountingKernel()
    layers = [Layer(1, kernel), Layer(2, kernel)]
    wanted = gradients(layers, functools.partial(straight, layers))
    runs = {}
    for installed in (False, True):
        if installed:
            install()
        kernel.forwards = 0
        found = gradients(layers, functools.partial(recomputed_block, layers))
        runs[installed] = kernel.forwards
        assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))
    assert runs == {False: 4, True: 2}


@pytest.mark.usefixtures("te_checkpoint_plays")
def test_inputs_and_results_wait_on_the_host_under_fp8() -> None:
    layers = [Layer(1, CountingKernel()), Layer(2, CountingKernel())]
    wanted = gradients(layers, functools.partial(straight, layers))
    install()
    state = runtime.active().recompute
    state.offload_inputs = state.offload_attention = True
    assert all(map(torch.equal, gradients(layers, functools.partial(recomputed_block, layers)), wanted))
    for parking in (state.input_parking, state.attention_parking):
        assert parking.fetched_ahead + parking.fetched_late == 2 and not parking.waiting()
