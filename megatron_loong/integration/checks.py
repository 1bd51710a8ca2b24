"""What is refused, and how it is said: before the first collective, from numbers that every rank has alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_loong.config import LoongConfig, divisors
from megatron_loong.integration.low_precision import refuse_low_precision
from megatron_loong.integration.memory_options import check_recompute, check_tiled
from megatron_loong.integration.options import LoongOptions
from megatron_loong.integration.refusals import MESSAGES, refuse_first


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


def refuse(holder: object) -> None:
    """Raise for the first feature of `REFUSALS["loong"]` that `holder` (args or a config) asks for, and for unfit fp8.

    `NotImplementedError`, but `ValueError` for attention in fp8 that nothing would look at.
    """
    refuse_low_precision(holder)
    refuse_first("loong", holder)


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
    if attention_bias is not None:
        raise NotImplementedError(MESSAGES["loong"].format("an attention bias", "rotary or no position embedding"))
    if given:
        instead = "dot-product attention or multi-latent attention"
        raise NotImplementedError(MESSAGES["loong"].format(f"core attention with {', '.join(given)}", instead))


def refuse_beside_reset(args: Any) -> None:
    """Raise for what `--reset-attention-mask` does not work with: the documents have to be in every stage's batch."""
    if not getattr(args, "reset_attention_mask", False):
        return
    refuse_first("reset", args)
    has_mask = getattr(args, "create_attention_mask_in_dataloader", True)
    if not has_mask and not getattr(args, "reset_position_ids", False):
        raise ValueError(
            "--reset-attention-mask with --no-create-attention-mask-in-dataloader leaves no trace of the documents; "
            "add --reset-position-ids, from which they are read, or leave --no-create-attention-mask-in-dataloader out"
        )


def refuse_beside_hybrid(options: LoongOptions, holder: Any) -> None:
    """Raise `NotImplementedError` for what does not work where micro-batches bring ranks of their own.

    `holder`: Megatron's args or a TransformerConfig; nothing is checked unless it asks for `hybrid_context_parallel`.
    """
    if getattr(holder, "hybrid_context_parallel", False):
        refuse_first("hybrid", holder, loong_placement=options.loong_placement)


def refuse_beside_contiguous(options: LoongOptions, holder: Any) -> None:
    """Raise `NotImplementedError` for what `--loong-sequence-layout contiguous` does not work with.

    `holder`: Megatron's args or a TransformerConfig.
    """
    if options.loong_sequence_layout == "contiguous":
        refuse_first("contiguous", holder)


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
        refuse_first("packs", args, pack_layout=options.loong_pack_layout)


def check_kernel_name(name: str) -> None:
    """Raise `ValueError` when no kernel is called `name`; whether it can serve is known at the first attention."""
    from megatron_loong.kernels.registry import CHOICES, KERNELS

    if name not in (*CHOICES, *KERNELS):
        raise ValueError(f"--loong-kernel {name} is unknown; use {', '.join(CHOICES)} or one of {', '.join(KERNELS)}")
