"""`packed_gpt.py` with references for what one rank of Megatron cannot do by itself; a script, and no tests.

On one rank packs are told to attention by a mask. A window takes the mask's place in Megatron, and MTP rolls over the
ends of documents: here both know the documents there too. MTP may stand on any stage of an interleaved pipeline.
"""

from __future__ import annotations

from typing import Any

import packed_gpt
import torch
from megatron.core.fusions import fused_softmax
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction

window_mask, roll, spelled_out = (
    fused_softmax.get_sliding_window_causal_mask,
    multi_token_prediction.roll_tensor,
    packed_gpt.spelled_out,
)


def gpt_with_mtp(config: Any, transformer_layer_spec: Any, vp_stage: int | None = None, **kwargs: Any) -> GPTModel:
    """As in `packed_gpt`, for the stage at hand."""
    mtp: Any = None
    if config.mtp_num_layers:
        mtp = gpt_layer_specs.get_gpt_mtp_block_spec(config, transformer_layer_spec, False, vp_stage=vp_stage)
    return GPTModel(config, transformer_layer_spec, vp_stage=vp_stage, mtp_block_spec=mtp, **kwargs)


def spelled_out_to_all(cu_seqlens: torch.Tensor, seq_len: int) -> torch.Tensor:
    """The mask of a pack, told to windows and MTP too."""
    mask = spelled_out(cu_seqlens, seq_len)
    boundaries = torch.unique_consecutive(cu_seqlens.flatten())
    documents = PackedSeqParams("thd", boundaries, boundaries)

    def rolled(tensor: Any, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        return roll(tensor, *args, packed_seq_params=documents, **kwargs)

    fused_softmax.get_sliding_window_causal_mask = lambda *sizes: window_mask(*sizes) | mask
    multi_token_prediction.roll_tensor = rolled
    return mask


def forward_step(data_iterator: Any, model: Any) -> Any:
    """As in `packed_gpt`; a stage in the middle of an interleaved pipeline reads no batch."""
    step = packed_gpt.base.forward_step if data_iterator is None else packed_gpt.forward_step
    return step(data_iterator, model)


packed_gpt.base.GPTModel = gpt_with_mtp
packed_gpt.spelled_out = spelled_out_to_all

if __name__ == "__main__":
    packed_gpt.run(forward_step)
