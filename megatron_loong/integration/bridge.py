"""Megatron-Bridge (and NeMo, whose recipes are Megatron-Bridge's): the same options on a recipe's config.

    config = llama3_8b_pretrain_config()
    config.model.context_parallel_size = 8
    use_loong(config, head_parallel_size=4)
    pretrain(config, forward_step)

Bridge builds Megatron-Core's own layers and groups, so the hooks of `install` are all it needs.
"""

from __future__ import annotations

import os
from typing import Any

from megatron_loong.integration.checks import check_kernel_name, check_options, refuse
from megatron_loong.integration.hooks import install, place_this_process
from megatron_loong.integration.options import LoongOptions, fields_of_mapping


def use_loong(config: Any, **options: Any) -> LoongOptions:
    """Train `config` (a ConfigContainer, or anything whose `model` is a TransformerConfig) with 2D-Attention.

    `options`: those of `LoongOptions`, with or without `loong_` before them. Call it after the parallel sizes are set
    and before Bridge initializes torch.distributed, on every rank; with a placement, this process takes another RANK.
    Raises `ValueError` and `NotImplementedError` for what contradicts or does not work yet, as the flags would.
    """
    model = config.model
    chosen = LoongOptions(**fields_of_mapping({"context_parallel_impl": "loong", **options}))
    sizes = {
        "cp": model.context_parallel_size,
        "tp": model.tensor_model_parallel_size,
        "num_attention_heads": model.num_attention_heads,
    }
    check_options(
        chosen,
        **sizes,
        cp_comm_type=getattr(model, "cp_comm_type", None),
        hierarchical_context_parallel_sizes=getattr(model, "hierarchical_context_parallel_sizes", None),
    )
    check_kernel_name(chosen.loong_kernel)
    refuse(model)
    if getattr(model, "hybrid_context_parallel", False):
        raise NotImplementedError(
            "hybrid_context_parallel does not work through Megatron-Bridge with context_parallel_impl='loong' yet; "
            "supported: Megatron's own training loop, or one context-parallel size for all batches"
        )
    if getattr(getattr(config, "dist", None), "use_tp_pp_dp_mapping", False):
        order = "tp-cp-ep-pp-dp"
    else:
        order = "tp-cp-ep-dp-pp"
    install(chosen)
    place_this_process(
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        context_parallel_size=sizes["cp"],
        tensor_model_parallel_size=sizes["tp"],
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        num_attention_heads=sizes["num_attention_heads"],
        order=order,
    )
    return chosen
