"""The stash of Selective Checkpoint++: whose call gets which result, and when the memory is free again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_loong import LoongConfig, attention_2d, build_groups
from megatron_loong.attention import call as module
from megatron_loong.recompute import selective
from megatron_loong.recompute.selective import StashedFunction, keeping, kept_bytes

HEADS, KV_HEADS, WIDTH, TOKENS = 4, 2, 8, 8
GROUPS = build_groups(LoongConfig(1), [0])


class Reentrant(torch.autograd.Function):
    """A checkpoint as Megatron writes it: no graph in the first run, a replay and an inner backward later."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *args: torch.Tensor) -> Any:
        ctx.function, ctx.rng_state = function, torch.get_rng_state()
        with torch.no_grad():
            out = function(*args)
        ctx.save_for_backward(*args)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.rng_state)
            out = ctx.function(*inputs)
        torch.autograd.backward(out, grad)
        return (None, *(x.grad for x in inputs))


def reentrant(function: Callable[..., Any], *args: torch.Tensor) -> Any:
    return Reentrant.apply(StashedFunction(function), *args)


CHECKPOINTS = {"reentrant": reentrant, "non-reentrant": selective.checkpoint}
both = pytest.mark.parametrize("checkpoint", CHECKPOINTS.values(), ids=CHECKPOINTS)


@pytest.fixture
def rings(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The lse of every ring forward that runs."""
    ran: list[torch.Tensor] = []
    original = module.ring_forward

    def counted(*args: Any) -> Any:
        out, lse = original(*args)
        ran.append(lse)
        return out, lse

    monkeypatch.setattr(module, "ring_forward", counted)
    return ran


class Layer(torch.nn.Module):
    """Something around attention that dropout and a projection make worth recomputing."""

    def __init__(self, attentions: int = 1, dropout: float = 0.3) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(HEADS * WIDTH, (HEADS + 2 * KV_HEADS) * WIDTH, dtype=torch.float64)
        self.attentions = attentions
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.attentions):
            qkv = self.qkv(x).unflatten(-1, (-1, WIDTH))
            q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=2)
            x = x + torch.nn.functional.dropout(attention_2d(q, k, v, GROUPS).flatten(2), self.dropout)
        return x


def step(layers: list[Layer], run: Callable[..., Any]) -> list[torch.Tensor]:
    """Output and all gradients of a stack of layers, each run by `run`, from one seed."""
    torch.manual_seed(3)
    x = first = torch.randn(1, TOKENS, HEADS * WIDTH, dtype=torch.float64, requires_grad=True)
    for layer in layers:
        x = run(layer, x)
    parameters = [p for layer in layers for p in layer.parameters()]
    for p in parameters:
        p.grad = None
    x.square().sum().backward()
    return [x.detach(), first.grad, *(p.grad for p in parameters)]  # type: ignore[list-item]


@both
@pytest.mark.parametrize("attentions", [1, 3])
def test_the_ring_runs_once_and_no_number_changes(
    checkpoint: Callable[..., Any], attentions: int, rings: list[torch.Tensor]
) -> None:
    layers = [Layer(attentions) for _ in range(2)]
    recomputed = step(layers, lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False))
    assert len(rings) == 2 * 2 * attentions
    rings.clear()
    kept = step(layers, checkpoint)
    assert len(rings) == 2 * attentions
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@both
def test_interleaved_schedules_each_get_their_own(checkpoint: Callable[..., Any], rings: list[torch.Tensor]) -> None:
    """Two micro-batches forward before the first backward, and backward in both orders (1F1B, GPipe, VPP)."""
    layers = [Layer() for _ in range(2)]
    for order in ([0, 1], [1, 0]):
        grads: dict[str, list[torch.Tensor]] = {}
        for name, run in (("plain", lambda f, x: f(x)), ("kept", checkpoint)):
            torch.manual_seed(0)
            inputs = [torch.randn(1, TOKENS, HEADS * WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]
            outs = [run(layers[1], run(layers[0], x)) for x in inputs]
            for index in order:
                outs[index].square().sum().backward()
            grads[name] = [x.grad for x in inputs]  # type: ignore[misc]
        assert all(torch.equal(a, b) for a, b in zip(grads["kept"], grads["plain"], strict=True)), order
    assert len(rings) == 2 * 2 * 4  # every forward once: 2 orders x 2 ways x 4 layer calls


@both
def test_nested_checkpoints_run_the_ring_once(checkpoint: Callable[..., Any], rings: list[torch.Tensor]) -> None:
    layers = [Layer(), Layer()]

    def block(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = checkpoint(layer, x)
        return x

    plain = step(layers[:1], lambda _, x: layers[1](layers[0](x)))
    rings.clear()
    nested = step(layers[:1], lambda _, x: checkpoint(block, x))
    assert len(rings) == 2
    assert all(torch.equal(a, b) for a, b in zip(nested, plain, strict=True))


def test_a_second_backward_runs_the_ring_again_and_is_right(rings: list[torch.Tensor]) -> None:
    layer = Layer()
    for checkpoint in CHECKPOINTS.values():
        rings.clear()
        x = torch.randn(1, TOKENS, HEADS * WIDTH, dtype=torch.float64, requires_grad=True)
        out = checkpoint(layer, x).sum()
        out.backward(retain_graph=True)
        first, x.grad = x.grad, None
        assert len(rings) == 1
        out.backward()
        assert len(rings) == 2
        assert torch.equal(first, x.grad)  # type: ignore[arg-type]


@both
def test_an_exception_between_forward_and_backward_leaks_nothing(
    checkpoint: Callable[..., Any], rings: list[torch.Tensor]
) -> None:
    layer = Layer()
    x = torch.randn(1, TOKENS, HEADS * WIDTH, dtype=torch.float64, requires_grad=True)

    def fails() -> None:
        out = checkpoint(layer, x)
        raise KeyError(out.shape)

    with pytest.raises(KeyError):
        fails()
    storages = [weakref.ref(lse) for lse in rings]
    rings.clear()
    gc.collect()
    assert all(ref() is None for ref in storages)
    expected = step([layer], lambda f, x: f(x))
    assert all(torch.equal(a, b) for a, b in zip(step([layer], checkpoint), expected, strict=True))


def test_an_exception_inside_the_function_stops_the_recording() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        Layer()(x)
        raise KeyError("inside")

    stashed = StashedFunction(fails)
    with pytest.raises(KeyError):
        stashed(torch.zeros(1, TOKENS, HEADS * WIDTH, dtype=torch.float64))
    assert len(stashed.stash) == 0
    Layer()(torch.zeros(1, TOKENS, HEADS * WIDTH, dtype=torch.float64))
    assert len(stashed.stash) == 0


@pytest.mark.parametrize("attentions", [0, 2], ids=["fewer", "more"])
def test_a_function_that_does_something_else_in_the_replay_is_an_error(attentions: int) -> None:
    layer = Layer(attentions=1)
    x = torch.randn(1, TOKENS, HEADS * WIDTH, dtype=torch.float64, requires_grad=True)
    out = reentrant(layer, x)
    layer.attentions = attentions
    with pytest.raises(RuntimeError, match="must not change in between"):
        out.sum().backward()


def test_other_shapes_in_the_replay_are_an_error() -> None:
    lengths = [TOKENS, TOKENS // 2]

    def shrinking(x: torch.Tensor) -> torch.Tensor:
        return Layer()(x[:, : lengths.pop(0)]).sum()

    with pytest.raises(RuntimeError, match="must not change in between"):
        reentrant(shrinking, torch.zeros(1, TOKENS, HEADS * WIDTH, dtype=torch.float64, requires_grad=True)).backward()


@pytest.mark.parametrize("level", ["nothing", "ring", "exchange"])
def test_bytes_kept_equal_the_formula_and_are_free_after_the_backward(level: Any, rings: list[torch.Tensor]) -> None:
    layer = Layer()

    def run(x: torch.Tensor) -> torch.Tensor:
        with keeping(level):
            return layer(x)

    stashed = StashedFunction(run)
    x = torch.randn(1, TOKENS, HEADS * WIDTH, dtype=torch.float64, requires_grad=True)
    out = Reentrant.apply(stashed, x)
    held = [t for _, restore in stashed.stash._entries for t in restore()]
    numbers = {"seq_len": TOKENS, "batch": 1, "heads": HEADS, "value_head_dim": WIDTH, "cp_size": 1}
    expected = {
        "nothing": 0,
        "ring": kept_bytes(**numbers, dtype=torch.float64),
        "exchange": kept_bytes(**numbers, dtype=torch.float64, qk_head_dim=WIDTH, kv_heads=KV_HEADS),
    }
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert sum(storages.values()) == expected[level]
    assert len(rings) == 1
    freed = [weakref.ref(t) for t in held]
    del held
    out.sum().backward()
    assert len(rings) == (2 if level == "nothing" else 1)
    assert len(stashed.stash) == 0 and all(ref() is None for ref in freed)
