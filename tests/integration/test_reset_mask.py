"""`--reset-attention-mask` as boundaries: the documents that Megatron's own mask keeps apart, and the same losses."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

from megatron_loong.integration import reset_mask
from megatron_loong.integration.checks import refuse_beside_reset
from tests.integration import megatron_runs
from tests.integration.test_pretrain_gpt import assert_same_steps, script_or_skip
from tests.nightly import mostly_nightly

EOD = 9
ROWS = torch.tensor([[1, 2, EOD, 3, 4, 5, EOD, EOD], [1, 2, 3, 4, 5, 6, 7, 8]])
#: Documents of 3, 4 and 1 tokens, and one of 8.
BOUNDARIES = [0, 3, 7, 8, 16]


def batch_of(create_mask: bool, reset_position_ids: bool) -> dict[str, Any]:
    """A batch as Megatron's dataset makes it for these rows."""
    parts = [_get_ltor_masks_and_position_ids(row, EOD, reset_position_ids, True, False, create_mask) for row in ROWS]
    masks, loss_masks, position_ids = zip(*parts, strict=True)
    mask = torch.stack(masks) if create_mask else None
    named = {"tokens": ROWS, "labels": ROWS + 1, "loss_mask": torch.stack(loss_masks)}
    return {**named, "position_ids": torch.stack(position_ids), "attention_mask": mask}


@pytest.mark.parametrize(("create_mask", "reset_position_ids"), [(True, False), (True, True), (False, True)])
def test_the_documents_are_those_of_megatrons_mask(create_mask: bool, reset_position_ids: bool) -> None:
    batch, cu_seqlens = reset_mask.as_one_pack(batch_of(create_mask, reset_position_ids))
    assert cu_seqlens.tolist() == BOUNDARIES and cu_seqlens.dtype == torch.int32
    assert batch["attention_mask"] is None
    assert torch.equal(batch["tokens"], ROWS.reshape(1, 16)) and torch.equal(batch["labels"], ROWS.reshape(1, 16) + 1)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"pipeline_model_parallel_size": 2}, NotImplementedError, "pipeline-model-parallel-size above 1 .*supported"),
        ({"mtp_num_layers": 1}, NotImplementedError, "mtp-num-layers .*supported: --dataloader-inter"),
        ({"create_attention_mask_in_dataloader": False}, ValueError, "leaves no trace .*add --reset-position-ids"),
    ],
    ids=["pipeline", "mtp", "no-trace"],
)
def test_refused_beside_it(args: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        refuse_beside_reset(types.SimpleNamespace(reset_attention_mask=True, **args))
    refuse_beside_reset(types.SimpleNamespace(reset_attention_mask=False, **args))


def test_attention_that_was_told_no_documents_is_an_error() -> None:
    state: Any = types.SimpleNamespace(args=lambda: types.SimpleNamespace(reset_attention_mask=True))
    with pytest.raises(
        NotImplementedError, match="--reset-attention-mask is not in effect .*supported: batches cut by"
    ):
        reset_mask.refuse_lost_documents(state)


def data(folder: Path) -> str:
    """Flags for tokens of which one in six may end a document; the end is 254 or 255, depending on the version."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 254, (4096,), generator=draw)
    ends = torch.rand(4096, generator=draw) < 1 / 6
    tokens[ends] = torch.randint(254, 256, (int(ends.sum()),), generator=draw)
    builder = IndexedDatasetBuilder(str(folder / "ends.bin"), dtype=numpy.uint16)
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(folder / "ends.idx"))
    vocabulary = "--vocab-size 255 --make-vocab-size-divisible-by 4"
    return f"--data-path {folder / 'ends'} --data-cache-path {folder / 'cache'} --split 100,0,0 {vocabulary}"


CASES = {
    "from-the-mask": "--micro-batch-size 2 --context-parallel-size 4 --loong-head-parallel-size 2",
    "from-positions": "--context-parallel-size 4 --loong-head-parallel-size 1 --reset-position-ids "
    "--no-create-attention-mask-in-dataloader",
    "tp2": "--context-parallel-size 2 --tensor-model-parallel-size 2 --loong-head-parallel-size 1",
}


@pytest.mark.parametrize("name", mostly_nightly(CASES, always=["from-the-mask"]))
def test_trains_as_on_one_rank_with_the_mask(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    script = script_or_skip("checkout" if megatron_runs.checkout_script() else "own")
    shared = [*data(tmp_path_factory.mktemp("ends")).split(), "--reset-attention-mask"]
    native = megatron_runs.train(script, 1, *shared)
    steps = megatron_runs.train(script, 4, *shared, "--context-parallel-impl", "loong", *CASES[name].split())
    assert_same_steps(steps, native)


@pytest.mark.nightly
def test_the_mask_of_documents_makes_a_difference(tmp_path: Path) -> None:
    script = script_or_skip("checkout" if megatron_runs.checkout_script() else "own")
    whole = megatron_runs.train(script, 1, *data(tmp_path).split())
    masked = megatron_runs.train(script, 1, *data(tmp_path).split(), "--reset-attention-mask")
    assert abs(whole[0].grad_norm / masked[0].grad_norm - 1) > 1e-3
