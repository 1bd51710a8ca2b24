"""No operator of attention makes the host wait for the device, as far as tensors without data can show it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from megatron_loong import LoongConfig
from tests.one_process.host_reads import FAKE, HostReads, forget_indices, host_reads

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="a torch without CUDA knows no tensors that claim to be on a GPU"
)
CUDA = torch.device("cuda", 0)
LAYOUTS = [LoongConfig(1), LoongConfig(8, 2, 2)]
FEATURES: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    "causal": lambda device: {},
    "full": lambda device: {"causal": False},
    "window": lambda device: {"window_size": (5, 0)},
    "packed": lambda device: {},
    "sink": lambda device: {"softmax_offset": torch.zeros(8, device=device)},
    "max-logits": lambda device: {"max_logits": torch.zeros(8, device=device)},
    "softcap": lambda device: {"softcap": 10.0},
    "dropout": lambda device: {"dropout_p": 0.1, "dropout_seed": 3},
}


@pytest.fixture(autouse=True)
def _leave_no_fake_tensors() -> Iterator[None]:
    yield
    forget_indices()


@pytest.mark.parametrize("feature", sorted(FEATURES))
@pytest.mark.parametrize("config", LAYOUTS, ids=LoongConfig.describe)
def test_attention_waits_for_nothing(config: LoongConfig, feature: str) -> None:
    pack = {"cu_seqlens": [0, 10, 16 * config.context_parallel_size]} if feature == "packed" else {}
    assert host_reads(config, 8, 2, lambda device: FEATURES[feature](device) | pack) == []


@pytest.mark.parametrize("config", [LoongConfig(4, 4), LoongConfig(8, 4)], ids=LoongConfig.describe)
def test_heads_that_do_not_divide_wait_for_nothing(config: LoongConfig) -> None:
    assert host_reads(config, 6, 3, FEATURES["causal"]) == []


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: x[[0, 1]],
        lambda x: torch.tensor([1, 2]).to(x.device, non_blocking=True),
    ],
    ids=["item", "nonzero", "to-host", "from-list", "list-index", "pageable"],
)
def test_what_waits_is_seen(wait: Callable[[torch.Tensor], Any]) -> None:
    with FAKE:
        x = torch.ones(4, device=CUDA)
        with HostReads() as reads, contextlib.suppress(DataDependentOutputException, DynamicOutputShapeException):
            wait(x)
    assert reads.found
