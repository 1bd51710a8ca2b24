"""The memory model against counted live bytes of Megatron's GPTModel, DDP and Adam on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("megatron.core")

from megatron_loong.planner.memory import MemoryPlan, MemoryReport, peak, state_bytes
from megatron_loong.planner.model import ModelShape
from tests.integration.live_model import MemoryCase, measure
from tests.nightly import mostly_nightly

pytestmark = [pytest.mark.integration, pytest.mark.multi_rank, pytest.mark.slow]

TOLERANCE = 0.05
FULL: dict[str, Any] = {"recompute": True}
SELECTIVE: dict[str, Any] = {"recompute": True, "selective_checkpoint": True}
#: Little vocabulary: layers decide. The others: logits decide.
DEEP: dict[str, Any] = {"vocab_size": 64, "seq_len": 1024, "num_layers": 6}

CASES = {
    2: [
        MemoryCase(cp=2),
        MemoryCase(cp=2, bf16=False),
        MemoryCase(cp=2, vocab_size=4096, seq_len=1024, **FULL),
        MemoryCase(cp=2, **FULL),
        MemoryCase(cp=2, bf16=False, **FULL),
        MemoryCase(cp=2, **DEEP),
        MemoryCase(cp=2, **DEEP, **FULL),
        MemoryCase(cp=2, **DEEP, **SELECTIVE),
        MemoryCase(cp=2, keep_exchange=True, **DEEP, **SELECTIVE),
        MemoryCase(cp=2, offload_activations=True, **DEEP, **FULL),
        MemoryCase(cp=2, offload_activations=True, offload_attention=True, **DEEP, **SELECTIVE),
        MemoryCase(cp=2, micro_batch_size=2, distributed_optimizer=True, **FULL),
        MemoryCase(cp=2, seq_len=2048, vocab_size=4096, tiled_loss=64, **FULL),
        MemoryCase(cp=2, seq_len=4096, vocab_size=64, num_layers=4, tiled_mlp=8, tiled_loss=64, **FULL),
        MemoryCase(cp=2, seq_len=2048, vocab_size=64, num_layers=4, tiled_mlp=2, ffn_hidden_size=768),
        MemoryCase(cp=2, head_parallel_size=2, ffn_hidden_size=32, num_query_groups=4, **DEEP, **FULL),
    ],
    4: [
        MemoryCase(cp=4, ffn_hidden_size=32, num_query_groups=4, **DEEP, **FULL),
        MemoryCase(cp=4, head_parallel_size=2, **DEEP, **FULL),
        MemoryCase(cp=4, head_parallel_size=4, **DEEP, **SELECTIVE),
        MemoryCase(cp=2, tp=2, seq_len=2048, **SELECTIVE),
        MemoryCase(cp=2, distributed_optimizer=True, **FULL),
        MemoryCase(cp=2, distributed_optimizer=True, optimizer_instances=2, **FULL),
    ],
}


def predicted(case: MemoryCase, world_size: int) -> tuple[MemoryReport, int]:
    """The model's report of a case, and its bytes of states."""
    shape = ModelShape(
        num_layers=case.num_layers,
        hidden_size=case.hidden_size,
        num_attention_heads=case.num_attention_heads,
        num_query_groups=case.num_query_groups,
        ffn_hidden_size=case.ffn_hidden_size,
        vocab_size=case.vocab_size,
    )
    level = "exchange" if case.keep_exchange else "ring"
    plan = MemoryPlan(
        seq_len=case.seq_len,
        micro_batch_size=case.micro_batch_size,
        context_parallel_size=case.cp,
        head_parallel_size=case.head_parallel_size,
        tensor_parallel_size=case.tp,
        dtype_bytes=2 if case.bf16 else 4,
        recompute=case.recompute,
        selective_checkpoint=level if case.selective_checkpoint else "off",
        offload_attention=case.offload_attention,
        offload_activations=case.offload_activations,
        tiled_loss=case.tiled_loss,
        tiled_mlp=case.tiled_mlp,
        zero_optimizer_size=world_size // case.tp // case.optimizer_instances if case.distributed_optimizer else 1,
        kernels="local",
    )
    return peak(shape, plan), sum(state_bytes(shape, plan).values())


@pytest.mark.parametrize("world_size", mostly_nightly(CASES, [x for x in CASES if x != 4]))
def test_the_model_is_within_five_percent_of_live_bytes(world_size: int) -> None:
    """States and peak, and the activations alone, so that large states cannot hide a wrong formula."""
    wrong = []
    for case, found in zip(CASES[world_size], measure(CASES[world_size], world_size), strict=True):
        report, states = predicted(case, world_size)
        pairs = {
            "states": (states, found["states_bytes"]),
            "peak": (report.peak_bytes, found["peak_bytes"]),
            "activations": (report.peak_bytes - states, found["peak_bytes"] - found["states_bytes"]),
        }
        for what, (model, measured) in pairs.items():
            if abs(model - measured) > TOLERANCE * measured:
                wrong.append(f"{what}: {model} modelled, {measured} measured ({report.phase}, {case})")
    assert not wrong, "\n".join(wrong)
