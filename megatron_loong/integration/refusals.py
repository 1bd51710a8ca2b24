"""What does not work yet, in one table. docs/status.md names every row's feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Asked:
    """What is asked for by name, in args or a TransformerConfig or `more`; None where this Megatron lacks the name."""

    def __init__(self, holder: object, **more: Any) -> None:
        self._holder, self._more = holder, more

    def __getitem__(self, name: str) -> Any:
        return self._more[name] if name in self._more else getattr(self._holder, name, None)


#: A feature, what to use instead, when it is refused (when a function says so, or where an attribute is set), and why.
Refusal = tuple[str, str, str | Callable[[Asked], Any], str]

_NATIVE = "(or --context-parallel-impl native)"
#: What a feature does not work beside -> the message.
MESSAGES = {
    "loong": "{} does not work with --context-parallel-impl loong yet; supported: {} " + _NATIVE,
    "packs": "{} does not work with packed sequences and --context-parallel-impl loong; supported: {} " + _NATIVE,
    "reset": "--reset-attention-mask does not work with {} and --context-parallel-impl loong; supported: {}",
    "hybrid": "--hybrid-context-parallel does not work with {} and --context-parallel-impl loong; supported: {}",
    "contiguous": "--loong-sequence-layout contiguous does not work with {}; supported: {}",
}

_GATED_DELTA_NET = ("gated_delta_net", "gdn")  # the second after 0.19
_KIND = "experimental_attention_variant"
_VARIANT = f"--experimental-attention-variant {{{_KIND}}}"
_PERMUTED = "zigzag, and --loong-sequence-layout contiguous for data that cannot be permuted"
_MASKING = "--dataloader-inter-document-masking (megatron-core 0.19 on)"
_DENSE = "dense models in bf16 whose layers are dot-product attention"
_ZIGZAG = "--loong-sequence-layout zigzag there"
_EXPERTS = "its ranks would wait for each other's micro-batches"
_MAMBA = "Mamba layers use the static group"
_ROWS = "sequences on one rank have any length, and its products want multiples of"


def _gated_delta_net(asked: Asked) -> bool:
    return asked[_KIND] in _GATED_DELTA_NET


def _not(name: str, *good: str) -> Callable[[Asked], bool]:
    return lambda asked: asked[name] not in (None, *good)


#: In each group the first that is asked for is named.
REFUSALS: dict[str, tuple[Refusal, ...]] = {
    "loong": (
        (
            "--dynamic-context-parallel",
            "--hybrid-context-parallel, or one context-parallel size for all batches",
            "dynamic_context_parallel",
            "",
        ),
        ("--batch-invariant-mode", "training without it", "batch_invariant_mode", ""),
        (_VARIANT, "dot-product attention or multi-latent attention", _not(_KIND, *_GATED_DELTA_NET), ""),
        ("--cache-mla-latents", "multi-latent attention without it", "cache_mla_latents", "absorbed MLA"),
        # After 0.19 Megatron converts between the layouts of layers; with zigzag for all, nothing. A batch for two
        # layouts is cut where no hook of ours looks.
        ("attention_cp_layout={attention_cp_layout}", _PERMUTED, _not("attention_cp_layout", "zigzag"), ""),
        ("linear_cp_layout={linear_cp_layout}", "zigzag", _not("linear_cp_layout", "zigzag"), ""),
        ("cp_partition_mode={cp_partition_mode}", _PERMUTED, _not("cp_partition_mode", "zigzag"), ""),
        ("linear_cp_mode={linear_cp_mode}", "headwise", _not("linear_cp_mode", "headwise"), ""),
    ),
    "packs": (
        # Its layers compute TransformerEngine's per-document zigzag themselves.
        (
            _VARIANT,
            "--loong-pack-layout per_document",
            lambda a: _gated_delta_net(a) and a["pack_layout"] != "per_document",
            "",
        ),
        # It rolls hidden states, of which our roll for packs passes no gradient on.
        ("--mtp-hsm", "multi-token prediction without it", "mtp_hsm", ""),
        (
            "fused rotary embedding in multi-latent attention",
            "--no-rope-fusion",
            lambda asked: asked["multi_latent_attention"] and asked["apply_rope_fusion"],
            "",
        ),
    ),
    # The documents have to be in every stage's batch.
    "reset": (
        (
            "--pipeline-model-parallel-size above 1 or --hybrid-context-parallel,",
            _MASKING,
            lambda asked: (asked["pipeline_model_parallel_size"] or 1) > 1 or asked["hybrid_context_parallel"],
            "",
        ),
        # On one rank it predicts across documents, of which it sees no mask; here it would stop at their ends.
        ("--mtp-num-layers", _MASKING, "mtp_num_layers", ""),
    ),
    # Micro-batches bring ranks of their own, and this still talks to the static group.
    "hybrid": (
        ("--eval-iters {eval_iters}", "--eval-iters 0", "eval_iters", "Megatron schedules no batches of an evaluation"),
        ("--fp4-format", _DENSE, "fp4", f"{_ROWS} 32 tokens"),
        ("--fp8-format", _DENSE, "fp8", f"{_ROWS} 16 tokens"),
        ("--experimental-attention-variant", _DENSE, _KIND, ""),
        ("--hybrid-override-pattern", _DENSE, "hybrid_override_pattern", _MAMBA),
        ("--hybrid-layer-pattern", _DENSE, "hybrid_layer_pattern", _MAMBA),
        ("num_moe_experts", _DENSE, "num_moe_experts", _EXPERTS),
        ("--num-experts", _DENSE, "num_experts", _EXPERTS),
        ("--mtp-num-layers", _DENSE, "mtp_num_layers", "it shifts tokens over the static group"),
        ("--multi-latent-attention", _DENSE, "multi_latent_attention", "Megatron itself refuses it there"),
        (
            "--loong-placement {loong_placement}",
            "--loong-placement head_first",
            _not("loong_placement", "head_first", "head-inner-outer"),
            "it moves the ranks of a short sequence apart",
        ),
    ),
    # Megatron takes zigzag for granted here, where no hook reaches.
    "contiguous": (
        ("--hybrid-context-parallel", _ZIGZAG, "hybrid_context_parallel", "a document alone is cut as a pack"),
        ("--mtp-hsm", _ZIGZAG, "mtp_hsm", "it rolls hidden states, of which our roll passes no gradient on"),
        (_VARIANT, _ZIGZAG, _gated_delta_net, "its layers undo Megatron's zigzag"),
    ),
}


def refuse_first(beside: str, holder: object, **more: Any) -> None:
    """Raise `NotImplementedError` for the first of `REFUSALS[beside]` that `holder` or `more` asks for."""
    asked = Asked(holder, **more)
    for what, instead, when, why in REFUSALS[beside]:
        if asked[when] if isinstance(when, str) else when(asked):
            feature = what.format_map(asked) + (f" ({why})" if why else "")  # type: ignore[arg-type]
            raise NotImplementedError(MESSAGES[beside].format(feature, instead))
