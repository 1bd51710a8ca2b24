"""The pretrain_gpt.py of MEGATRON_LM_PATH on toy documents, by hybrid context parallelism or one by one; no tests.

Megatron's own data for it (`--sft`) wants a chat template and a package more. Here a pack holds four documents of 8 to
56 tokens, multiples of 8, as Megatron before 0.18 needs them; without `--hybrid-context-parallel` each is a sample.
"""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, os.environ["MEGATRON_LM_PATH"])

from megatron import training

LENGTHS = ((8, 40, 8, 8), (16, 24, 8, 16), (56, 8, 0, 0), (8, 16, 32, 8))
"""Of the documents of each pack of 64 tokens; packs repeat them."""


class Documents(torch.utils.data.Dataset):
    """Packs of 64 tokens, or their documents one by one; a third of the tokens have no loss."""

    def __init__(self, samples: int, packed: bool) -> None:
        self.samples, self.packed = samples, packed

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pack, place = (index, None) if self.packed else divmod(index, 4)
        lengths = torch.tensor(LENGTHS[pack % 4], dtype=torch.int32)
        draw = torch.Generator().manual_seed(1000 + pack)
        text = torch.randint(1, 250, (65,), generator=draw)
        loss_mask = (torch.rand(64, generator=draw) < 2 / 3).float()
        ends = lengths.cumsum(0).int()
        position_ids = torch.cat([torch.arange(int(n)) for n in lengths])
        sample = {"tokens": text[:-1], "labels": text[1:], "loss_mask": loss_mask, "position_ids": position_ids}
        if place is None:
            return {**sample, "cu_seqlens": torch.nn.functional.pad(ends, (1, 0)), "max_seqlen": lengths.max()}
        if not lengths[place]:  # a sample has to be something: a token without loss
            return {key: x[:1] * 0 for key, x in sample.items()}
        return {key: x[ends[place] - lengths[place] : ends[place]] for key, x in sample.items()}


def provide_datasets(num_samples: list[int], vp_stage: int | None = None):
    """As many samples as asked for, of whichever kind."""
    packed: Any = training.get_args()
    return tuple(Documents(max(n or 0, 1), packed.hybrid_context_parallel) for n in num_samples)


provide_datasets.is_distributed = True

if __name__ == "__main__":
    original = training.pretrain
    signature = inspect.signature(original)

    def pretrain(*args: Any, **kwargs: Any) -> Any:
        """Megatron's, with the data of above."""
        given = signature.bind(*args, **kwargs)
        given.arguments["train_valid_test_dataset_provider"] = provide_datasets
        return original(*given.args, **given.kwargs)

    training.pretrain = pretrain
    script = Path(os.environ["MEGATRON_LM_PATH"], "pretrain_gpt.py")
    exec(compile(script.read_text(), str(script), "exec"), {"__name__": "__main__"})
