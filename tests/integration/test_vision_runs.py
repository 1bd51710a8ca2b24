"""LLaVA and MIMO, trained by `megatron.training` over ranks as on one: losses and gradient norms of every step.

Samples have from none to five pictures (tests/integration/vision_gpt.py), and no rank may encode more than its share.
MEGATRON_LM_MAIN_PATH: a checkout of Megatron-LM whose own
pretrain_vlm.py is run too; last run with 0.18.2, 0.19.0 and main d98e8a64.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integration import megatron_runs
from tests.integration.test_packed_runs import CP2, CP4, Case, packed_script
from tests.integration.test_pretrain_gpt import assert_same_steps
from tests.nightly import mostly_nightly

PP2, TP2 = "--pipeline-model-parallel-size 2", "--tensor-model-parallel-size 2"
LENGTH = "--decoder-seq-length 64"


MIMO = "--vision-model mimo"
CASES = [
    Case("llava", "", always=True),
    Case("llava-tp2", TP2, CP2, native_world_size=2, always=True),
    Case("llava-pp2", PP2, CP2, native_world_size=2, always=True),
    Case("llava-two-samples", "--micro-batch-size 2"),
    Case("llava-few-images", "--images few"),
    Case("llava-no-images", "--images none"),
    Case("llava-frozen-vision", "--freeze vision"),
    Case("llava-frozen-vision-and-projection", "--freeze vision projection"),
    Case("llava-frozen-language", "--freeze language"),
    Case("llava-per-token-loss", "--calculate-per-token-loss"),
    Case("llava-length-59", "--decoder-seq-length 59 --text-length 30"),
    Case("llava-overlap", "--optimizer adam --lr 0.001", f"{CP2} --use-distributed-optimizer --overlap-grad-reduce"),
    Case("llava-recompute", "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    Case("llava-dp2", "", CP2),
    Case("llava-double-ring", "", f"{CP4.replace('size 2', 'size 1')} --loong-inner-ring-size 2"),
    Case("llava-learned-positions", "--position-embedding-type learned_absolute"),
    Case("llava-tiled-loss", "", f"{CP4} --loong-tiled-loss 16"),
    Case("mimo", MIMO, always=True),
    Case("mimo-two-samples", f"{MIMO} --micro-batch-size 2"),
    Case("mimo-packed", f"{MIMO} --micro-batch-size 2 --packed", always=True),
    Case("mimo-mrope", f"{MIMO} --position-embedding-type mrope --mrope-section 1 1 2"),
    Case("mimo-length-62", f"{MIMO} --decoder-seq-length 62"),
    Case("mimo-tp2", f"{MIMO} {TP2}", CP2, native_world_size=2),
    Case("mimo-frozen-vision", f"{MIMO} --freeze vision"),
    Case("mimo-few-images", f"{MIMO} --images few"),
]


def vision_script() -> Path:
    return packed_script().with_name("vision_gpt.py")


@pytest.mark.parametrize("case", mostly_nightly(CASES, [x for x in CASES if x.always]), ids=lambda case: case.name)
def test_trains_as_on_one_rank(case: Case) -> None:
    shared = [*LENGTH.split(), *case.shared.split()]
    native = megatron_runs.train(vision_script(), case.native_world_size, *shared)
    loong = ["--context-parallel-impl", "loong", *case.loong.split()]
    assert_same_steps(megatron_runs.train(vision_script(), 4, *shared, *loong), native)


def test_a_lost_gradient_of_an_image_is_found() -> None:
    native = megatron_runs.train(vision_script(), 1, *LENGTH.split())
    loong = ["--context-parallel-impl", "loong", *CP4.split()]
    found = megatron_runs.train(vision_script(), 4, *LENGTH.split(), *loong, fault="lost_image_gradients")
    with pytest.raises(AssertionError, match="grad_norm of step 1"):
        assert_same_steps(found, native)


def test_dropout_in_the_tower_leaves_all_images_to_every_rank() -> None:
    """Where the number that a rank encodes is then more than its share, which the script is there to notice."""
    loong = ["--context-parallel-impl", "loong", *CP2.split()]
    with pytest.raises(RuntimeError, match=r"given \d images to encode, and its share is \d"):
        megatron_runs.train(vision_script(), 2, *LENGTH.split(), *loong, "--vision-dropout", "0.1")


MISTAKES = [
    ("--vision-cp 2", r"context_parallel_size=2 in the TransformerConfig of CLIPViTModel, which encodes images"),
    ("--tiles 3", r"num_image_tiles=\[3\] are not the tiles of \d images"),
    (
        f"{MIMO} --decoder-seq-length 62 --position-embedding-type mrope --mrope-section 1 1 2",
        r"62 tokens would be padded to 64, which does not work with --position-embedding-type mrope",
    ),
    ("--mtp-num-layers 1", r"images do not work with --mtp-num-layers .* supported: 0"),
]


@pytest.mark.parametrize(
    ("flags", "message"),
    mostly_nightly(MISTAKES, always=MISTAKES[-1:]),
)
def test_mistakes_are_refused_by_name(flags: str, message: str) -> None:
    loong = ["--context-parallel-impl", "loong", *CP2.split()]
    with pytest.raises(RuntimeError, match=message):
        megatron_runs.train(vision_script(), 2, *LENGTH.split(), *loong, *flags.split())


PRETRAIN_VLM = {
    "whole": ("--dataloader-seq-length 60", "", CP4),
    "padded-pack": ("--dataloader-seq-length 50 --micro-batch-size 2", "", CP4),
    "tp2-pack": (f"--dataloader-seq-length 60 {TP2}", "--use-packed-sequence", CP2),
}


@pytest.mark.parametrize("name", PRETRAIN_VLM)
def test_pretrain_vlm_trains_as_on_one_rank(name: str) -> None:
    path = os.environ.get("MEGATRON_LM_MAIN_PATH")
    if path is None:
        pytest.skip("set MEGATRON_LM_MAIN_PATH to a checkout of Megatron-LM's main")
    script = Path(path).resolve() / "pretrain_vlm.py"
    shared, alone, layout = PRETRAIN_VLM[name]
    flags = f"--img-h 12 --img-w 12 --patch-dim 6 --ckpt-format torch --disable-vision-class-token {shared}".split()
    native = megatron_runs.train(script, 2 if TP2 in shared else 1, *flags)
    loong = ["--context-parallel-impl", "loong", *layout.split(), *alone.split()]
    assert_same_steps(megatron_runs.train(script, 4, *flags, *loong), native)
