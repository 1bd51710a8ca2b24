"""Packed documents as few launches: exact on several ranks, and counted."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from megatron_loong import LoongConfig
from megatron_loong.kernels.reference import ReferenceKernel
from tests.multi_rank.mask_cases import Case, run_case


class PackingKernel(ReferenceKernel):
    """The reference kernel, document by document; counts what it was asked."""

    name = "packing"
    packs = True

    def __init__(self) -> None:
        self.forwards: list[int] = []
        """Documents of each call."""

    def _documents(self, rules: Any, rows: int, keys: int) -> list[tuple[slice, slice]]:
        boundaries = rules.boundaries or ((0, rows), (0, keys))
        assert [x[-1] for x in boundaries] == [rows, keys]
        sides = ([slice(*x) for x in itertools.pairwise(side)] for side in boundaries)
        return list(zip(*sides, strict=True))

    def forward(self, q, k, v, rules):
        documents = self._documents(rules, q.shape[1], k.shape[1])
        self.forwards.append(len(documents))
        alone = replace(rules, boundaries=None)
        parts = [super(PackingKernel, self).forward(q[:, a], k[:, b], v[:, b], alone) for a, b in documents]
        return tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))

    def backward(self, dout, q, k, v, out, lse, rules, *, deterministic):
        alone = replace(rules, boundaries=None)
        parts = [
            super(PackingKernel, self).backward(
                dout[:, a], q[:, a], k[:, b], v[:, b], out[:, a], lse[:, a], alone, deterministic=deterministic
            )
            for a, b in self._documents(rules, q.shape[1], k.shape[1])
        ]
        return tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))


@dataclass(frozen=True)
class PackingCase(Case):
    """A case whose kernel packs."""

    kernel: Any = None

    def options(self) -> dict[str, Any]:
        return super().options() | {"kernel": self.kernel}


DOCUMENTS = (0, 40, 43, 44, 50, 57, 60, 61, 65, 72, 80, 81, 90, 96)


def run_packing(rank: int, config: LoongConfig, most_calls: int | None, changes: dict[str, Any]) -> None:
    kernel = PackingKernel()
    case = PackingCase(config, DOCUMENTS, kernel=kernel, **{"packed": True, **changes})
    if not run_case(rank, case):
        return
    assert max(kernel.forwards) > 1 or most_calls is None, "nothing was packed"
    assert most_calls is None or len(kernel.forwards) <= most_calls, kernel.forwards


@pytest.mark.multi_rank
@pytest.mark.parametrize(
    ("config", "most_calls", "changes"),
    [
        pytest.param(LoongConfig(1), 1, {}, id="one-rank"),
        pytest.param(LoongConfig(2, 2), 1, {}, id="head-group"),
        pytest.param(LoongConfig(2), 3, {}, id="ring"),
        pytest.param(LoongConfig(4, 1, 2, least_rows_to_cut=4), 6, {"heads": 2, "kv_heads": 1}, id="double-ring"),
        pytest.param(LoongConfig(4, 2), 3, {"window": (5, 0)}, id="window"),
        pytest.param(LoongConfig(2), 3, {"causal": False, "sink": True}, id="full-with-sinks"),
        pytest.param(LoongConfig(2), None, {"batch": 2}, id="a-batch-comes-apart"),
        pytest.param(LoongConfig(2), None, {"dropout_p": 0.1}, id="dropout-comes-apart"),
    ],
)
def test_documents_of_a_visit_are_one_launch_and_exact(config, most_calls, changes, pool) -> None:
    pool.run(run_packing, config, most_calls, changes)
