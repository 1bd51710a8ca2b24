"""`LoongCoreAttention` beside Megatron's `DotProductAttention`, both built from a TransformerConfig on this device.

    python scripts/check_core_attention.py [--cpu] [--json FILE]

All ranks of a layout in one process against Megatron's attention of one rank, forward and backward; then one rank
alone, its peers replaced by local copies. A step of scripts/gpu_check.sh; needs megatron-core.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu import exact, outcome
from benchmarks.gpu.outcome import Run
from benchmarks.local_copies import LocalCopies
from benchmarks.rank_alone import clock
from benchmarks.simulate import groups_without_processes, simulate
from megatron_loong import LoongConfig
from megatron_loong.comm.groups import LoongGroups
from megatron_loong.comm.sequence import shard_sequence
from megatron_loong.layout.sharding import token_positions

CONFIG = LoongConfig(4, 2)
HEADS, KV_HEADS = 8, 4
#: Length and head width.
SIZES = {"cuda": (4096, 128), "cpu": (128, 16)}
#: Largest RMS of our error over that of Megatron's attention, in half precision; of our error, in float32.
MULTIPLE, BOUND = 2.5, 1e-5


def check(run: Run) -> None:
    """The plugin's core attention beside Megatron's own."""
    device, (seq_len, width) = run.device, SIZES[run.device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # read when Megatron is imported; compiling takes minutes
    tensors = exact.inputs(seq_len, (HEADS, KV_HEADS), (width, width), dtype, device)
    right = exact.float64(tensors, True)
    with run.case("Megatron's DotProductAttention, one rank"), megatron_on(device):
        theirs = errors(through(their_layer(dtype, width), tensors), right)
        run.figures["relative_rms_megatron"] = theirs
    with run.case(f"LoongCoreAttention, {CONFIG.describe()}"):
        run.figures["layout"] = CONFIG.describe()
        parts = simulate(CONFIG, lambda groups: one_rank(groups, tensors))
        order = torch.cat([token_positions(CONFIG, rank, seq_len) for rank in range(len(parts))]).to(device)
        joined = [torch.cat(pieces, 1) for pieces in zip(*parts, strict=True)]
        found = [torch.empty_like(x).index_copy_(1, order, x) for x in joined]
        ours = run.figures["relative_rms_loong"] = errors(found, right)
        for name, error in ours.items():
            bound = BOUND if dtype == torch.float32 else MULTIPLE * run.figures["relative_rms_megatron"][name]
            assert error <= bound, f"{name}: relative RMS error {error:.1e} > {bound:.1e}"
    with run.case("LoongCoreAttention, one rank alone"):
        groups = groups_without_processes(CONFIG, CONFIG.context_parallel_size - 1, LocalCopies)
        for _ in range(3):
            start = clock(device)
            results = one_rank(groups, tensors)
            run.figures["one_rank_s"] = clock(device) - start
        assert all(x.isfinite().all() for x in results), "numbers that are not finite"


@contextlib.contextmanager
def megatron_on(device: torch.device) -> Iterator[None]:
    """A world of one for Megatron, whose process groups are gloo's: nothing is sent. On a CPU, its device and its
    random numbers, which it asks torch.cuda for, are played; without dropout none are drawn."""
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with contextlib.ExitStack() as played:
        played.callback(dist.destroy_process_group)
        parallel_state.initialize_model_parallel()
        played.callback(parallel_state.destroy_model_parallel)
        if device.type == "cuda":
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        else:
            tracker = SimpleNamespace(fork=contextlib.nullcontext)
            played.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: device))
            played.enter_context(mock.patch.object(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker))
        yield


def their_layer(dtype: torch.dtype, width: int) -> torch.nn.Module:
    """Megatron's local attention of one rank."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    return DotProductAttention(transformer_config(1, dtype, width), **layer_arguments())


def one_rank(groups: LoongGroups, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """out, dq, dk, dv of a rank's tokens by the plugin's layer."""
    from megatron_loong.integration.core_attention import LoongCoreAttention

    config = transformer_config(groups.config.context_parallel_size, tensors[0].dtype, tensors[0].shape[-1])
    layer = LoongCoreAttention(config, **layer_arguments(), groups=groups)
    return through(layer, [shard_sequence(x, groups) for x in tensors])


def transformer_config(cp: int, dtype: torch.dtype, width: int) -> Any:
    """Megatron's configuration of the layer."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * width,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        attention_dropout=0.0,
        context_parallel_size=cp,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        masked_softmax_fusion=False,
        attention_softmax_in_fp32=True,
    )


def layer_arguments() -> dict[str, Any]:
    """What Megatron's self-attention passes to its core attention."""
    from megatron.core.transformer.enums import AttnMaskType

    return {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}


def through(layer: torch.nn.Module, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """out, dq, dk, dv, [b, s, heads, d], of a layer that takes and gives [s, b, ...]."""
    q, k, v, dout = (x.detach().transpose(0, 1).contiguous() for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = torch.ones(1, 1, len(q), len(q), dtype=torch.bool, device=q.device).triu_(1)
    out = layer(q, k, v, mask)
    grads = torch.autograd.grad(out, leaves, dout.flatten(2))
    return [x.transpose(0, 1) for x in (out.detach().unflatten(2, (HEADS, -1)), *grads)]


def errors(found: list[torch.Tensor], right: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative RMS of each."""
    return {name: exact.relative_rms(x, right[name]) for name, x in zip(exact.NAMES, found, strict=True)}


if __name__ == "__main__":
    sys.exit(outcome.main(check))
