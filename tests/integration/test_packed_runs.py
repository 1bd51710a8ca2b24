"""Packs, lengths that do not divide and unusual layers, trained by `megatron.training` over ranks as on one.

The reference is one rank with Megatron's own local attention; with packs it gets the mask as a tensor, spelled out
document by document (tests/integration/packed_gpt.py). Most cases run by night.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration import megatron_runs
from tests.integration.test_pretrain_gpt import assert_same_steps, script_or_skip
from tests.nightly import mostly_nightly

CP4 = "--context-parallel-size 4 --loong-head-parallel-size 2"
CP2 = "--context-parallel-size 2 --loong-head-parallel-size 1"
PP2 = "--pipeline-model-parallel-size 2"
STEPS = "--train-iters 4"
EXPERTS = "--num-experts 4 --moe-aux-loss-coeff 0.1 --moe-token-dispatcher-type alltoall"


@dataclass(frozen=True)
class Case:
    """Flags of both runs, and of the run over ranks alone."""

    name: str
    shared: str
    loong: str = CP4
    native_world_size: int = 1
    always: bool = False


CASES = [
    Case("packs", "--sft", always=True),
    Case("length-30", "--seq-length 30", always=True),
    Case("packs-of-30", "--sft --seq-length 30"),
    Case("experts-length-30", f"--seq-length 30 {EXPERTS} --moe-router-load-balancing-type aux_loss", always=True),
    Case("experts-length-30-seq-loss", f"--seq-length 30 {EXPERTS} --moe-router-load-balancing-type seq_aux_loss"),
    Case("experts-packs-of-30", f"--sft --seq-length 30 {EXPERTS} --moe-router-load-balancing-type aux_loss"),
    Case(
        "experts-length-30-contiguous",
        f"--seq-length 30 {EXPERTS}",
        f"{CP4} --loong-sequence-layout contiguous",
    ),
    Case("packs-pp2", f"--sft {PP2}", CP2, native_world_size=2),
    Case("length-30-pp2", f"--seq-length 30 {PP2}", CP2, native_world_size=2),
    Case(
        "packs-double-ring", "--sft", "--context-parallel-size 4 --loong-head-parallel-size 1 --loong-inner-ring-size 2"
    ),
    Case("packs-per-token-loss", "--sft --calculate-per-token-loss"),
    Case("output-gate", "--attention-output-gate"),
    Case("qk-layernorm", "--qk-layernorm"),
    Case("yarn", "--position-embedding-type yarn"),
    Case("partial-rope", "--rotary-percent 0.5"),
    Case("nope-layers", "--no-rope-freq 2"),
    Case("mtp", "--mtp-num-layers 2"),
    Case("mtp-length-30", "--mtp-num-layers 1 --seq-length 30"),
    Case("packs-mrope", "--sft --position-embedding-type mrope --mrope-section 2 1 1"),
    Case("packs-of-30-mrope", "--sft --seq-length 30 --position-embedding-type mrope --mrope-section 2 1 1"),
    Case("packs-yarn", "--sft --position-embedding-type yarn"),
    Case(
        "packs-gate-norm-partial-nope",
        "--sft --attention-output-gate --qk-layernorm --rotary-percent 0.5 --no-rope-freq 2",
    ),
]


def packed_script() -> Path:
    """The script of these tests, or a skip where megatron-core brings no training loop, or an older one."""
    script_or_skip("own")
    if not hasattr(importlib.import_module("megatron.core.utils"), "flatten_batch_for_packed_sequences"):
        pytest.skip("the script of these tests is written for megatron-core 0.19")
    return Path(__file__).with_name("packed_gpt.py")


#: One piece of the sequence on each rank.
CONTIGUOUS = "--loong-sequence-layout contiguous"
CASES += [
    Case("contiguous", "--mtp-num-layers 1", f"{CP4} {CONTIGUOUS}", always=True),
    Case("contiguous-ring", "", f"--context-parallel-size 4 --loong-head-parallel-size 1 {CONTIGUOUS}"),
    Case(
        "contiguous-double-ring-yarn",
        "--position-embedding-type yarn",
        f"--context-parallel-size 4 --loong-head-parallel-size 1 --loong-inner-ring-size 2 {CONTIGUOUS}",
    ),
    Case("contiguous-learned-positions", "--position-embedding-type learned_absolute", f"{CP4} {CONTIGUOUS}"),
    Case("contiguous-length-30", "--seq-length 30 --mtp-num-layers 1", f"{CP4} {CONTIGUOUS}"),
    Case("contiguous-pp2", PP2, f"{CP2} {CONTIGUOUS}", native_world_size=2),
    Case("contiguous-packs", "--sft --mtp-num-layers 1", f"{CP4} {CONTIGUOUS} --loong-pack-layout contiguous"),
]


@pytest.mark.parametrize("case", mostly_nightly(CASES, [x for x in CASES if x.always]), ids=lambda case: case.name)
def test_trains_as_on_one_rank(case: Case) -> None:
    script, shared = packed_script(), [*STEPS.split(), *case.shared.split()]
    native = megatron_runs.train(script, case.native_world_size, *shared)
    loong = ["--context-parallel-impl", "loong", *case.loong.split()]
    assert_same_steps(megatron_runs.train(script, 4, *shared, *loong), native)


@pytest.mark.parametrize("micro_batch_size", mostly_nightly([1, 2], always=[1]))
@pytest.mark.parametrize("script_name", mostly_nightly(["tests", "checkout"], always=["tests"]))
def test_documents_of_a_dataset_are_masked_from_one_another(
    documents: str, script_name: str, micro_batch_size: int
) -> None:
    reference = packed_script()
    script = reference if script_name == "tests" else script_or_skip("checkout")
    shared = [*documents.split(), "--micro-batch-size", str(micro_batch_size)]
    native = megatron_runs.train(reference, 1, *shared)
    loong = ["--context-parallel-impl", "loong", *CP4.split()]
    assert_same_steps(megatron_runs.train(script, 4, *shared, *loong), native)


@pytest.mark.parametrize("name", mostly_nightly(["double-ring", "head2-ring2", "head4"], always=["head2-ring2"]))
def test_packs_that_the_program_cuts_train_as_on_one_rank(name: str) -> None:
    """RoPE, MTP's roll, loss, and the length of documents and of their padding apart; every document in zigzag."""
    script = packed_script().with_name("cut_packs_gpt.py")
    shared = [*STEPS.split(), "--sft", *"--mtp-num-layers 1".split()]
    native = megatron_runs.train(script, 1, *shared)
    layout = {"double-ring": "1 --loong-inner-ring-size 2", "head2-ring2": "2", "head4": "4"}[name]
    loong = f"--context-parallel-impl loong --context-parallel-size 4 --loong-head-parallel-size {layout}".split()
    cut = ["--loong-pack-layout", "per_document"]
    steps = megatron_runs.train(script, 4, *shared, *loong, *cut)
    assert_same_steps(steps, native)
    assert all(step.mtp_loss > 0 for step in steps)
    if name == "head2-ring2":
        with pytest.raises(RuntimeError, match="it cuts each document in zigzag .* give --loong-pack-layout"):
            megatron_runs.train(script, 4, *shared, *loong)
