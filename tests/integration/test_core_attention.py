"""`LoongCoreAttention` keeps Megatron's contract: shapes, scale, mask types, and refusals by name."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_loong import LoongConfig, build_groups
from megatron_loong.attention import prepare
from megatron_loong.integration import core_attention
from megatron_loong.integration.core_attention import LoongCoreAttention
from megatron_loong.kernels.reference import ReferenceKernel
from tests.dense import band, dense_attention

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def config(**changes: Any) -> TransformerConfig:
    numbers = {"num_layers": 2, "hidden_size": HEADS * WIDTH, "num_attention_heads": HEADS}
    return TransformerConfig(**{**numbers, "num_query_groups": KV_HEADS, "attention_dropout": 0.0, **changes})


def layer(layer_config: Any = None, layer_number: int = 1, **changes: Any) -> LoongCoreAttention:
    """A layer on one rank, whose groups are given instead of built by the plugin."""
    arguments: dict[str, Any] = {
        "attn_mask_type": AttnMaskType.causal,
        "attention_type": "self",
        "cp_comm_type": None,
        "softmax_scale": None,
        "pg_collection": None,
        "groups": build_groups(LoongConfig(1), [0]),
        **changes,
    }
    return LoongCoreAttention(layer_config or config(), layer_number, **arguments)


def qkv(v_width: int = WIDTH) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(
        torch.randn(6, 2, heads, width, dtype=torch.float64, requires_grad=True)
        for heads, width in ((HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, v_width))
    )


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    out = dense_attention(*(x.transpose(0, 1) for x in (q, k, v)), **options)
    return out.transpose(0, 1).flatten(2)


@pytest.mark.parametrize(
    ("mask_type", "causal"),
    [(AttnMaskType.causal, True), (AttnMaskType.padding_causal, True), (AttnMaskType.no_mask, False)],
)
def test_returns_this_ranks_tokens_with_heads_joined(mask_type: AttnMaskType, causal: bool) -> None:
    q, k, v = qkv(v_width=5)
    out = layer()(q, k, v, None, attn_mask_type=mask_type)
    assert out.shape == (6, 2, HEADS * 5)
    torch.testing.assert_close(out, dense(q, k, v, causal=causal), rtol=0, atol=1e-12)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (q, k, v))


def test_the_mask_type_of_the_layer_holds_when_the_call_names_none() -> None:
    q, k, v = qkv()
    full = layer(attn_mask_type=AttnMaskType.no_mask)(q, k, v, None)
    torch.testing.assert_close(full, dense(q, k, v, causal=False), rtol=0, atol=1e-12)


def test_a_causal_layer_ignores_the_mask_tensor_as_transformer_engine_does() -> None:
    q, k, v = qkv()
    nonsense = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    assert torch.equal(layer()(q, k, v, nonsense), layer()(q, k, v, None))


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 1 / math.sqrt(WIDTH)),
        ({"softmax_scale": 0.3}, 0.3),
        ({"k_channels": 16, "v_channels": 4}, 0.25),  # MLA
    ],
)
def test_softmax_scale(changes: dict[str, Any], scale: float) -> None:
    assert layer(**changes).softmax_scale == pytest.approx(scale)


def test_query_key_layer_scaling_changes_no_score() -> None:
    scaled = layer(config(apply_query_key_layer_scaling=True), layer_number=3)
    assert scaled.softmax_scale == pytest.approx(1 / math.sqrt(WIDTH))


def test_no_parameters_no_state_and_what_megatron_reads_is_there() -> None:
    built = layer()
    assert list(built.parameters()) == [] and built.state_dict() == {}
    assert built.softmax_offset is None and built.current_max_attn_logits is None


def test_kernel_and_determinism_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: object, **options: Any) -> torch.Tensor:
        calls.append(options)
        return q

    monkeypatch.setattr(core_attention, "attention_2d", fake)
    q, k, v = qkv()
    built = layer(config(deterministic_mode=True))
    built.kernel = "reference"
    assert built(q, k, v, None).shape == (6, 2, HEADS * WIDTH)
    assert calls == [
        {
            "qkv_format": "sbhd",
            "causal": True,
            "softmax_scale": built.softmax_scale,
            "window_size": None,
            "dropout_p": 0.0,
            "dropout_seed": None,
            "softmax_offset": None,
            "max_logits": None,
            "kernel": "reference",
            "gradient_wire": "auto",
            "deterministic": True,
            "seq_len": 6,
            "varying_lengths": False,
        }
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_type": "sideways"}, "attention_type='sideways' .*supported: self- and cross-attention"),
        ({"sink": 1}, "does not know sink"),
    ],
)
def test_refused_when_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        layer(**changes)


def test_a_feature_that_no_kernel_has_here_is_refused_when_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where no kernel repeats attention dropout: before the first collective, with the flag to change."""
    monkeypatch.setattr(ReferenceKernel, "why_not", lambda self, request: "is not here")
    with pytest.raises(ValueError, match=r"(?s)--attention-dropout 0\.1 .*default is 0\.1.*give --attention-dropout 0"):
        layer(config(attention_dropout=0.1))
    layer()


@pytest.mark.parametrize("varying", [False, True])
def test_lengths_that_vary_are_said_when_the_kernel_is_chosen(varying: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents say it themselves; `variable_seq_lengths` is all there is to say it of sequences."""
    asked, choose = [], prepare.choose_kernel
    built = layer(config(variable_seq_lengths=varying, moe_token_dispatcher_type="alltoall"))
    monkeypatch.setattr(prepare, "choose_kernel", lambda x, name: (asked.append(x.varying), choose(x, name))[1])
    q, k, v = qkv()
    torch.testing.assert_close(built(q, k, v, None), dense(q, k, v, causal=True), rtol=0, atol=1e-12)
    assert asked == [varying]


def test_sliding_windows_follow_the_skip_frequency() -> None:
    """Megatron: layer n has the window unless the frequency divides n; a list says it layer by layer."""
    windowed = config(window_size=(2, 0), window_attn_skip_freq=2)
    assert [layer(windowed, n).window_size for n in (1, 2)] == [(2, 0), None]
    listed = config(window_size=(2, 0), window_attn_skip_freq=[0, 1])
    assert [layer(listed, n).window_size for n in (1, 2)] == [None, (2, 0)]
    q, k, v = qkv()
    expected = dense(q, k, v, allowed=band(6, 6, (2, 0)))
    torch.testing.assert_close(layer(windowed, 1)(q, k, v, None), expected, rtol=0, atol=1e-12)


def test_sinks_are_megatrons_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert layer(config(softmax_type="off-by-one")).state_dict() == {}
    built = layer(config(softmax_type="learnable", params_dtype=torch.float64, init_method=torch.nn.init.ones_))
    assert list(built.state_dict()) == ["softmax_offset"] and built.softmax_offset.shape == (HEADS,)
    monkeypatch.setattr(core_attention, "make_sharded_tensors_for_checkpoint", lambda *args, **options: (args, options))
    (state, prefix, split, offsets), _ = built.sharded_state_dict("x.", ((0, 1, 2),))
    assert state == {"softmax_offset": built.softmax_offset} and split == {"softmax_offset": 0}
    assert (prefix, offsets) == ("x.", ((0, 1, 2),)) and layer().sharded_state_dict() == {}
    marks = ("tensor_model_parallel", "partition_dim", "partition_stride")
    assert [getattr(built.softmax_offset, mark) for mark in marks] == [True, 0, 1], (
        "else clipping counts TP rank 0 alone"
    )
    q, k, v = qkv()
    sink = torch.ones(HEADS, dtype=torch.float64, requires_grad=True)
    expected = dense(q, k, v, causal=True, sink=sink)
    out = built(q, k, v, None)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    expected.sum().backward()
    out.sum().backward()
    torch.testing.assert_close(built.softmax_offset.grad, sink.grad, rtol=0, atol=1e-12)


def test_sinks_are_drawn_alike_for_every_tensor_parallel_size() -> None:
    drawn = []
    for tp, rank in ((1, 0), (2, 0), (2, 1)):
        group = types.SimpleNamespace(rank=lambda rank=rank: rank, size=lambda tp=tp: tp)
        torch.manual_seed(3)
        built = layer(
            config(softmax_type="learnable", tensor_model_parallel_size=tp),
            pg_collection=types.SimpleNamespace(tp=group),
        )
        drawn.append(built.softmax_offset.detach())
    assert torch.equal(torch.cat(drawn[1:]), drawn[0]) and drawn[0].unique().numel() == HEADS


def test_dropout_comes_from_megatrons_generator_and_is_off_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        core_attention, "get_cuda_rng_tracker", lambda: types.SimpleNamespace(fork=contextlib.nullcontext)
    )
    built, (q, k, v) = layer(config(attention_dropout=0.5)), qkv()
    state = torch.get_rng_state()
    first, second = built(q, k, v, None), built(q, k, v, None)
    assert not torch.equal(first, second), "each forward draws"
    torch.set_rng_state(state)
    assert torch.equal(first, built(q, k, v, None)), "recomputation puts the generator back"
    torch.testing.assert_close(built.eval()(q, k, v, None), dense(q, k, v, causal=True), rtol=0, atol=1e-12)


def test_qk_clip_finds_the_greatest_score_of_each_head() -> None:
    built, (q, k, v) = layer(config(log_max_attention_logit=True)), qkv()
    built(q, k, v, None)
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k.repeat_interleave(2, 2)) * built.softmax_scale
    expected = scores.masked_fill(~band(6, 6, (-1, 0)), -math.inf).amax((0, 2, 3)).float()
    torch.testing.assert_close(built.current_max_attn_logits, expected)
    assert not built.current_max_attn_logits.requires_grad
    built(0 * q, k, v, None)
    torch.testing.assert_close(built.current_max_attn_logits, expected.clamp(min=0)), "raised, never lowered"


def test_cross_attention_takes_keys_of_another_length() -> None:
    q, _, _ = qkv()
    _, k, v = (torch.cat([x, x.flip(0)]) for x in qkv())
    out = layer(attention_type="cross", attn_mask_type=AttnMaskType.no_mask)(q, k, v, None)
    torch.testing.assert_close(out, dense(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ignored", [{"num_splits": 1}, {"num_splits": None, "sink": None}])
def test_arguments_that_change_no_result_are_taken(ignored: dict[str, Any]) -> None:
    layer(**ignored)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"packed_seq_params": types.SimpleNamespace(qkv_format="bshd")}, "qkv_format='bshd' .*supported: 'thd'"),
        ({"attention_bias": torch.zeros(1)}, "attention bias"),
        ({"attn_mask_type": AttnMaskType.arbitrary}, "mask type arbitrary .*supported: causal"),
        ({"attn_mask_type": AttnMaskType.padding}, "mask type padding "),
        ({"attn_mask_type": AttnMaskType.padding_causal, "attention_mask": torch.ones(1)}, "mask type padding_causal"),
        ({"x": torch.zeros(1)}, "core attention with x"),  # DSA hands these in
    ],
)
def test_refused_when_called(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        layer()(*qkv(), **{"attention_mask": None, **inputs})


def test_a_layer_compiles_to_one_graph() -> None:
    """Dynamo sees no break in the layer, on one rank; see tests/multi_rank/test_compiled.py for several."""
    q, k, v = qkv()
    one = layer()
    want = one(q, k, v, None)
    torch._dynamo.reset()
    found = torch.compile(one, fullgraph=True, backend="eager")(q, k, v, None)
    torch._dynamo.reset()
    assert torch.equal(found, want)
    for x, y in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, want)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


#: Runs the check in a process of its own: it makes Megatron's groups, which other tests may have left behind here.
CHECK = """
import json, runpy, sys
import torch
from benchmarks.gpu import outcome
from megatron_loong.integration import core_attention
if sys.argv[2] == "True":
    right = core_attention.attention_2d
    core_attention.attention_2d = lambda *args, softmax_scale, **rest: right(
        *args, softmax_scale=1.01 * softmax_scale, **rest
    )
run = outcome.Run(torch.device("cpu"))
runpy.run_path(sys.argv[1])["check"](run)
print(json.dumps([run.figures, bool(run.failures)]))
"""


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "planted-fault"])
def test_the_gpu_check_holds_the_layer_against_megatrons_own(wrong: bool) -> None:
    """All ranks of a layout in one process, float32; the fault is a softmax scale that is off by 1%."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "ignore", "-c", CHECK, str(root / "scripts/check_core_attention.py"), str(wrong)]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures, failed = json.loads(done.stdout.splitlines()[-1])
    assert set(figures["relative_rms_megatron"]) == {"out", "dq", "dk", "dv"} and figures["one_rank_s"] > 0
    assert max(figures["relative_rms_megatron"].values()) <= 1e-5
    assert failed == wrong and (not wrong or "out: relative RMS error" in figures["reason"])
