"""The net: compositions of Megatron's flags, drawn by seeds, each with the losses, norms and parameters of one rank.

Float32, no momentum. One rank trains two steps and saves its weights after each; a drawn run begins from those after
the first and must repeat the second to 1e-5: loss, gradient norm, and the parameters after it.
Seven seeds and two planted faults by day; by night hundreds, on up to eight ranks, and all faults. One seed alone:
`-m "" -k seed17-`.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.integration import drawn, megatron_runs, planted
from tests.integration.drawn import Composition, composition
from tests.integration.test_matrix import unequal_data
from tests.integration.test_packed_runs import packed_script
from tests.nightly import mostly_nightly

#: 106 has MTP, per-token loss and packs, whose ranks have other numbers of tokens with loss.
SEEDS = [
    *(pytest.param(seed, 4, id=f"seed{seed}-on-4") for seed in [106, *drawn.varied(range(60), 4, 6)]),
    *(pytest.param(seed, 8, id=f"seed{seed}-on-8", marks=pytest.mark.nightly) for seed in range(300)),
]
TOLERANCE = 1e-5
#: Weights large enough that sinks, windows and places matter.
SHARED = tuple(
    """--num-layers 4 --train-iters 2 --init-method-std 0.1 --vocab-size 255 --make-vocab-size-divisible-by 4
    --ckpt-format torch_dist --save-interval 1 --no-save-optim --no-save-rng""".split()
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this session keeps weights and data."""
    return tmp_path_factory.mktemp("drawn")


def script() -> Path:
    packed_script()  # or a skip
    return Path(__file__).with_name("drawn_gpt.py")


@functools.cache
def model_flags(one: Composition, folder: Path) -> tuple[str, ...]:
    """Flags of the model and of its data."""
    data = unequal_data(folder) if one["text"] == "unequal" else []
    return (*SHARED, *one.flags(drawn.MODEL), *data)


@functools.cache
def on_one_rank(flags: tuple[str, ...], place: Path, change: str) -> list[megatron_runs.Step]:
    """Steps of one rank with Megatron's own attention; its weights are saved in `place`."""
    return megatron_runs.train(script(), 1, *flags, "--save", str(place), fault=change)


def differences(one: Composition, folder: Path, fault: str = "", change: str = "") -> list[str]:
    """Losses, gradient norms and parameters of a drawn run that are not those of one rank, in words.

    `fault` is planted in the drawn run alone, `change` in both.
    """
    flags = model_flags(one, folder)
    start = folder / f"{composition(**{axis: one[axis] for axis in drawn.MODEL})}-{change}"
    expected = on_one_rank(flags, start, change)
    place = folder / f"{one}-{fault}"
    load = ["--load", str(start), "--ckpt-step", "1", "--no-load-optim", "--no-load-rng", "--save", str(place)]
    division = [*one.flags(drawn.DIVISION), "--context-parallel-impl", "loong"]
    steps = megatron_runs.train(script(), one.world_size, *flags, *division, *load, fault=f"{fault} {change}")
    assert len(steps) == 1
    found = []
    for number, (step, wanted) in enumerate(zip(steps, expected[1:], strict=True), start=2):
        for quantity in ("lm_loss", "grad_norm"):
            value, right = getattr(step, quantity), getattr(wanted, quantity)
            if not abs(value - right) <= TOLERANCE * abs(right):
                found.append(f"{quantity} of step {number}: {value} instead of {right}")
    weights, right_weights = (megatron_runs.parameters(where, 2) for where in (place, start))
    assert set(weights) == set(right_weights)
    for name, right in right_weights.items():
        error = float((weights[name] - right).abs().max() / right.abs().max().clamp(min=1e-30))
        if not error <= TOLERANCE:
            found.append(f"{name} after step 2: relative error {error:.1e}")
    return found


@pytest.mark.parametrize(("seed", "largest_world"), SEEDS)
def test_a_drawn_composition_trains_as_one_rank(seed: int, largest_world: int, folder: Path) -> None:
    one = drawn.draw(seed, largest_world)
    print(f"seed {seed}: {one}: {' '.join(one.flags(drawn.AXES))}")
    found = differences(one, folder)
    print("\n".join(found))
    assert found == [], str(one)


#: Where a fault is caught, and what is changed in both runs.
CAUGHT = {
    "mean_for_sum": (composition(text="unequal", layout="r2"), ""),
    "wrong_position": (composition(text="packs", layout="r2"), ""),
    "dropped_gradient": (composition(layout="r2"), ""),
    "unmarked_sinks": (composition(sinks="sinks", tensor="tp2", layout="r2"), "only_sinks"),
}


@pytest.mark.parametrize("fault", mostly_nightly(planted.FAULTS, ["dropped_gradient", "unmarked_sinks"]))
def test_the_net_catches_a_planted_fault(fault: str, folder: Path) -> None:
    one, change = CAUGHT[fault]
    found = differences(one, folder, fault, change)
    print("\n".join(found))
    assert any("grad_norm" in difference or "lm_loss" in difference for difference in found), found
    assert differences(one, folder, change=change) == []
