"""Multi-token prediction over ranks has one rank's losses and gradients, wherever the tokens with a loss lie.

Megatron counts them on each rank (upstream issues 3943, 7498). The reference is one rank with Megatron's own attention.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration import megatron_runs
from tests.integration.test_matrix import unequal_data
from tests.integration.test_packed_runs import CP2, CP4, packed_script
from tests.integration.test_pretrain_gpt import assert_same_steps
from tests.nightly import mostly_nightly

#: Flags; and how many tokens of a sequence have a loss, beside one another, where few have.
CASES = {
    "per-token": ("--calculate-per-token-loss --eod-mask-loss", 8),
    "fewer-tokens-than-ranks": ("--eod-mask-loss", 2),
    "fewer-tokens-than-ranks-per-token": ("--calculate-per-token-loss --eod-mask-loss", 2),
    "packs-per-token": ("--sft --calculate-per-token-loss", None),
    "packs": ("--sft", None),
    "equal": ("", None),
}
ALWAYS = ("per-token", "fewer-tokens-than-ranks", "packs-per-token")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mtp")


@pytest.mark.parametrize("layout", mostly_nightly([CP2, CP4], always=[CP4]), ids=["ring2", "head2-ring2"])
@pytest.mark.parametrize("name", mostly_nightly(CASES, ALWAYS))
def test_mtp_trains_as_on_one_rank(name: str, layout: str, folder: Path) -> None:
    flags, real = CASES[name]
    # The end token of 0.19 with this vocabulary is 254.
    data = [] if real is None else [*unequal_data(folder, real, (254, 255)), "--vocab-size", "255"]
    shared = [*data, *flags.split(), *"--mtp-num-layers 1 --mtp-loss-scaling-factor 1.0".split()]
    script = packed_script()
    expected = megatron_runs.train(script, 1, *shared)
    assert all(step.mtp_loss > 0 for step in expected)
    loong = ["--context-parallel-impl", "loong", *layout.split()]
    assert_same_steps(megatron_runs.train(script, int(layout.split()[1]), *shared, *loong), expected)
