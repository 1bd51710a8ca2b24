"""A GPT on packs that this program cuts by itself, as trainers on Megatron do; a script for `megatron_runs.train`.

`packed_gpt.py` with every document padded to a multiple of 2 x 4 ranks and cut in zigzag before Megatron sees it (see
`tests.integration.foreign_cuts`). PackedSeqParams tell the real lengths and the padded ones.
"""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import packed_gpt as packs
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction

from tests.integration.foreign_cuts import cut_by_verl

MULTIPLE = 8


class PaddedPacks(packs.ToyPacks):
    """Documents of 1 to 24 tokens, each padded to a multiple; the first third of each has no loss."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(1000 + index)
        lengths: list[int] = []
        starts = [0]
        while starts[-1] < self.seq_len:
            lengths.append(min(int(torch.randint(1, 25, (), generator=draw)), self.seq_len - starts[-1]))
            starts.append(starts[-1] + -(-lengths[-1] // MULTIPLE) * MULTIPLE)
        text = torch.randint(1, self.vocabulary, (self.seq_len + 1,), generator=draw)
        loss_mask, position_ids = torch.zeros(self.seq_len), torch.zeros(self.seq_len, dtype=torch.int64)
        for length, (start, stop) in zip(lengths, itertools.pairwise(starts), strict=True):
            loss_mask[start + length // 3 : start + length - 1] = 1
            position_ids[start:stop] = torch.arange(stop - start)
            text[start + length : stop] = 0
        boundaries = {}
        for key, values in (("cu_seqlens", [0, *itertools.accumulate(lengths)]), ("cu_seqlens_padded", starts)):
            boundaries[key] = torch.full((self.seq_len + 1,), values[-1], dtype=torch.int32)
            boundaries[key][: len(values)] = torch.tensor(values)
        sample = {"tokens": text[:-1], "labels": text[1:], "loss_mask": loss_mask, "position_ids": position_ids}
        return {**sample, **boundaries}


packs.ToyPacks = PaddedPacks


def forward_step(data_iterator, model):
    """One micro-batch of one pack."""
    batch: dict[str, Any] = dict(next(data_iterator))
    real, padded = (batch.pop(key).squeeze(0) for key in ("cu_seqlens", "cu_seqlens_padded"))
    longest, tokens = int(padded.diff().max()), batch["tokens"].shape[1]
    packed: Any = PackedSeqParams("thd", real, real, padded, padded, max_seqlen_q=longest, max_seqlen_kv=longest)
    cp_group: Any = mpu.get_context_parallel_group()
    if cp_group.size() == 1:
        batch["attention_mask"] = packs.spelled_out(padded, tokens)
        whole = PackedSeqParams("thd", padded, padded)
        multi_token_prediction.roll_tensor = partial(packs.roll_inside, whole)
        packed = None
    else:
        cut = partial(cut_by_verl, cu_seqlens=padded.tolist(), cp_size=cp_group.size(), cp_rank=cp_group.rank())
        batch = {key: cut(x.squeeze(0)).unsqueeze(0) for key, x in batch.items()} | {"attention_mask": None}
    named = {key: batch[key] for key in ("position_ids", "attention_mask", "labels", "loss_mask")}
    output = model(input_ids=batch["tokens"], packed_seq_params=packed, **named)
    return output, partial(packs.base.sum_loss, batch["loss_mask"])


if __name__ == "__main__":
    packs.run(forward_step)
