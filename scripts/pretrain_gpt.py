r"""Pretrain a GPT with megatron.training, which megatron-core ships from 0.17 on: no Megatron-LM checkout needed.

    torchrun --nproc-per-node 8 -m megatron_loong scripts/pretrain_gpt.py <Megatron's arguments> \
        --context-parallel-size 8 --context-parallel-impl loong --loong-head-parallel-size 4

A plain GPT, dense or MoE. For SFT, MTP and the like run a Megatron-LM checkout's pretrain_gpt.py in the same way.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields
from functools import partial
from importlib import import_module
from typing import Any

import torch

try:
    from megatron import training
except ImportError as error:
    sys.exit(f"{error}: this needs megatron-core 0.17 or newer, or else the pretrain_gpt.py of a Megatron-LM checkout")
from megatron.core import mpu
from megatron.core.datasets import utils as dataset_utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import arguments, get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_loong.integration.dataset_helpers import compile_if_missing

BATCH_KEYS = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask")
UNREAD_ARGUMENTS = """sft mtp_num_layers fim_data hybrid_context_parallel dataloader_inter_document_masking spec
    logits_load_dir heterogeneous_layers_config_path experimental_attention_variant""".split()


def provide_model(pre_process: bool = True, post_process: bool = True, vp_stage=None, config=None, pg_collection=None):
    """This pipeline stage's part of the model, on the layers that `--transformer-impl` names."""
    args: Any = get_args()
    asked = [name for name in UNREAD_ARGUMENTS if getattr(args, name, None)]
    if asked:
        raise NotImplementedError(f"{asked} need the pretrain_gpt.py of a Megatron-LM checkout")
    config = config or arguments.core_transformer_config_from_args(args)
    use_te = args.transformer_impl == "transformer_engine"
    spec: Any
    if args.num_experts:
        spec = gpt_layer_specs.get_gpt_decoder_block_spec(
            config, use_te, normalization=args.normalization, qk_l2_norm=args.qk_l2_norm, vp_stage=vp_stage
        )
    else:
        shared = {name: getattr(args, name) for name in ("qk_layernorm", "multi_latent_attention", "qk_l2_norm")}
        if use_te:
            spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**shared)
        else:
            spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization=args.normalization, **shared)
    same_name = ("fp16_lm_cross_entropy", "position_embedding_type", "rotary_percent", "rotary_base")
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        rope_scaling=args.use_rope_scaling,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
        **{name: getattr(args, name) for name in same_name},
    )


def provide_datasets(num_samples: list[int], vp_stage: int | None = None):
    """Train, validation and test sets, on the stages that read them; every TP rank reads its own copy."""
    args: Any = get_args()
    values = {field.name: getattr(args, field.name) for field in fields(GPTDatasetConfig) if hasattr(args, field.name)}
    values["blend"], values["blend_per_split"] = get_blend_and_blend_per_split(args)
    values.update(random_seed=args.seed, sequence_length=args.seq_length, path_to_cache=args.data_cache_path)
    values.update(tokenizer=get_tokenizer(), create_attention_mask=args.create_attention_mask_in_dataloader)
    dataset = MockGPTDataset if args.mock_data else GPTDataset
    is_read_here = partial(is_first_or_last_pipeline_stage, vp_stage)
    return BlendedMegatronDatasetBuilder(dataset, num_samples, is_read_here, GPTDatasetConfig(**values)).build()


provide_datasets.is_distributed = True  # megatron.training then calls it on every rank, not on TP rank 0 alone


def sum_loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Loss sum and token count of this rank; Megatron adds both up over DP and CP before it divides."""
    loss = torch.sum(losses.view(-1).float() * loss_mask.view(-1).float())
    tokens = loss_mask.sum().detach().to(torch.int)
    settings: Any = get_args()
    if settings.check_for_nan_in_loss_and_grad:
        check = partial(get_rerun_state_machine().validate_result, loss, tolerance=0.0, fatal=True)
        check(rejection_func=lambda x: not torch.isfinite(x), message="found NaN or Inf in local forward loss")
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens])}


def forward_step(data_iterator, model):
    """One micro-batch: this rank's tokens of it, through this stage."""
    batch: dict[str, Any] = dict.fromkeys(BATCH_KEYS)
    cp_group: Any = mpu.get_context_parallel_group()
    if is_first_or_last_pipeline_stage(get_attr_wrapped_model(model, "vp_stage")):
        loaded = next(data_iterator)
        batch = {key: loaded[key].cuda(non_blocking=True) if key in loaded else None for key in BATCH_KEYS}
        # Megatron 0.18 asks whether CP is hybrid; it is not (UNREAD_ARGUMENTS).
        hybrid = [False] if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters else []
        batch = get_batch_on_this_cp_rank(batch, *hybrid, cp_group=cp_group)
    return model(input_ids=batch.pop("tokens"), **batch), partial(sum_loss, batch["loss_mask"])


if __name__ == "__main__":  # guarded: Megatron's checkpoint writer imports this file in a process of its own
    parts = {"model_provider": provide_model, "model_type": ModelType.encoder_or_decoder}
    parts.update(train_valid_test_dataset_provider=provide_datasets, forward_step_func=forward_step)
    if "cfg_container" in inspect.signature(training.pretrain).parameters:  # 0.18 on
        configs = import_module("megatron.training.argument_utils")
        parts["cfg_container"] = configs.pretrain_cfg_container_from_args(arguments.parse_and_validate_args())
    dataset_utils.compile_helpers = compile_if_missing(dataset_utils.compile_helpers)  # also without the launcher
    training.pretrain(**parts)
