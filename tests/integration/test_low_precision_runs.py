"""Megatron's own loop under `--fp8-format`, fp32 on the CPU: lengths are padded, Selective Checkpoint++ is at work.

TransformerEngine is not here: `fp8_gpt.py` says what plays it.
"""

from __future__ import annotations

import pytest

from tests.integration import megatron_runs
from tests.integration.test_packed_runs import packed_script

LENGTH = "--seq-length 72 --max-position-embeddings 128"
FP8 = (
    f"{LENGTH} --context-parallel-impl loong --context-parallel-size 2 --fp8-format hybrid --fp8-recipe tensorwise "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
)
SELECTIVE = "--loong-selective-checkpoint --loong-offload-attention --loong-offload-activations"

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["--loong-head-parallel-size 1", "--loong-head-parallel-size 2"])
def test_trains_as_on_one_rank_and_runs_each_ring_once(layout: str) -> None:
    """72 tokens are padded to 96 on 2 ranks, for multiples of 16 (`test_low_precision`); losses do not show it."""
    script = packed_script()
    own = megatron_runs.own_script()
    assert own is not None  # packed_script would have skipped
    one_rank = megatron_runs.train(own, 1, *LENGTH.split())
    full = megatron_runs.train(script.with_name("fp8_gpt.py"), 2, *FP8.split(), *layout.split())
    megatron_runs.assert_same_steps(full, one_rank)
    kept = megatron_runs.train(script.with_name("fp8_gpt.py"), 2, *FP8.split(), *layout.split(), *SELECTIVE.split())
    megatron_runs.assert_same_steps(kept, full, tolerance=0.0)
    assert [2 * step.ring_forwards for step in kept] == [step.ring_forwards for step in full] != [0, 0, 0]
