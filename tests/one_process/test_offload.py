"""Offloaded tensors: the same bytes come back, the next lot sets off ahead, and wrong guesses cost no memory.

On a CPU a copy "on the host" is a plain copy; that streams and pinned memory work on a GPU is not shown here.
"""

from __future__ import annotations

import gc
import weakref

import torch

from megatron_loong.recompute.offload import Parking, inputs_wait_in
from megatron_loong.recompute.selective import StashedFunction, checkpoint
from tests.one_process.test_stash import HEADS, TOKENS, WIDTH, Layer, Reentrant, step


def parked(parking: Parking, count: int) -> list:
    """`count` lots of two parcels; the originals are let go."""
    lots = [parking.lot() for _ in range(count)]
    return [[lot.park((torch.full((3,), 10.0 * i + j),)) for j in range(2)] for i, lot in enumerate(lots)]


def test_the_same_values_come_back_with_their_layout_and_the_original_is_free() -> None:
    x = torch.randn(3, 4).t()
    original = weakref.ref(x)
    values = x.clone()
    restore = Parking().lot().park((x,))
    del x
    gc.collect()
    assert original() is None
    (back,) = restore()
    assert torch.equal(back, values) and back.stride() == values.stride()
    assert torch.equal(restore()[0], values), "a second backward asks again"


def test_a_backward_in_reverse_finds_all_but_the_last_lot_under_way() -> None:
    parking = Parking()
    lots = parked(parking, 4)
    for i in reversed(range(4)):
        assert [restore()[0][0].item() for restore in lots[i]] == [10 * i, 10 * i + 1]
        assert [lot.under_way for lot in parking.waiting()] == [False] * (i - 1) + [True] * (i > 0)
    assert (parking.fetched_ahead, parking.fetched_late) == (3, 1)
    assert parking.waiting() == []


def test_a_wrong_guess_is_dropped_and_the_values_are_right() -> None:
    parking = Parking()
    lots = parked(parking, 4)
    for i in (1, 3, 0, 2):  # no order at all
        assert lots[i][0]()[0][0].item() == 10 * i
        assert sum(lot.under_way for lot in parking.waiting()) <= 1
    assert parking.fetched_ahead == 0 or parking.fetched_ahead + parking.fetched_late == 4


def test_lots_whose_graph_is_gone_are_forgotten() -> None:
    parking = Parking()
    lots = parked(parking, 3)
    del lots[1]
    gc.collect()
    assert len(parking.waiting()) == 2
    assert lots[1][0]()[0][0].item() == 20
    assert [lot.under_way for lot in parking.waiting()] == [True]


def test_a_stash_that_waits_on_the_host_changes_no_number() -> None:
    parking = Parking()
    layers = [Layer(attentions=2) for _ in range(3)]
    plain = step(layers, lambda f, x: Reentrant.apply(StashedFunction(f), x))
    offloaded = step(layers, lambda f, x: Reentrant.apply(StashedFunction(f, parking.lot().park), x))
    assert all(torch.equal(a, b) for a, b in zip(plain, offloaded, strict=True))
    assert (parking.fetched_ahead, parking.fetched_late) == (2, 1)


def test_what_waits_is_not_held_on_the_device() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def park(tensors: tuple[torch.Tensor, ...]):
        seen.extend(weakref.ref(x) for x in tensors)
        return parking.lot().park(tensors)

    parking = Parking()
    x = torch.randn(1, TOKENS, HEADS * WIDTH, dtype=torch.float64, requires_grad=True)
    out = Reentrant.apply(StashedFunction(Layer(), park), x)
    gc.collect()
    assert len(seen) == 2 and all(ref() is None for ref in seen)
    out.sum().backward()


def test_checkpointed_inputs_wait_on_the_host_and_change_no_number() -> None:
    parking = Parking()
    layers = [Layer() for _ in range(4)]

    def offloaded(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        with inputs_wait_in(parking.lot(), (x,)):
            return checkpoint(layer, x)

    plain = step(layers, checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(step(layers, offloaded), plain, strict=True))
    assert (parking.fetched_ahead, parking.fetched_late) == (3, 1)
