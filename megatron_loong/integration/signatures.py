"""What each hooked function of Megatron takes, held against what its hook was written for.

A hook passes on what it does not know. It cannot where it does the work itself (`DOES_IT_ITSELF`): there an argument
that nobody here knows is an error at start, as is one that a hook reads and that is gone. Other news are only said.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple


class Takes(NamedTuple):
    """Parameters of a hooked function in megatron-core 0.16.1 to 0.19.2 and Megatron-LM main d98e8a64 (0.20.0)."""

    first: str
    """By which it begins: its hook takes them by place."""
    read: str = ""
    """Which the hook reads by name."""
    others: str = ""


_ATTENTION = "layer_number attn_mask_type attention_type cp_comm_type pg_collection pp_layer_offset name"
_PIPELINE = Takes(
    "",
    "seq_length decoder_seq_length",
    "forward_step_func data_iterator model num_microbatches micro_batch_size forward_only collect_non_loss_data "
    "first_val_step adjust_tensor_shapes_fn p2p_communicator pg_collection force_all_reduce",
)
_ROTARY = (
    "rotary_interleaved multi_latent_attention mla_rotary_interleaved mscale inverse mla_output_remove_interleaving "
    "cp_group max_seqlen"
)

TAKES = {
    "add_megatron_arguments": Takes("parser"),
    "initialize_model_parallel": Takes(
        "",
        "context_parallel_size",
        "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
        "pipeline_model_parallel_comm_backend use_sharp hierarchical_context_parallel_sizes hybrid_context_parallel "
        "expert_model_parallel_size gtp_remat_size expert_gtp_remat_size num_distributed_optimizer_instances "
        "expert_tensor_parallel_size nccl_communicator_config_path distributed_timeout_minutes order "
        "get_embedding_ranks get_position_embedding_ranks create_gloo_process_groups high_priority_stream_groups "
        "sharp_enabled_group create_all_gather_group rank_offset local_world_size",
    ),
    "destroy_model_parallel": Takes(""),
    "attention_init": Takes("self config submodules", others=_ATTENTION),
    "mla_init": Takes("self config submodules", others=_ATTENTION),
    "attention_forward": Takes(
        "self",
        "packed_seq_params",
        "hidden_states attention_mask key_value_states inference_context rotary_pos_emb rotary_pos_cos rotary_pos_sin "
        "rotary_pos_cos_sin attention_bias sequence_len_offset inference_params",
    ),
    "model_forward": Takes(
        "self",
        "input_ids labels packed_seq_params",
        "position_ids attention_mask decoder_input inference_context extra_block_kwargs runtime_gather_output "
        "inference_params loss_mask padding_mask output_processor output_processor_context is_spec_decode",
    ),
    "language_model_loss": Takes("self labels logits"),
    "acceptance_counts": Takes("mtp_logits mtp_labels loss_mask", others="output_layer runtime_gather_output tp_group"),
    "mlp_forward": Takes("self hidden_states", others="per_token_scale kwargs"),
    "te_checkpoint": Takes(
        "forward_func", others="distribute_saved_activations get_rng_state_tracker tp_group args kwargs"
    ),
    "compile_helpers": Takes(""),
    "calc_loss": Takes(
        "",
        "loss_func config collect_non_loss_data",
        "model output_tensor vp_stage num_microbatches forward_data_store cp_group_size is_last_stage",
    ),
    "pipeline": _PIPELINE,
    "pipeline_interleaved": _PIPELINE,
    "roll": Takes("tensor", "cp_group packed_seq_params", "shifts dims return_sum"),
    "mtp_loss": Takes(
        "",
        "labels loss_mask config cp_group packed_seq_params",
        "hidden_states output_layer output_weight runtime_gather_output is_training compute_language_model_loss "
        "tp_group scale_logits_fn input_ids",
    ),
    "hybrid_batch": Takes(
        "batch",
        others="is_sft has_cu_seqlens is_hybrid_cp create_attention_mask_in_dataloader broadcast_src_rank "
        "broadcast_group cp_size tp_rank micro_batch_size seq_length mtp_on_this_rank pipeline_model_parallel_size "
        "is_pipeline_first_stage is_pipeline_last_stage",
    ),
    "hybrid_one_rank": Takes("batch local_cp_size", others="cp_group"),
    "hybrid_iterator": Takes("self"),
    "hybrid_backward_step": Takes("input_tensor output_tensor output_tensor_grad", others="model_type config"),
    "roll_packed": Takes("tensor shifts dims packed_seq_params cp_group", others="return_sum"),
    "rotary_slice": Takes("pos_emb seq_dim cp_group"),
    "rotary_thd": Takes("t cu_seqlens freqs", "cp_group", _ROTARY),
    "fused_rotary_thd": Takes("t cu_seqlens freqs", "cp_size cp_rank", "interleaved"),
    "slice_sequence": Takes("batch cp_group"),
    "slice_packed": Takes("batch cp_group"),
    "slice_thd": Takes("batch cu_seqlens cu_seqlens_padded max_seqlen cp_size cp_rank"),
    "llava_forward": Takes(
        "self",
        "images input_ids num_image_tiles",
        "position_ids attention_mask labels loss_mask inference_context image_token_index runtime_gather_output "
        "packed_seq_params vision_packed_seq_params sound_clips sound_length sound_timestamps num_sound_clips "
        "imgs_sizes num_frames inference_params",
    ),
    "llava_merge": Takes(
        "self image_embeddings language_embeddings",
        "num_image_tiles",
        "input_ids loss_mask labels use_inference_kv_cache inference_context image_token_index inference_params "
        "is_packed_dynamic_res imgs_sizes position_ids sound_embeddings sound_embeddings_len sound_timestamps",
    ),
    "llava_cut": Takes(
        "self combined_embeddings", "packed_seq_params", "new_labels new_loss_mask expanded_labels expanded_loss_mask"
    ),
    "mimo_forward": Takes(
        "self", "input_ids modality_inputs", "position_ids attention_mask loss_mask labels packing_kwargs"
    ),
    "mimo_merge": Takes("self modality_embeddings input_ids special_token_ids"),
    "mimo_cut": Takes("self embeddings labels loss_mask packed_seq_params"),
    "mamba_undo": Takes("input_ cp_size packed_seq_params"),
    "mamba_redo": Takes("input_ cp_size packed_seq_params"),
}

DOES_IT_ITSELF = (
    *("roll_packed", "rotary_thd", "fused_rotary_thd", "slice_sequence", "slice_packed", "slice_thd"),
    *("mamba_undo", "mamba_redo", "rotary_slice", "llava_cut", "mimo_cut"),
)


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def news(name: str, function: Any) -> list[str]:
    """Parameters of the function hooked as `name` that were not there when its hook was written."""
    takes = TAKES.get(name)  # a class, such as the checkpoint, has none
    return [] if takes is None else [p for p in _parameters(function) if p not in " ".join(takes).split()]


def problem(name: str, function: Any) -> str | None:
    """Why the hook `name` cannot stand in the place of `function`: what follows its name in a message; else None."""
    takes = TAKES.get(name)
    if takes is None:
        return None
    first, there = takes.first.split(), _parameters(function)
    if there[: len(first)] != first:
        return f"({', '.join(first)}, ...)"
    missing = [p for p in takes.read.split() if p not in there]
    if missing:
        return f"({', '.join(missing)}=...)"
    unknown = news(name, function) if name in DOES_IT_ITSELF else []
    return f" without {', '.join(unknown)}" if unknown else None
