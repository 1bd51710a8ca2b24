"""fp8 and fp4 training (`--fp8-format`, `--fp4-format`): TransformerEngine's linear layers in few bits, the rest as it is.

Megatron enters TransformerEngine's autocast around layers. Attention here is no TransformerEngine module and does not
notice: it gets bfloat16 from the projections and gives bfloat16 back, unless `fp8_dot_product_attention` asks for fp8.

| | under fp8 or fp4 |
|---|---|
| attention | bfloat16; with `fp8_dot_product_attention` the kernel `auto-fp8` (`kernels.fp8`), but not in layers that `first_last_layers_bf16` leaves in bfloat16 |
| full recomputation | TransformerEngine's checkpoint, which is hooked as Megatron's is (`integration.recompute`) |
| tokens of a rank | a multiple of 16 or 32, which the matrix products want: batches are padded to it (`integration.lengths`) |
| tiled loss | the head is not TransformerEngine's; refused with `fp8_output_proj`, where it is |
| tiled MLP, `--loong-mla-latent` | refused: they run, or read, TransformerEngine's layers outside of its autocast |
"""  # noqa: E501

from __future__ import annotations

import math
from typing import Any

import megatron_loong.integration.compat as compat


def asked(holder: object) -> str | None:
    """The flag of `holder` (Megatron's args or a TransformerConfig) that asks for fp8 or fp4, with its value."""
    for attribute, flag in (("fp8", "--fp8-format"), ("fp4", "--fp4-format")):
        if getattr(holder, attribute, None):
            return f"{flag} {getattr(holder, attribute)}"
    return None


def refuse_low_precision(holder: object) -> None:
    """Raise for fp8 that would not be in effect or that 2D-Attention lacks: `NotImplementedError`, or `ValueError`."""
    flag = asked(holder)
    if getattr(holder, "fp8_multi_head_attention", False):
        raise NotImplementedError(
            "fp8_multi_head_attention does not work with --context-parallel-impl loong yet: q, k, v and the output "
            "would be TransformerEngine's fp8 tensors, which cannot be sent and merged here; supported: "
            "fp8_dot_product_attention, which rounds inside attention (or --context-parallel-impl native)"
        )
    if flag is None:
        if getattr(holder, "fp8_dot_product_attention", False):
            raise ValueError(
                "fp8_dot_product_attention without --fp8-format or --fp4-format is nothing that Megatron looks at; add "
                "one of them, or use --loong-kernel auto-fp8"
            )
        return
    local = getattr(holder, "transformer_impl", None) == "local"
    if local or not compat.has_transformer_engine():
        missing = "--transformer-impl is local" if local else "transformer_engine is not installed"
        raise NotImplementedError(
            f"{flag} is for TransformerEngine's layers, and {missing}: Megatron would train without it and not say so; "
            "supported: transformer_engine and its layers, or --bf16 without that flag"
        )


def rows_multiple(holder: object) -> int:
    """What the tokens of a micro-batch on one rank must be a multiple of, per sequence; 1 without fp8 and fp4.

    TransformerEngine's products want 16 rows in fp8 and 32 in MXFP8 (Megatron's `get_fp8_align_size`; "Caller must pad"
    in TransformerEngine's `cublaslt_gemm.cu`), 32 in NVFP4. The sequences of a micro-batch count together.

    >>> from types import SimpleNamespace as Args
    >>> rows_multiple(Args(fp8="hybrid", fp8_recipe="delayed", micro_batch_size=2)), rows_multiple(Args(fp8=None))
    (8, 1)
    """
    if asked(holder) is None:
        return 1
    recipe = getattr(holder, "fp8_recipe", None)
    of_blocks = not getattr(holder, "fp8", None) or getattr(recipe, "value", recipe) == "mxfp8"
    rows = 32 if of_blocks else 16
    return rows // math.gcd(rows, getattr(holder, "micro_batch_size", None) or 1)


def kernel_of_layer(kernel: str, config: Any, layer_number: int) -> str:
    """`--loong-kernel` for a layer (from 1): `auto` is `auto-fp8` where the config asks for attention in fp8.

    Raises `ValueError` when a kernel is named that has no forward in fp8.
    """
    from megatron_loong.kernels.registry import AUTO, AUTO_FP8, KERNELS, in_fp8

    if asked(config) is None or not getattr(config, "fp8_dot_product_attention", False) or in_fp8(kernel):
        return kernel
    if _left_in_bf16(config, layer_number - 1):
        return kernel
    if kernel != AUTO:
        raise ValueError(
            f"fp8_dot_product_attention asks for attention in fp8, which --loong-kernel {kernel} does not do; use "
            f"{AUTO}, {', '.join(filter(in_fp8, KERNELS))}, or leave fp8_dot_product_attention out"
        )
    return AUTO_FP8


def _left_in_bf16(config: Any, index: int) -> bool:
    """As Megatron's `is_first_last_bf16_layer`; `index` counts the model's layers from 0."""
    if not getattr(config, "first_last_layers_bf16", False):
        return False
    from_end = config.num_layers - config.num_layers_at_end_in_bf16
    return index < config.num_layers_at_start_in_bf16 or index >= from_end
