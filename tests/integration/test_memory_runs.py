"""The memory switches change no number in Megatron's own training loop: fp32 on the CPU, bit for bit where promised."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration import megatron_runs
from tests.integration.test_packed_runs import packed_script
from tests.nightly import mostly_nightly

RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
LOONG = "--context-parallel-impl loong"
CP2 = f"{LOONG} --context-parallel-size 2 --loong-head-parallel-size 2"

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def script() -> Path:
    found = megatron_runs.checkout_script() or megatron_runs.own_script()
    if found is None:
        pytest.skip("needs megatron-core 0.17 or newer, or MEGATRON_LM_PATH")
    return found


def train(world_size: int, flags: str) -> list[megatron_runs.Step]:
    return megatron_runs.train(script(), world_size, *flags.split())


PP2_VPP2 = "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
MOE = "--num-experts 4 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01"
OFFLOADS = "--loong-offload-attention --loong-offload-activations"
SELECTIVE = "--loong-selective-checkpoint"

#: World size, flags of both runs, flags of the run that keeps attention's results.
RUNS = {
    "everything": (2, f"{CP2} {RECOMPUTE}", f"{SELECTIVE} --loong-keep-exchange 2 {OFFLOADS}"),
    "cp4": (4, f"{LOONG} --context-parallel-size 4 --loong-head-parallel-size 2 {RECOMPUTE}", SELECTIVE),
    "interleaved pipeline": (4, f"{CP2} {PP2_VPP2} {RECOMPUTE}", f"{SELECTIVE} {OFFLOADS}"),
    "moe": (2, f"{CP2} {MOE} {RECOMPUTE}", SELECTIVE),
    "dropout": (2, f"{CP2} --hidden-dropout 0.1 {RECOMPUTE}", SELECTIVE),
    "distributed activations": (
        4,
        f"{CP2} --tensor-model-parallel-size 2 --distribute-saved-activations {RECOMPUTE}",
        SELECTIVE,
    ),
    "block": (
        2,
        f"{CP2} --num-layers 3 --recompute-granularity full --recompute-method block --recompute-num-layers 2",
        SELECTIVE,
    ),
    "two layers at once": (
        2,
        f"{CP2} --num-layers 4 {RECOMPUTE.replace('layers 1', 'layers 2')}",
        f"{SELECTIVE} 1-2,4",
    ),
}


@pytest.mark.parametrize("name", mostly_nightly(RUNS, always=["everything"]))
def test_selective_checkpoint_repeats_full_recomputation(name: str) -> None:
    world_size, shared, selective = RUNS[name]
    full = train(world_size, shared)
    kept = train(world_size, f"{shared} {selective}")
    assert [(s.lm_loss, s.grad_norm) for s in kept] == [(s.lm_loss, s.grad_norm) for s in full]
    assert all(0 < k.ring_forwards < f.ring_forwards for k, f in zip(kept, full, strict=True))
    if name not in ("block", "two layers at once"):
        assert [2 * s.ring_forwards for s in kept] == [s.ring_forwards for s in full]


@pytest.mark.nightly
def test_selective_checkpoint_of_packed_documents() -> None:
    flags = f"--sft {LOONG} --context-parallel-size 4 --loong-head-parallel-size 2 {RECOMPUTE}".split()
    full = megatron_runs.train(packed_script(), 4, *flags)
    kept = megatron_runs.train(packed_script(), 4, *flags, SELECTIVE)
    assert [(s.lm_loss, s.grad_norm) for s in kept] == [(s.lm_loss, s.grad_norm) for s in full]
    assert [2 * s.ring_forwards for s in kept] == [s.ring_forwards for s in full]


@pytest.mark.parametrize("flags", ["", f"{CP2} {RECOMPUTE}"], ids=["native", "cp2-recomputed"])
def test_tiled_loss_and_mlp_train_as_untiled(flags: str) -> None:
    world_size = 2 if flags else 1
    untiled = train(world_size, flags)
    tiled = train(world_size, f"{flags} --loong-tiled-loss 24 --loong-tiled-mlp 3")
    assert_same(tiled, untiled)


@pytest.mark.nightly
def test_tiled_loss_with_a_parallel_vocabulary_and_tied_embeddings() -> None:
    flags = "--tensor-model-parallel-size 2"
    assert_same(train(2, f"{flags} --loong-tiled-loss 10"), train(2, flags))


@pytest.mark.nightly
def test_multi_token_prediction() -> None:
    """Needs a checkout's pretrain_gpt.py: its head is used once more per depth, and its layer is recomputed too."""
    if megatron_runs.checkout_script() is None:
        pytest.skip("set MEGATRON_LM_PATH to a Megatron-LM checkout")
    flags = f"{CP2} {RECOMPUTE} --mtp-num-layers 1"
    full = train(2, flags)
    assert_same(train(2, f"{flags} --loong-tiled-loss 10"), full)
    kept = train(2, f"{flags} {SELECTIVE}")
    assert [(s.lm_loss, s.grad_norm) for s in kept] == [(s.lm_loss, s.grad_norm) for s in full]
    assert [2 * s.ring_forwards for s in kept] == [s.ring_forwards for s in full]


@pytest.mark.nightly
@pytest.mark.parametrize("size", ["2", "all"])
def test_optimizer_states_in_a_subgroup_train_as_plain_data_parallel(size: str) -> None:
    flags = f"{CP2} --optimizer adam --lr 1e-3"
    assert_same(train(4, f"{flags} --loong-zero-optimizer-size {size}"), train(4, flags))


def assert_same(steps: list[megatron_runs.Step], expected: list[megatron_runs.Step]) -> None:
    """Losses and gradient norms to float32's precision: tiles are summed in another order."""
    assert len(steps) == len(expected)
    for step, wanted in zip(steps, expected, strict=True):
        assert step.lm_loss == pytest.approx(wanted.lm_loss, rel=1e-6)
        assert step.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)
