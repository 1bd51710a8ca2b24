"""`packed_gpt.py` whose micro-batches are what `--hybrid-context-parallel` schedules; a script, and no tests.

A micro-batch goes the way of Megatron 0.19's own pretrain_gpt.py.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import packed_gpt
from megatron.core import mpu, utils
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.training import get_args

sizes_seen: set[int] = set()
"""Every `local_cp_size` that this rank met."""


def scheduled_batch(data_iterator: Any) -> dict[str, Any]:
    """One sequence that the scheduler gave to this rank: its tokens here, and the group that shares it."""
    args: Any = get_args()
    keys = (*packed_gpt.KEYS, "local_cp_size", "hybrid_cp_group")
    tp_rank, batch = mpu.get_tensor_model_parallel_rank(), {}
    if tp_rank == 0:
        loaded = next(data_iterator)
        batch = {key: loaded.get(key) for key in keys}
    batch = utils.get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=True,
        is_hybrid_cp=True,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
    )
    return utils.get_batch_on_this_cp_rank(
        utils.flatten_batch_for_packed_sequences(batch),
        is_hybrid_cp=True,
        cp_group=mpu.get_context_parallel_group(),
        hybrid_cp_group_func=mpu.get_hybrid_data_context_parallel_groups,
    )


def forward_step(data_iterator, model):
    """One sequence over as many ranks as the scheduler gave it."""
    batch = scheduled_batch(data_iterator)
    size, cu_seqlens, longest = int(batch["local_cp_size"]), batch["cu_seqlens"][0], int(batch["max_seqlen"])
    sizes_seen.add(size)
    packed = PackedSeqParams(
        "thd",
        cu_seqlens,
        cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        local_cp_size=size,
        cp_group=batch["hybrid_cp_group"],
    )
    named = {key: batch[key] for key in ("position_ids", "attention_mask", "labels", "loss_mask")}
    output = model(input_ids=batch["tokens"], packed_seq_params=packed, **named)
    return output, partial(packed_gpt.base.sum_loss, batch["loss_mask"])


if __name__ == "__main__":
    packed_gpt.run(forward_step)
    if len(sizes_seen) < 2:
        sys.exit(f"every sequence was shared by the same number of ranks, {sizes_seen}: nothing dynamic was tested")
