"""Megatron's hybrid context parallelism with 2D-Attention: its scheduler, its schedule, and one rank's losses.

Documents of 2 to 51 tokens, each on as many of the ranks of DP x CP as its length needs; every rank meets several sizes
(hybrid_gpt.py sees to it). The reference is one rank with Megatron's own attention and the documents' mask spelled out.
Most cases run by night.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration import megatron_runs
from tests.integration.test_packed_runs import packed_script
from tests.integration.test_pretrain_gpt import assert_same_steps, script_or_skip
from tests.nightly import mostly_nightly

#: The vocabulary is padded to the same size for one and two tensor-parallel ranks, or other weights would be drawn.
SHARED = "--calculate-per-token-loss --vocab-size 319 --make-vocab-size-divisible-by 4"
HYBRID = "--context-parallel-impl loong --hybrid-context-parallel --max-seqlen-per-dp-cp-rank 16"

#: Case -> flags of the run over ranks alone.
CASES = {
    "cp2-dp2-head2": "--context-parallel-size 2 --loong-head-parallel-size 2",
    "cp1-dp4-ring": "--context-parallel-size 1 --loong-head-parallel-size 1",
    "cp4-double-ring": "--context-parallel-size 4 --loong-head-parallel-size 1 --loong-inner-ring-size 2",
    "auto": "--context-parallel-size 2",
    "recompute": "--context-parallel-size 2 --loong-head-parallel-size 1 --recompute-granularity full "
    "--recompute-method uniform --recompute-num-layers 1 --loong-selective-checkpoint all",
    "tp2": "--context-parallel-size 2 --tensor-model-parallel-size 2 --loong-head-parallel-size 2 "
    "--max-seqlen-per-dp-cp-rank 32",  # two ranks hold a document, and so have to take the longest
}


@pytest.mark.parametrize("name", mostly_nightly(CASES, always=["cp2-dp2-head2"]))
@pytest.mark.parametrize("script_name", mostly_nightly(["tests", "checkout"], always=["tests"]))
def test_each_document_gets_the_ranks_it_needs(documents: str, script_name: str, name: str) -> None:
    reference = packed_script()
    script = Path(__file__).with_name("hybrid_gpt.py") if script_name == "tests" else script_or_skip("checkout")
    shared = [*documents.split(), *SHARED.split()]
    native = megatron_runs.train(reference, 1, *shared)
    assert_same_steps(megatron_runs.train(script, 4, *shared, *HYBRID.split(), *CASES[name].split()), native)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["cp2-dp2-head2", "cp1-dp4-ring"])
def test_packs_of_documents_in_every_version(name: str) -> None:
    """The pretrain_gpt.py of MEGATRON_LM_PATH, from 0.16 on; its folder has to be on PYTHONPATH too."""
    script_or_skip("checkout")
    script = Path(__file__).with_name("hybrid_checkout.py")
    native = megatron_runs.train(script, 1, SHARED.split()[0], "--global-batch-size", "16")
    steps = megatron_runs.train(script, 4, SHARED.split()[0], "--sft", *HYBRID.split(), *CASES[name].split())
    assert_same_steps(steps, native)
