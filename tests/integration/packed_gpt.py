"""A GPT on packs of documents, trained by `megatron.training`; a script for `megatron_runs.train`, and no tests.

`scripts/pretrain_gpt.py` with what the tests need besides: documents (`--dataloader-inter-document-masking`, or toy
packs with `--sft`), and MTP. On one rank Megatron's local attention refuses packed sequences, so there it gets the mask
as a tensor, spelled out document by document, and MTP its documents besides: the reference to repeat.
"""

from __future__ import annotations

import inspect
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import pretrain_gpt as base
from megatron import training
from megatron.core import mpu, utils
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction
from megatron.training import arguments, get_args

KEYS = (*base.BATCH_KEYS, "cu_seqlens", "cu_seqlens_padded", "max_seqlen")
base.UNREAD_ARGUMENTS.clear()


def gpt_with_mtp(config: Any, transformer_layer_spec: Any, **kwargs: Any) -> GPTModel:
    """`GPTModel`, with the blocks that `--mtp-num-layers` asks for."""
    mtp = None
    if config.mtp_num_layers:
        mtp = gpt_layer_specs.get_gpt_mtp_block_spec(config, transformer_layer_spec, use_transformer_engine=False)
    return GPTModel(config=config, transformer_layer_spec=transformer_layer_spec, mtp_block_spec=mtp, **kwargs)


base.GPTModel = gpt_with_mtp


class ToyPacks(torch.utils.data.Dataset):
    """Packs of documents of 1 to 40 tokens; the first third of each is a prompt, which has no loss.

    Odd packs say that the last tokens of each longer document are padding, as SFT data with `cu_seqlens_padded` does.
    """

    def __init__(self, samples: int, seq_len: int, vocabulary: int) -> None:
        self.samples, self.seq_len, self.vocabulary = samples, seq_len, vocabulary

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(1000 + index)
        ends: list[int] = []
        while not ends or ends[-1] < self.seq_len:
            ends.append(min((ends or [0])[-1] + int(torch.randint(1, 41, (), generator=draw)), self.seq_len))
        text = torch.randint(1, self.vocabulary, (self.seq_len + 1,), generator=draw)
        loss_mask, position_ids = torch.ones(self.seq_len), torch.arange(self.seq_len)
        for start, end in zip([0, *ends], ends, strict=False):
            loss_mask[start : start + (end - start) // 3] = 0
            loss_mask[end - 1] = 0
            position_ids[start:end] -= start
            if index % 2 and end - start > 4:
                loss_mask[end - 3 : end] = 0
                text[end - 2 : end] = 0
        cu_seqlens = torch.full((self.seq_len + 1,), self.seq_len, dtype=torch.int32)
        cu_seqlens[: len(ends) + 1] = torch.tensor([0, *ends])
        longest = max(b - a for a, b in zip([0, *ends], ends, strict=False))
        sample = {"tokens": text[:-1], "labels": text[1:], "loss_mask": loss_mask, "position_ids": position_ids}
        return {**sample, "cu_seqlens": cu_seqlens, "max_seqlen": torch.tensor(longest, dtype=torch.int32)}


def provide_datasets(num_samples: list[int], vp_stage: int | None = None):
    """Toy packs with `--sft`, else what `--data-path` names, cut where its documents end if that is asked for."""
    args: Any = get_args()
    if args.sft:
        return tuple(ToyPacks(max(n or 0, 1), args.seq_length, args.vocab_size) for n in num_samples)
    args.inter_document_masking = getattr(args, "dataloader_inter_document_masking", False)
    return base.provide_datasets(num_samples, vp_stage)


provide_datasets.is_distributed = True


def spelled_out(cu_seqlens: torch.Tensor, seq_len: int) -> torch.Tensor:
    """The mask of a pack, [1, 1, S, S], true where a query must not look."""
    document = torch.bucketize(torch.arange(seq_len), cu_seqlens.flatten()[1:], right=True)
    place = torch.arange(seq_len)
    return ~((document[:, None] == document[None]) & (place[:, None] >= place[None]))[None, None]


roll_tensor = multi_token_prediction.roll_tensor


def roll_inside(packed: PackedSeqParams, *args: Any, **kwargs: Any) -> Any:
    """Megatron's roll for MTP inside documents, of which a model without packed attention is not told."""
    return roll_tensor(*args, **{**kwargs, "packed_seq_params": packed})


def forward_step(data_iterator, model):
    """One micro-batch: documents told to attention by boundaries, or on one rank by a mask."""
    args: Any = get_args()
    loaded = next(data_iterator)
    batch: dict[str, Any] = {key: loaded.get(key) for key in KEYS}
    if batch["cu_seqlens"] is None:
        return base.forward_step(iter([loaded]), model)
    batch = utils.flatten_batch_for_packed_sequences(batch)
    place = batch["position_ids"]
    cu_seqlens, tokens = batch["cu_seqlens"].squeeze(0), batch["tokens"].shape[1]
    cp_group: Any = mpu.get_context_parallel_group()
    longest = int(batch["max_seqlen"].max())
    packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest)
    if cp_group.size() == 1:
        batch["attention_mask"] = spelled_out(cu_seqlens, tokens)
        multi_token_prediction.roll_tensor = partial(roll_inside, packed)
        packed = None
    else:
        whole = args.dataloader_inter_document_masking
        batch = utils.get_batch_on_this_cp_rank(batch, False, cp_group, use_per_sequence_balancing=whole)
    if args.position_embedding_type == "mrope":  # of the whole pack: time, height, width
        batch["position_ids"] = torch.stack([place // 3, place % 5, place % 3])
    named = {key: batch[key] for key in ("position_ids", "attention_mask", "labels", "loss_mask")}
    output = model(input_ids=batch["tokens"], packed_seq_params=packed, **named)
    return output, partial(base.sum_loss, batch["loss_mask"])


def run(forward_step: Any) -> None:
    """Train as the command line says."""
    parts = {"model_provider": base.provide_model, "model_type": ModelType.encoder_or_decoder}
    parts.update(train_valid_test_dataset_provider=provide_datasets, forward_step_func=forward_step)
    if "cfg_container" in inspect.signature(training.pretrain).parameters:  # 0.18 on
        from megatron.training import argument_utils

        parts["cfg_container"] = argument_utils.pretrain_cfg_container_from_args(arguments.parse_and_validate_args())
    training.pretrain(**parts)


if __name__ == "__main__":
    run(forward_step)
