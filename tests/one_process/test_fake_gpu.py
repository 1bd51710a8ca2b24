"""The whole of attention on tensors without data that claim to be on a GPU: what the GPU's kernels are given there, and
how many bytes are moved beside them."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.rivals.interface import Shape
from megatron_loong import LoongConfig
from megatron_loong.attention.block_store import Form
from megatron_loong.kernels import row_ops, torch_cuda
from megatron_loong.kernels.registry import KERNELS
from tests.one_process.host_reads import forget_indices

if not torch.backends.cuda.is_built():
    pytest.skip("a torch without CUDA knows no tensors that claim to be on a GPU", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from tests.one_process.fake_gpu import Faults, layer

LAYOUTS = {
    "one rank": LoongConfig(1),
    "ring": LoongConfig(8),
    "double ring": LoongConfig(8, 1, 4),
    "heads x double ring": LoongConfig(8, 2, 2),
    "heads": LoongConfig(8, 8),
}
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "packed": {"cu_seqlens": [0, 300, 308, 900, 901]},  # and one of all other tokens: `asked`
    "window": {"window_size": (700, 0)},
}


def asked(mask: str, shape: Shape) -> dict[str, Any]:
    return {key: [*x, shape.seq_len] if key == "cu_seqlens" else x for key, x in MASKS[mask].items()}


@pytest.fixture(autouse=True)
def _leave_no_fake_tensors() -> Iterator[None]:
    yield
    forget_indices()
    torch_cuda._cudnn_lse_dims.cache_clear()


def shape_for(config: LoongConfig, tokens: int = 1024) -> Shape:
    return Shape(tokens * config.context_parallel_size, 64, 8, 128, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "mask"),
    # cuDNN is asked for no windows.
    [
        (name, mask)
        for name in ("torch_cudnn", "torch_flash")
        for mask in MASKS
        if (name, mask) != ("torch_cudnn", "window")
    ],
)
@pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_gpus_kernels_are_given_what_they_read(config: LoongConfig, name: str, mask: str) -> None:
    """Devices, dtypes, strides, alignment and shapes of all operands, and none of them copied to get there."""
    shape = shape_for(config)
    forward, backward = layer(KERNELS[name], config, shape, config.context_parallel_size - 1, **asked(mask, shape))
    assert forward.operands == 3 * len(forward.attention) > 0
    assert backward.operands == 5 * len(backward.attention) > 0


def on_the_host(function: Any) -> Any:
    return lambda *args: function(*args).cpu()


def wide(function: Any) -> Any:
    return lambda *args: function(*args).double()


def columns_first(function: Any) -> Any:
    return lambda *args: function(*args).mT.contiguous().mT


def beside(form: Form, rows: int, device: torch.device) -> torch.Tensor:
    """`Form.buffer` that starts 8 bytes beside what loads of 16 want."""
    return torch.empty(rows * form.row_bytes + 8, dtype=torch.uint8, device=device)[8:]


def merging(change: Any) -> Any:
    """Another first part than the result of `row_ops.merge_rows`."""
    return lambda merge: lambda into, parts: merge(into, [tuple(map(change, parts[0])), *parts[1:]])


FAULTS = {
    "lse on the host": ("causal", torch_cuda, "lse_to_bhs", on_the_host, "lse is"),
    "lse in float64": ("causal", torch_cuda, "lse_to_bhs", wide, "lse is torch.float64"),
    "boundaries on the host": ("packed", torch_cuda, "boundaries_on", on_the_host, "boundaries"),
    "an operand on the host": ("causal", torch_cuda, "operand", on_the_host, "an operand on cpu"),
    "an operand in float64": ("causal", torch_cuda, "operand", wide, "an operand in torch.float64"),
    "an operand by columns": ("causal", torch_cuda, "operand", columns_first, "strides"),
    "an operand copied": ("causal", Form, "buffer", lambda _: beside, "an operand is copied"),
    "sums on the host": ("causal", row_ops, "merge_rows", merging(lambda x: x.cpu()), "two devices|combine"),
    "sums of other rows": ("causal", row_ops, "merge_rows", merging(lambda x: x[1:]), "shapes"),
}


@pytest.mark.parametrize(("mask", "where", "what", "plant", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_planted_faults_are_found(
    mask: str, where: Any, what: str, plant: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, what, plant(getattr(where, what)))
    config, shape = LAYOUTS["double ring"], shape_for(LAYOUTS["double ring"])
    with pytest.raises((Faults, RuntimeError), match=message):
        layer(KERNELS["torch_flash"], config, shape, 7, **asked(mask, shape))


#: Launches and bytes read and written beside the kernel, 8K tokens a rank, ring 8, heads 64:8, width 128, bfloat16,
#: on the last rank, which has most. At 2.6e12 bytes/s they cost an H100 0.7 and 1.0 ms beside kernels of 14 and 42.
PASSES = {"forward": (4, 1.84e9), "backward": (46, 2.62e9)}


def test_bytes_that_are_moved_beside_the_kernel() -> None:
    config = LAYOUTS["ring"]
    busiest = layer(KERNELS["torch_cudnn"], config, shape_for(config, 8192), 7)
    first = layer(KERNELS["torch_cudnn"], config, shape_for(config, 8192), 0)
    for name, most, less in zip(PASSES, busiest, first, strict=True):
        found = len(most.passes), sum(moved for _, moved in most.passes)
        assert found == pytest.approx(PASSES[name], rel=0.03), f"{name}: {Counter(kind for kind, _ in most.passes)}"
        assert sum(moved for _, moved in less.passes) < found[1]
