"""The draw behind tests/integration/test_drawn.py: the same everywhere, and it meets everything that runs."""

from __future__ import annotations

import itertools

from tests.integration.drawn import AXES, composition, draw


def test_hundreds_of_draws_meet_every_value_and_nearly_every_pair() -> None:
    met = [draw(seed, 8) for seed in range(300)]
    assert len(set(met)) > 290 and met[:3] == [draw(seed, 8) for seed in range(3)]
    for axis, values in AXES.items():
        assert {one[axis] for one in met} == set(values), axis
    pairs = {(a, one[a], b, one[b]) for one in met for a, b in itertools.combinations(AXES, 2)}
    possible = sum(len(AXES[a]) * len(AXES[b]) for a, b in itertools.combinations(AXES, 2))
    assert len(pairs) > 0.85 * possible
    assert all(2 <= draw(seed, 4).world_size <= 4 for seed in range(50))


def test_what_does_not_run_is_not_drawn_and_says_why() -> None:
    assert composition().problem() is None
    assert "sequence-parallel" in str(composition(experts="moe", tensor="tp2").problem())
    assert "padding beside MoE" in str(composition(experts="moe", length="30").problem())
    assert "one row" in str(composition(text="packs", batch="mb2").problem())
