"""The matrix of training runs meets what it says it meets: every value by day, every pair by night."""

from __future__ import annotations

import itertools

from tests.integration.matrix import AXES, covering, pairs_of, recipes, values_of


def test_a_few_recipes_meet_every_value_of_every_axis() -> None:
    chosen = covering(recipes(largest_world=4), values_of)
    for axis, values in AXES.items():
        assert {getattr(recipe, axis) for recipe in chosen} == set(values)
    assert len(chosen) <= 10


def test_pairwise_meets_every_pair_of_values_that_runs() -> None:
    candidates = recipes(largest_world=8)
    chosen = covering(candidates, pairs_of)
    for a, b in itertools.combinations(AXES, 2):
        missing = set(itertools.product(AXES[a], AXES[b])) - {(getattr(r, a), getattr(r, b)) for r in chosen}
        # MoE beside tensor parallelism needs --sequence-parallel, which does not run on a CPU.
        assert all(pair[0] == "tp2" and pair[1].startswith("moe") for pair in missing), missing
    assert len(chosen) < len(candidates) / 10


def test_world_sizes_are_the_product_of_what_a_recipe_divides() -> None:
    recipe = next(r for r in recipes(16) if str(r) == "tp2-vpp2-dp2-distributed-dense-head2")
    assert recipe.world_size == 16
    assert recipe.reference_flags == ["--optimizer", "adam", "--lr", "1e-3"]
