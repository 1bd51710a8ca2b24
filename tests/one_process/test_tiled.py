"""Tiled loss and tiled MLP: the untiled numbers to 1e-12 in float64, in memory that does not grow with the sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.live_bytes import LiveBytes
from megatron_loong.planner.memory import tiled_loss_bytes
from megatron_loong.recompute.tiled import tiled
from megatron_loong.recompute.tiled_loss import tiled_cross_entropy

WIDTH, VOCAB = 16, 37


def dense_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, smoothing: float, z_loss: float, scale: float
) -> torch.Tensor:
    """Written down from the definition: a share `smoothing` of the label goes to the V - 1 other tokens alike."""
    log_probs = torch.log_softmax(scale * hidden @ weight.t(), dim=-1)
    target = torch.full_like(log_probs, smoothing / (weight.shape[0] - 1))
    target.scatter_(-1, labels.unsqueeze(-1), 1 - smoothing)
    lse = torch.logsumexp(scale * hidden @ weight.t(), dim=-1)
    return -(target * log_probs).sum(-1) + z_loss * lse.square()


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 2, WIDTH, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(0, VOCAB, (tokens, 2))


@pytest.mark.parametrize("tile", [1, 5, 24, 100])
@pytest.mark.parametrize(
    ("smoothing", "z_loss", "scale"), [(0.0, 0.0, 1.0), (0.1, 0.0, 1.0), (0.0, 1e-2, 0.5), (0.2, 1e-3, 2.0)]
)
def test_tiled_loss_and_gradients(tile: int, smoothing: float, z_loss: float, scale: float) -> None:
    hidden, weight, labels = inputs(12)
    weights = torch.rand(12, 2, dtype=torch.float64)  # Megatron's loss mask weighs tokens after the loss
    losses = tiled_cross_entropy(
        hidden, weight, labels, tile=tile, label_smoothing=smoothing, z_loss=z_loss, logit_scale=scale
    )
    expected = dense_loss(hidden, weight, labels, smoothing, z_loss, scale)
    grads = torch.autograd.grad((losses * weights).sum(), (hidden, weight))
    wanted = torch.autograd.grad((expected * weights).sum(), (hidden, weight))
    for name, found, right in zip(("loss", "d_hidden", "d_weight"), (losses, *grads), (expected, *wanted), strict=True):
        assert (found - right).abs().max() <= 1e-12, name


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = inputs(4, torch.float32)
    losses = tiled_cross_entropy(hidden * 1e4, weight, labels, tile=3)
    torch.testing.assert_close(losses, dense_loss(hidden * 1e4, weight, labels, 0.0, 0.0, 1.0), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_good_as_untiled_bfloat16() -> None:
    hidden, weight, labels = inputs(64, torch.bfloat16)
    truth = dense_loss(hidden.double(), weight.double(), labels, 0.0, 0.0, 1.0)
    untiled = torch.nn.functional.cross_entropy(
        (hidden @ weight.t()).float().flatten(0, 1), labels.flatten(), reduction="none"
    )
    found = tiled_cross_entropy(hidden, weight, labels, tile=10)
    assert found.dtype == torch.float32
    errors = []
    for losses in (found, untiled.view_as(found)):
        (d_weight,) = torch.autograd.grad(losses.sum(), weight)
        (right,) = torch.autograd.grad(truth.sum(), weight, retain_graph=True)
        errors.append((d_weight.double() - right.double()).square().mean().sqrt())
    assert errors[0] <= 1.5 * errors[1]


def test_a_frozen_weight_and_a_frozen_hidden_get_no_gradient() -> None:
    hidden, weight, labels = inputs(6)
    tiled_cross_entropy(hidden, weight.detach(), labels, tile=4).sum().backward()
    assert hidden.grad is not None and weight.grad is None
    tiled_cross_entropy(hidden.detach(), weight, labels, tile=4).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": 0}, "tile=0 must be"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"labels": None}, "fit together"),
    ],
)
def test_what_cannot_be_is_an_error(change: dict[str, Any], message: str) -> None:
    hidden, weight, labels = inputs(4)
    arguments = {"labels": labels, **change}
    if arguments["labels"] is None:
        arguments["labels"] = labels[:2]
    with pytest.raises(ValueError, match=message):
        tiled_cross_entropy(hidden, weight, **arguments)


def working_bytes(run: Callable[[], torch.Tensor], given: list[torch.Tensor], made: int) -> int:
    """Peak of forward and backward over what was given, less the `made` bytes that any way to compute it must make."""
    with LiveBytes() as live:
        live.watch(given)
        before = live.live_bytes
        run().sum().backward()
    return live.peak_bytes - before - made


def test_the_loss_needs_no_more_memory_for_a_longer_sequence() -> None:
    vocab, peaks, untiled = 512, [], []
    for tokens in (256, 1024, 4096):
        hidden = torch.randn(tokens, WIDTH, requires_grad=True)
        weight = torch.randn(vocab, WIDTH, requires_grad=True)
        labels = torch.randint(0, vocab, (tokens,))
        given = [hidden, weight, labels]
        made = hidden.nbytes + 4 * tokens  # hidden's gradient, and an lse per token
        peaks.append(working_bytes(partial(tiled_cross_entropy, *given, tile=64), given, made))
        untiled.append(working_bytes(partial(dense_loss, *given, 0.0, 0.0, 1.0), given, made))
    assert peaks[0] == peaks[1] == peaks[2], peaks
    assert untiled[2] > 10 * peaks[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [16, 256])
def test_the_loss_takes_the_bytes_that_the_memory_model_says(dtype: torch.dtype, tile: int) -> None:
    tokens, vocab = 1024, 2048
    hidden, weight = (torch.randn(n, WIDTH, dtype=dtype, requires_grad=True) for n in (tokens, vocab))
    given = [hidden, weight, torch.randint(0, vocab, (tokens,))]
    taken = working_bytes(partial(tiled_cross_entropy, *given, tile=tile), given, hidden.nbytes + 4 * tokens)
    assert taken == pytest.approx(tiled_loss_bytes(tile, vocab, WIDTH, dtype.itemsize), rel=0.05)


def mlp() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 8 * WIDTH), torch.nn.SiLU(), torch.nn.Linear(8 * WIDTH, WIDTH)
    ).double()


@pytest.mark.parametrize("tiles", [1, 3, 4, 100])
def test_tiled_mlp_and_gradients(tiles: int) -> None:
    module, x = mlp(), torch.randn(10, 2, WIDTH, dtype=torch.float64, requires_grad=True)
    parameters = list(module.parameters())
    dout = torch.randn(10, 2, WIDTH, dtype=torch.float64)
    out, expected = tiled(module, x, parameters, tiles), module(x)
    grads = torch.autograd.grad(out, [x, *parameters], dout)
    wanted = torch.autograd.grad(expected, [x, *parameters], dout)
    assert all((a - b).abs().max() <= 1e-12 for a, b in zip((out, *grads), (expected, *wanted), strict=True))


def test_each_parameter_is_told_once() -> None:
    """A hook that starts a reduction when a gradient is there must not start at the first tile."""
    module, told = mlp(), []
    for p in module.parameters():
        p.register_post_accumulate_grad_hook(lambda p: told.append(p.shape))
    x = torch.randn(12, WIDTH, dtype=torch.float64, requires_grad=True)
    tiled(module, x, list(module.parameters()), 4).sum().backward()
    assert len(told) == 4


def test_a_frozen_parameter_gets_no_gradient() -> None:
    module = mlp()
    module[0].weight.requires_grad_(False)  # type: ignore[index]
    x = torch.randn(12, WIDTH, dtype=torch.float64, requires_grad=True)
    tiled(module, x, list(module.parameters()), 4).sum().backward()
    assert [p.grad is None for p in module.parameters()] == [True, False, False, False]


def test_the_mlp_needs_no_more_memory_for_a_longer_sequence_cut_into_more_tiles() -> None:
    module, peaks = mlp(), []
    parameters = list(module.parameters())
    for tokens in (512, 1024, 4096):
        x = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
        made = x.nbytes  # its gradient
        peaks.append(working_bytes(partial(tiled, module, x, parameters, tokens // 64), [x, *parameters], made))
        for p in parameters:
            p.grad = None
    assert peaks[0] == peaks[1] == peaks[2], peaks
