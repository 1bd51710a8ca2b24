"""The counter of live bytes: each storage once, from birth to death, backward included."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

import pytest
import torch

from benchmarks.live_bytes import LiveBytes


def test_views_are_free_and_a_storage_lives_as_long_as_its_last_view() -> None:
    with LiveBytes() as live:
        whole = torch.empty(1000)
        view = whole[10:]
        assert live.live_bytes == 4000
        del whole
        assert live.live_bytes == 4000
        del view
        assert live.live_bytes == 0
    assert live.peak_bytes == 4000


def test_what_autograd_keeps_counts_until_the_backward_is_done() -> None:
    weight = torch.zeros(1000, requires_grad=True)
    with LiveBytes() as live:
        live.watch([weight])
        y = (weight * 2).exp()  # saved for the backward of exp
        loss = y.sum()
        del y
        assert live.live_bytes == 4000 + 4000 + 4
        loss.backward()
        del loss
        assert live.live_bytes == 4000 + 4000  # the weight and its gradient
    assert live.peak_bytes >= 3 * 4000 and live.at_peak is not None and live.at_peak.startswith("aten.")


def test_the_peak_can_be_looked_for_anew_and_counting_paused() -> None:
    with LiveBytes() as live:
        torch.empty(1000)
        live.reset_peak()
        with live.paused():
            unseen = torch.empty(500)
        small = torch.empty(100)
    assert (live.peak_bytes, live.live_bytes) == (400, 400)
    del unseen, small
    assert live.live_bytes == 0


@pytest.mark.parametrize(
    ("message", "is_one"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("CUDA ran out of memory outside PyTorch's allocator", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", True),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_the_longest_sequence_ends_where_memory_does(
    message: str, is_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever's memory ran out; any other error is one."""
    script = Path(__file__).resolve().parents[2] / "scripts" / "longest_sequence.py"
    fits = runpy.run_path(str(script))["fits"]

    def train_step(*args: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setitem(fits.__globals__, "train_step", train_step)
    args = argparse.Namespace(cpu=False)
    if is_one:
        assert not fits(args, set(), 1)
        return
    with pytest.raises(RuntimeError, match=message):
        fits(args, set(), 1)
