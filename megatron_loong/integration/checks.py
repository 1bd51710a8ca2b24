"""What is refused, and how it is said: before the first collective, from numbers that every rank has alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megatron_loong.config import LoongConfig, divisors
from megatron_loong.integration.low_precision import refuse_low_precision
from megatron_loong.integration.memory_options import check_recompute, check_tiled
from megatron_loong.integration.options import LoongOptions


def check_options(
    options: LoongOptions,
    *,
    cp: int,
    tp: int = 1,
    num_attention_heads: int | None = None,
    cp_comm_type: str | Sequence[str | None] | None = None,
    hierarchical_context_parallel_sizes: Sequence[int] | None = None,
    hybrid: bool = False,
) -> None:
    """Raise `ValueError` when the options contradict each other or Megatron's own flags; None is "not known yet".

    `hybrid`: micro-batches bring ranks of their own out of DP x CP, whose number `check_parts` is told once it is
    known. Does nothing for `native`.
    """
    if not options.loong:
        return
    if cp == 1 and not hybrid:
        raise ValueError(
            "--context-parallel-impl loong needs --context-parallel-size above 1, which is 1: "
            "set it, or leave --context-parallel-impl at native"
        )
    types = [cp_comm_type] if cp_comm_type is None or isinstance(cp_comm_type, str) else list(cp_comm_type)
    contradicting = [kind for kind in types if kind not in (None, "p2p")]
    if contradicting:
        raise ValueError(
            f"--cp-comm-type {' '.join(map(str, types))} chooses a form of native context parallelism and contradicts "
            "--context-parallel-impl loong; remove it (--loong-head-parallel-size takes the place of a2a)"
        )
    if hierarchical_context_parallel_sizes:
        raise ValueError(
            f"--hierarchical-context-parallel-sizes {' '.join(map(str, hierarchical_context_parallel_sizes))} belongs "
            "to native context parallelism and contradicts --context-parallel-impl loong; remove it, and use "
            "--loong-head-parallel-size and --loong-inner-ring-size"
        )
    if not hybrid:
        _check_sizes(options, cp, f"--context-parallel-size {cp}")
    if num_attention_heads is not None:
        check_heads(options.loong_head_parallel_size, cp=cp, tp=tp, num_attention_heads=num_attention_heads)


def check_heads(head_parallel_size: int | str, *, cp: int, tp: int, num_attention_heads: int) -> None:
    """Raise `ValueError` when one TP rank has fewer query heads than `head_parallel_size`."""
    heads, rest = divmod(num_attention_heads, tp)
    if rest:
        raise ValueError(
            f"--num-attention-heads {num_attention_heads} is not a multiple of --tensor-model-parallel-size {tp}"
        )
    if isinstance(head_parallel_size, int) and heads < head_parallel_size:
        raise ValueError(
            f"--loong-head-parallel-size {head_parallel_size} is more than the {heads} query heads of one "
            f"tensor-parallel rank (--num-attention-heads {num_attention_heads} / --tensor-model-parallel-size {tp}); "
            f"with --context-parallel-size {cp} these work: {[n for n in divisors(cp) if n <= heads]}"
        )


def check_parts(options: LoongOptions, dp_cp: int) -> None:
    """Raise `ValueError` where the sizes asked for do not fit all ranks of DP x CP, which long micro-batches share."""
    _check_sizes(options, dp_cp, f"--hybrid-context-parallel over data x context parallel = {dp_cp} ranks")


def _check_sizes(options: LoongOptions, cp: int, ranks: str) -> None:
    hp, inner = options.loong_head_parallel_size, options.loong_inner_ring_size
    flags = f"({ranks}, --loong-head-parallel-size {hp}, --loong-inner-ring-size {inner})"
    if isinstance(hp, str):
        # With hp still open, an inner ring only has to divide some ring: one whose size divides cp.
        if isinstance(inner, int) and cp % inner:
            raise ValueError(
                f"inner_ring_size={inner} does not divide any ring of {cp} ranks; try one of {divisors(cp)} {flags}"
            )
        return
    try:
        placement = "head_first" if options.loong_placement == "auto" else options.loong_placement
        LoongConfig(cp, hp, inner if isinstance(inner, int) else None, placement)
    except ValueError as error:
        raise ValueError(f"{error} {flags}") from None


class Refusal(NamedTuple):
    """One feature that does not work yet: an attribute of TransformerConfig or of Megatron's args."""

    attribute: str
    refused: Callable[[Any], bool]
    flag: str
    instead: str


def _is_set(value: Any) -> bool:
    return bool(value)


_GATED_DELTA_NET = ("gated_delta_net", "gdn")  # the second after 0.19

#: Looked up on the args before anything starts, and on each layer's TransformerConfig. An attribute that the version
#: at hand lacks is not set.
REFUSALS = (
    Refusal(
        "dynamic_context_parallel",
        _is_set,
        "--dynamic-context-parallel",
        "--hybrid-context-parallel, or one context-parallel size for all batches",
    ),
    Refusal("batch_invariant_mode", _is_set, "--batch-invariant-mode", "training without it"),
    Refusal(
        "experimental_attention_variant",
        lambda v: v not in (None, *_GATED_DELTA_NET),
        "--experimental-attention-variant {value}",
        "dot-product attention or multi-latent attention",
    ),
    Refusal("cache_mla_latents", _is_set, "--cache-mla-latents (absorbed MLA)", "multi-latent attention without it"),
    # After 0.19 Megatron converts between the layouts of layers; with zigzag for all, nothing. A batch for two layouts
    # is cut where no hook of ours looks.
    *(
        Refusal(name, lambda v: v not in (None, "zigzag"), f"{name}={{value}}", f"zigzag{also}")
        for name, also in (
            ("attention_cp_layout", ", and --loong-sequence-layout contiguous for data that cannot be permuted"),
            ("linear_cp_layout", ""),
            ("cp_partition_mode", ", and --loong-sequence-layout contiguous for data that cannot be permuted"),
        )
    ),
    Refusal("linear_cp_mode", lambda v: v not in (None, "headwise"), "linear_cp_mode={value}", "headwise"),
)


def refuse(holder: object) -> None:
    """Raise for the first feature of `REFUSALS` that `holder` (args or a config) asks for, and for unfit fp8.

    `NotImplementedError`, but `ValueError` for attention in fp8 that nothing would look at.
    """
    refuse_low_precision(holder)
    for refusal in REFUSALS:
        value = getattr(holder, refusal.attribute, None)
        if refusal.refused(value):
            raise NotImplementedError(
                f"{refusal.flag.format(value=value)} does not work with --context-parallel-impl loong yet; "
                f"supported: {refusal.instead} (or --context-parallel-impl native)"
            )


def refuse_construction(config: Any, attention_type: str, unknown: dict[str, Any]) -> None:
    """Raise for what a core attention is built with and does not have: `refuse`, and arguments."""
    refuse(config)
    supported = "supported: self- and cross-attention with Megatron's own arguments (or --context-parallel-impl native)"
    if attention_type not in ("self", "cross"):
        raise NotImplementedError(
            f"attention_type={attention_type!r} does not work with --context-parallel-impl loong yet; {supported}"
        )
    given = sorted(name for name, value in unknown.items() if value is not None)
    if given:
        raise NotImplementedError(f"LoongCoreAttention does not know {', '.join(given)} yet; {supported}")


def refuse_inputs(attention_bias: object, unknown: dict[str, Any]) -> None:
    """Raise `NotImplementedError` for what a core attention is called with and does not have."""
    given = sorted(name for name, value in unknown.items() if value is not None)
    reason = None
    if attention_bias is not None:
        reason, instead = "an attention bias", "rotary or no position embedding"
    elif given:
        reason, instead = f"core attention with {', '.join(given)}", "dot-product attention or multi-latent attention"
    if reason:
        raise NotImplementedError(
            f"{reason} does not work with --context-parallel-impl loong yet; "
            f"supported: {instead} (or --context-parallel-impl native)"
        )


def refuse_beside_reset(args: Any) -> None:
    """Raise for what `--reset-attention-mask` does not work with: the documents have to be in every stage's batch."""
    if not getattr(args, "reset_attention_mask", False):
        return
    if getattr(args, "pipeline_model_parallel_size", 1) > 1 or getattr(args, "hybrid_context_parallel", False):
        raise NotImplementedError(
            "--reset-attention-mask does not work with --pipeline-model-parallel-size above 1 or "
            "--hybrid-context-parallel, and --context-parallel-impl loong; supported: "
            "--dataloader-inter-document-masking (megatron-core 0.19 on)"
        )
    if getattr(args, "mtp_num_layers", None):
        # On one rank it predicts across documents, of which it sees no mask; here it would stop at their ends.
        raise NotImplementedError(
            "--reset-attention-mask does not work with --mtp-num-layers and --context-parallel-impl loong; supported: "
            "--dataloader-inter-document-masking (megatron-core 0.19 on)"
        )
    has_mask = getattr(args, "create_attention_mask_in_dataloader", True)
    if not has_mask and not getattr(args, "reset_position_ids", False):
        raise ValueError(
            "--reset-attention-mask with --no-create-attention-mask-in-dataloader leaves no trace of the documents; "
            "add --reset-position-ids, from which they are read, or leave --no-create-attention-mask-in-dataloader out"
        )


def refuse_beside_packs(holder: Any, pack_layout: str) -> None:
    """Raise `NotImplementedError` for what beside attention would misread our layout of a pack.

    `holder`: a TransformerConfig or Megatron's args; None is not checked.
    """
    reason = None
    variant = getattr(holder, "experimental_attention_variant", None)
    if variant in _GATED_DELTA_NET and pack_layout != "per_document":
        # Its layers compute TransformerEngine's per-document zigzag themselves.
        reason, instead = f"--experimental-attention-variant {variant}", "--loong-pack-layout per_document"
    elif getattr(holder, "mtp_hsm", False):
        # It rolls hidden states, of which our roll for packs passes no gradient on.
        reason, instead = "--mtp-hsm", "multi-token prediction without it"
    elif getattr(holder, "multi_latent_attention", False) and getattr(holder, "apply_rope_fusion", False):
        reason, instead = "fused rotary embedding in multi-latent attention", "--no-rope-fusion"
    if reason:
        raise NotImplementedError(
            f"{reason} does not work with packed sequences and --context-parallel-impl loong; supported: {instead} "
            "(or --context-parallel-impl native)"
        )


#: Beside micro-batches that bring ranks of their own: what in Megatron still talks to the static group, and why.
_BESIDE_HYBRID = (
    ("multi_latent_attention", "--multi-latent-attention (Megatron itself refuses it there)"),
    ("mtp_num_layers", "--mtp-num-layers (it shifts tokens over the static group)"),
    ("num_experts", "--num-experts (its ranks would wait for each other's micro-batches)"),
    ("num_moe_experts", "num_moe_experts (its ranks would wait for each other's micro-batches)"),
    ("hybrid_layer_pattern", "--hybrid-layer-pattern (Mamba layers use the static group)"),
    ("hybrid_override_pattern", "--hybrid-override-pattern (Mamba layers use the static group)"),
    ("experimental_attention_variant", "--experimental-attention-variant"),
    ("fp8", "--fp8-format (sequences on one rank have any length, and its products want multiples of 16 tokens)"),
    ("fp4", "--fp4-format (sequences on one rank have any length, and its products want multiples of 32 tokens)"),
)


def refuse_beside_hybrid(options: LoongOptions, holder: Any) -> None:
    """Raise `NotImplementedError` for what does not work where micro-batches bring ranks of their own.

    `holder`: Megatron's args or a TransformerConfig; nothing is checked unless it asks for `hybrid_context_parallel`.
    """
    if not getattr(holder, "hybrid_context_parallel", False):
        return
    reason = instead = None
    if options.loong_placement not in ("head_first", "head-inner-outer"):
        reason = f"--loong-placement {options.loong_placement} (it moves the ranks of a short sequence apart)"
        instead = "--loong-placement head_first"
    for attribute, why in _BESIDE_HYBRID:
        if getattr(holder, attribute, None):
            reason, instead = why, "dense models in bf16 whose layers are dot-product attention"
    if getattr(holder, "eval_iters", 0):
        reason = f"--eval-iters {holder.eval_iters} (Megatron schedules no batches of an evaluation)"
        instead = "--eval-iters 0"
    if reason:
        raise NotImplementedError(
            f"--hybrid-context-parallel does not work with {reason} and --context-parallel-impl loong; "
            f"supported: {instead}"
        )


#: Beside sequences in contiguous pieces: what in Megatron takes zigzag for granted where no hook reaches.
_BESIDE_CONTIGUOUS = (
    ("hybrid_context_parallel", bool, "--hybrid-context-parallel (a document alone is cut as a pack)"),
    ("mtp_hsm", bool, "--mtp-hsm (it rolls hidden states, of which our roll passes no gradient on)"),
    (
        "experimental_attention_variant",
        lambda v: v in _GATED_DELTA_NET,
        "--experimental-attention-variant {value} (its layers undo Megatron's zigzag)",
    ),
)


def refuse_beside_contiguous(options: LoongOptions, holder: Any) -> None:
    """Raise `NotImplementedError` for what `--loong-sequence-layout contiguous` does not work with.

    `holder`: Megatron's args or a TransformerConfig.
    """
    for attribute, is_on, what in _BESIDE_CONTIGUOUS if options.loong_sequence_layout == "contiguous" else ():
        if is_on(value := getattr(holder, attribute, None)):
            raise NotImplementedError(
                f"--loong-sequence-layout contiguous does not work with {what.format(value=value)}; supported: "
                "--loong-sequence-layout zigzag there"
            )


def check_args(options: LoongOptions, args: object, *, final: bool) -> None:
    """Both checks on Megatron's arguments; unless `final`, what a checkpoint may still replace is left open."""
    check_recompute(options, args)
    check_tiled(options, args)
    if not options.loong:
        return
    open_yet = not final and bool(getattr(args, "use_checkpoint_args", False))
    check_options(
        options,
        cp=getattr(args, "context_parallel_size", 1),
        tp=getattr(args, "tensor_model_parallel_size", 1),
        num_attention_heads=None if open_yet else getattr(args, "num_attention_heads", None),
        cp_comm_type=getattr(args, "cp_comm_type", None),
        hierarchical_context_parallel_sizes=getattr(args, "hierarchical_context_parallel_sizes", None),
        hybrid=bool(getattr(args, "hybrid_context_parallel", False)),
    )
    refuse_beside_hybrid(options, args)
    refuse_beside_contiguous(options, args)
    refuse_beside_reset(args)
    check_kernel_name(options.loong_kernel)
    refuse(args)
    # Before Megatron has validated its arguments, it is open whether the rotary embedding will be fused.
    packs = ("sft", "dataloader_inter_document_masking", "reset_attention_mask")
    if final and any(getattr(args, name, False) for name in packs):
        refuse_beside_packs(args, options.loong_pack_layout)


def check_kernel_name(name: str) -> None:
    """Raise `ValueError` when no kernel is called `name`; whether it can serve is known at the first attention."""
    from megatron_loong.kernels.registry import CHOICES, KERNELS

    if name not in (*CHOICES, *KERNELS):
        raise ValueError(f"--loong-kernel {name} is unknown; use {', '.join(CHOICES)} or one of {', '.join(KERNELS)}")
