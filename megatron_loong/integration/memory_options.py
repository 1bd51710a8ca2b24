"""The flags that trade time or messages for memory: what they mean and what they need. Free of torch and Megatron."""

from __future__ import annotations

import re
from typing import Any


def layers_of(text: str, flag: str) -> range | frozenset[int]:
    """The layers that a choice names, counted from 1 as Megatron does; `ValueError` names the flag.

    >>> sorted(layers_of("1-3,7", "--flag"))
    [1, 2, 3, 7]
    >>> 10_000 in layers_of("all", "--flag"), 1 in layers_of("off", "--flag")
    (True, False)
    """
    if text == "all":
        return range(1, 1 << 30)
    if text == "off":
        return range(0)
    chosen: set[int] = set()
    for part in str(text).split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(f"{flag} {text!r} must be all, off, or layers counted from 1 such as 1-4,9")
        chosen.update(range(first, last + 1))
    return frozenset(chosen)


def check_values(options: Any) -> None:
    """Raise `ValueError` for a value that can never work; called when `LoongOptions` is made."""
    for field in ("loong_tiled_loss", "loong_tiled_mlp"):
        value = getattr(options, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"--{field.replace('_', '-')} {value!r} must be a whole number; 0 is off")
    for field in ("loong_zero_param_size", "loong_zero_grad_size", "loong_zero_optimizer_size"):
        value = getattr(options, field)
        if value != "all" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"--{field.replace('_', '-')} {value!r} must be a whole number of at least 1, or all")
    layers_of(options.loong_selective_checkpoint, "--loong-selective-checkpoint")
    layers_of(options.loong_keep_exchange, "--loong-keep-exchange")
    selective = options.loong_selective_checkpoint != "off"
    for field in ("loong_keep_exchange", "loong_offload_attention"):
        if getattr(options, field) not in ("off", False) and not selective:
            raise ValueError(
                f"--{field.replace('_', '-')} says how --loong-selective-checkpoint keeps attention's results, which "
                "is not asked for; add --loong-selective-checkpoint"
            )
    if selective and options.context_parallel_impl != "loong":
        raise ValueError(
            "--loong-selective-checkpoint keeps what 2D-Attention computed and needs --context-parallel-impl loong, "
            f"which is {options.context_parallel_impl}"
        )


def check_recompute(options: Any, holder: object) -> None:
    """Raise `ValueError` unless `holder` (Megatron's args or a TransformerConfig) recomputes as the options need."""
    wants = [
        flag
        for flag, is_set in (
            ("--loong-selective-checkpoint", options.loong_selective_checkpoint != "off"),
            ("--loong-offload-activations", options.loong_offload_activations),
        )
        if is_set
    ]
    granularity = getattr(holder, "recompute_granularity", None)
    if wants and granularity != "full":
        raise ValueError(
            f"{wants[0]} works on whole layers that are recomputed and needs --recompute-granularity full "
            f"--recompute-method uniform --recompute-num-layers 1 (or block); --recompute-granularity is {granularity}"
        )
    num_layers = getattr(holder, "num_layers", None)
    for field in ("loong_selective_checkpoint", "loong_keep_exchange"):
        flag = "--" + field.replace("_", "-")
        chosen = layers_of(getattr(options, field), flag)
        if isinstance(chosen, frozenset) and num_layers and max(chosen) > num_layers:
            raise ValueError(f"{flag} names layer {max(chosen)}, but --num-layers is {num_layers}")
    if options.loong_offload_activations and getattr(holder, "distribute_saved_activations", False):
        raise ValueError(
            "--loong-offload-activations and --distribute-saved-activations both move the checkpointed inputs away; "
            "use one of them"
        )
    if options.loong_offload_activations and getattr(holder, "cpu_offloading", False):
        raise ValueError("--loong-offload-activations and --cpu-offloading both move activations away; use one of them")


def check_tiled(options: Any, holder: object) -> None:
    """Raise `NotImplementedError` for what the tiled loss or the tiled MLP does not work with."""
    _check_tiled_mlp(options, holder)
    if options.loong_tiled_loss and getattr(holder, "fp8_output_proj", False):
        raise NotImplementedError(
            "--loong-tiled-loss does not work with --fp8-output-proj: the head is TransformerEngine's then, and its "
            "product in MXFP8, of which a tile would have other numbers; supported: one of the two without the other"
        )


def _check_tiled_mlp(options: Any, holder: object) -> None:
    """Raise where `MLP.forward` is not what runs, or does more than a function of its rows."""
    if not options.loong_tiled_mlp:
        return
    reasons = {
        "num_experts": "--num-experts (each expert sees few tokens already)",
        "num_moe_experts": "mixture of experts (each expert sees few tokens already)",
        "use_transformer_engine_op_fuser": "--use-transformer-engine-op-fuser",
        # The second run comes from within backward, where TransformerEngine's autocast is off.
        "fp8": "--fp8-format (a tile would be run again without fp8)",
        "fp4": "--fp4-format (a tile would be run again without fp4)",
        "add_bias_linear": "biases of linear layers",
    }
    for attribute, reason in reasons.items():
        if getattr(holder, attribute, None):
            raise NotImplementedError(
                f"--loong-tiled-mlp does not work with {reason} yet; supported: dense MLPs in bf16, fp16 or fp32 with "
                "--disable-bias-linear"
            )
