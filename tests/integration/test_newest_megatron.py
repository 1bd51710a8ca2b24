"""The newest Megatron-LM, before it is a release: it trains over ranks as on one.

MEGATRON_LM_MAIN_PATH: a checkout of it, beside that of MEGATRON_LM_PATH. Last run with d98e8a64 of August 2026.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integration import megatron_runs
from tests.integration.test_packed_runs import CP2, CP4, packed_script

#: Flags of both runs, and of the run over ranks.
CASES = {
    "dense": ("", CP4),
    "moe": ("--num-experts 4 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01", CP2),
    "mtp": ("--mtp-num-layers 1 --calculate-per-token-loss", CP2),
}


@pytest.fixture
def script() -> Path:
    path = os.environ.get("MEGATRON_LM_MAIN_PATH")
    if path is None:
        pytest.skip("set MEGATRON_LM_MAIN_PATH to a checkout of Megatron-LM's main")
    return Path(path).resolve() / "pretrain_gpt.py"


def over_ranks(script: Path, flags: list[str], layout: str) -> list[megatron_runs.Step]:
    loong = ["--context-parallel-impl", "loong", *layout.split()]
    return megatron_runs.train(script, int(layout.split()[1]), *flags, *loong)


@pytest.mark.parametrize("name", CASES)
def test_main_trains_as_on_one_rank(name: str, script: Path) -> None:
    flags, layout = CASES[name]
    expected = megatron_runs.train(script, 1, *flags.split())
    megatron_runs.assert_same_steps(over_ranks(script, flags.split(), layout), expected)


def test_main_masks_documents_from_one_another(documents: str, script: Path) -> None:
    """The reference is our own script on the installed megatron-core: one rank of main has no attention for packs."""
    expected = megatron_runs.train(packed_script(), 1, *documents.split())
    megatron_runs.assert_same_steps(over_ranks(script, documents.split(), CP2), expected)
