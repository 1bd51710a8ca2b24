"""What context parallelism would get wrong in silence, refused by name."""

from __future__ import annotations

import inspect
from typing import Any

import torch

import megatron_loong.hf.compat as compat


def check_model(model: Any, base: Any) -> None:
    """`NotImplementedError` for a model that would go wrong on parts of a sequence; `model` may be PEFT's of `base`."""
    config = base.config
    text = config.get_text_config()
    reason = None
    learning = [n for n, c in getattr(model, "peft_config", {}).items() if getattr(c, "is_prompt_learning", False)]
    if learning:
        reason = f"prompt learning ({', '.join(learning)}), which puts virtual tokens before every part; use LoRA"
    elif not type(base).__name__.endswith("ForCausalLM"):
        reason = f"{type(base).__name__}; supported: causal language models (...ForCausalLM)"
    elif text is not config:
        reason = f"{type(base).__name__}, which has more inputs than text; load the model of text alone"
    elif getattr(config, "is_encoder_decoder", False):
        reason = f"{type(base).__name__}, an encoder and a decoder; supported: decoders"
    elif not compat.attention_by_name(base):
        reason = f"{type(base).__name__} of this transformers, whose attention cannot be replaced; upgrade transformers"
    elif getattr(text, "attn_temperature_tuning", False) and any(not x for x in getattr(text, "no_rope_layers", ())):
        reason = "attn_temperature_tuning, which counts positions from 0 on every rank; set it to False"
    elif (getattr(text, "attention_dropout", 0.0) or 0.0) > 0:
        reason = f"attention_dropout={text.attention_dropout}; set it to 0"
    elif getattr(text, "output_router_logits", False):
        reason = "output_router_logits=True, a balancing loss of each rank's own tokens; set it to False"
    elif any(kind not in _LAYERS for kind in getattr(text, "layer_types", None) or ()):
        kinds = sorted(set(text.layer_types) - set(_LAYERS))
        reason = f"layers of {', '.join(kinds)}; supported: {' and '.join(_LAYERS)}"
    elif any(isinstance(module, torch.nn.Conv1d) for module in base.modules()):
        reason = f"{type(base).__name__}, whose layers mix tokens outside attention (Conv1d)"
    elif not _takes_positions_and_loss(base):
        reason = f"{type(base).__name__}, which counts positions or computes its loss by itself"
    elif any(hasattr(module, "create_position_ids_from_input_ids") for module in base.modules()):
        reason = f"{type(base).__name__}, whose positions begin after its padding token"
    elif not compat.MASKS_ARE_ASKED_FOR and model is not base:
        reason = "PEFT on transformers up to 4.52; upgrade transformers"
    if reason:
        raise NotImplementedError(f"megatron_loong.hf does not work with {reason}")


def _takes_positions_and_loss(base: Any) -> bool:
    """Whether the model uses the positions that it is given, and the loss function that can be replaced."""
    takes = "position_ids" in inspect.signature(type(base).forward).parameters
    return takes and "self.loss_function" in inspect.getsource(type(base))


#: Kinds of layers whose tokens meet in attention alone.
_LAYERS = ("full_attention", "sliding_attention")


#: Trainer classes of libraries whose loss is a sum over tokens, each of which needs its own logits alone.
_TRAINERS = ("Trainer", "SFTTrainer", "_BaseTrainer", "BaseTrainer", "TrainerCallback", "object")


def check_trainer_class(trainer_class: type) -> None:
    """`NotImplementedError` for a Trainer of transformers or TRL that cuts or compares whole sequences."""
    for one in trainer_class.__mro__:
        library = one.__module__.split(".")[0]
        if library in ("transformers", "trl") and one.__name__ not in _TRAINERS:
            raise NotImplementedError(
                f"with_loong does not work with {one.__name__}, which handles whole sequences itself; supported: "
                "transformers' Trainer, TRL's SFTTrainer, and subclasses that leave the loss to the model"
            )
        own = vars(one).get("compute_loss") if library not in ("transformers", "trl") else None
        if own is not None and "super" not in getattr(getattr(own, "__code__", None), "co_names", ()):
            raise NotImplementedError(
                f"with_loong does not work with {one.__name__}.compute_loss, which would see the logits of this rank's "
                "tokens alone, and labels that are shifted already; leave the loss to the model"
            )


def check_arguments(trainer: Any) -> None:
    """`NotImplementedError` for what a Trainer was asked for and could not do on parts of sequences."""
    args, accelerator = trainer.args, trainer.accelerator
    parallelism = getattr(accelerator, "parallelism_config", None)
    sizes = {n: getattr(parallelism, n, 1) for n in ("cp_size", "sp_size", "tp_size")} if parallelism else {}
    others = [f"{name}={size}" for name, size in sizes.items() if (size or 1) > 1]
    reason = None
    if getattr(args, "label_smoothing_factor", 0):
        reason = f"label_smoothing_factor={args.label_smoothing_factor}; set it to 0"
    elif getattr(trainer, "compute_loss_func", None) is not None:
        reason = (
            "compute_loss_func, which would see the logits of this rank's tokens alone; leave the loss to the model"
        )
    elif trainer.compute_metrics is not None or trainer.preprocess_logits_for_metrics is not None:
        reason = "compute_metrics and preprocess_logits_for_metrics: no rank has all logits; evaluate gives the loss"
    elif accelerator.split_batches or accelerator.dispatch_batches:
        reason = "split_batches and dispatch_batches, which share batches out to ranks; leave them out"
    elif others:
        reason = f"{', '.join(others)} of a ParallelismConfig; leave it out, loong=LoongConfig(...) says it"
    elif args.n_gpu > 1:
        reason = f"{args.n_gpu} GPUs in one process; start with torchrun or accelerate launch"
    elif getattr(args, "neftune_noise_alpha", None):
        reason = "neftune_noise_alpha, whose noise depends on the length of a rank's part; leave it out"
    elif getattr(args, "use_liger_kernel", False):
        reason = "use_liger_kernel; use tiled_loss and tiled_mlp instead"
    elif getattr(trainer, "aux_loss_enabled", False):
        reason = "a router's balancing loss of each rank's own tokens; set router_aux_loss_coef=0.0"
    elif getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        reason = "train_sampling_strategy='batch_rebalance', which shares samples out to ranks; use another"
    if reason:
        raise NotImplementedError(f"with_loong does not work with {reason}")
