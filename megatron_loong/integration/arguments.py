"""The command-line flags, and where a parser of Megatron's is listened to."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable
from typing import Any

from megatron_loong.config import GRADIENT_WIRES
from megatron_loong.integration.options import IMPLEMENTATIONS, LAYOUTS, REMOVED, LoongOptions, flag_of, removed

_HELP = {
    "context_parallel_impl": "Who runs attention over --context-parallel-size ranks: Megatron (native) or "
    "LoongTrain's 2D-Attention (loong).",
    "loong_head_parallel_size": "Ranks over which attention heads are split by all-to-all. auto: the planner's "
    "choice where the hardware is known; else the largest that divides the query heads of one tensor-parallel rank "
    "and the context-parallel size and fits in a node.",
    "loong_inner_ring_size": "Ranks of one inner ring of Double-Ring-Attention. auto: the ring ranks inside a node.",
    "loong_placement": "Which coordinate varies fastest over adjacent ranks: head_first, context_first, or an order of "
    "head, inner and outer such as inner-head-outer. auto: the planner's choice where the hardware is known; else "
    "head_first.",
    "loong_hardware": "What the planner goes by for auto: a profile such as h100, or a file that `megatron-loong "
    "calibrate` wrote. auto: the profile of this GPU, if there is one.",
    "loong_sequence_layout": "Which tokens of a sequence a rank holds: two pieces that balance causal work (zigzag), "
    "or one (contiguous), for data whose tokens cannot be permuted.",
    "loong_pack_layout": "Which tokens of packed documents a rank holds: as the plugin deals them, without padding "
    "(dealt); of each document two pieces, as Megatron, TransformerEngine, verl, slime and NeMo-RL cut them "
    "(per_document); one piece of the pack (contiguous).",
    "loong_kernel": "Attention kernel of a tile; auto takes the first that can serve and says why not the others, "
    "auto-fp8 the first whose forward is in fp8.",
    "loong_gradient_wire": "What gradients travel round the ring in; they are summed in float32. auto: bfloat16 where "
    "q is, float32 else.",
    "loong_mla_latent": "Multi-latent attention: send the latent round the ring instead of keys and values, where that "
    "is fewer bytes.",
    "loong_selective_checkpoint": "With --recompute-granularity full: keep attention's output and log-sum-exp, so that "
    "the recomputation does not run the ring again. Optionally only on some layers, counted from 1, such as 1-4,9.",
    "loong_keep_exchange": "With --loong-selective-checkpoint: layers that also keep q, k and v after the all-to-all, "
    "so that the recomputation does not run the all-to-alls again.",
    "loong_offload_attention": "What --loong-selective-checkpoint keeps waits in host memory until the backward.",
    "loong_offload_activations": "The inputs of recomputed layers wait in host memory until the backward.",
    "loong_tiled_loss": "Compute the language-model head and its loss over tiles of this many tokens, so that the "
    "logits of the whole sequence never exist. Without a number: 1024.",
    "loong_tiled_mlp": "Run each MLP over its tokens in this many tiles, and again in the backward.",
    "loong_zero_param_size": "Data x context parallel ranks over which one copy of the parameters is spread, or all. "
    "Translated to Megatron's distributed optimizer or Megatron-FSDP.",
    "loong_zero_grad_size": "The same for gradients.",
    "loong_zero_optimizer_size": "The same for master weights and optimizer states.",
}

#: What argparse is told of a flag besides its default and its help.
_FORMS: dict[str, dict[str, Any]] = {
    "context_parallel_impl": {"choices": IMPLEMENTATIONS},
    "loong_selective_checkpoint": {"nargs": "?", "const": "all", "metavar": "LAYERS"},
    "loong_keep_exchange": {"nargs": "?", "const": "all", "metavar": "LAYERS"},
    **{field: {"choices": values} for field, values in LAYOUTS.items()},
    "loong_gradient_wire": {"choices": GRADIENT_WIRES},
    "loong_mla_latent": {"action": "store_true"},
    "loong_offload_attention": {"action": "store_true"},
    "loong_offload_activations": {"action": "store_true"},
    "loong_tiled_loss": {"nargs": "?", "const": 1024, "type": int, "metavar": "TOKENS"},
    "loong_tiled_mlp": {"type": int, "metavar": "TILES"},
}


class _Removed(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        (field,) = (field for field in REMOVED if flag_of(field) == self.option_strings[0])
        raise argparse.ArgumentError(self, removed(field))


def size_or_auto(text: str) -> int | str:
    """A number, or `auto`; what is neither stays as it is, for `LoongOptions` to refuse by name."""
    return int(text) if text.isdigit() else text


def add_loong_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags. Their values are checked together, when the arguments have been parsed."""
    defaults = LoongOptions()
    group = parser.add_argument_group(title="megatron_loong")
    for field, text in _HELP.items():
        extra = _FORMS.get(field, {"type": size_or_auto} if field.endswith("_size") else {})
        group.add_argument(flag_of(field), default=getattr(defaults, field), help=text, **extra)
    for field in REMOVED:
        group.add_argument(flag_of(field), action=_Removed, nargs="?", dest=argparse.SUPPRESS, help=argparse.SUPPRESS)


def refuse_misspelt(unknown: Iterable[str]) -> None:
    """Raise `ValueError` for a word that no parser knows and that was meant to be one of ours; it names the nearest."""
    ours = [flag_of(field) for field in _HELP]
    for word in unknown:
        flag = word.partition("=")[0]
        prefixed = flag.startswith(("--loong-", "--loong_"))
        # At 0.9, a letter or two of a flag are wrong; Megatron has no flag that is so near to one of ours.
        near = difflib.get_close_matches(flag, ours, n=1, cutoff=0.6 if prefixed else 0.9)
        if near or prefixed:
            guess = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(f"there is no flag {flag}{guess} (SCRIPT --help lists those of megatron_loong)")


def mend_help(parser: argparse.ArgumentParser) -> None:
    """Escape a bare % in help texts (Megatron 0.18 and 0.19 have one), at which `--help` would end in an error."""
    for action in parser._actions:  # argparse has no public view of its options
        try:
            _ = (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError):
            action.help = (action.help or "").replace("%", "%%")


def listen(parser: argparse.ArgumentParser, on_parsed: Callable[[argparse.Namespace], None]) -> None:
    """Call `on_parsed` with what this one parser returns, before Megatron sees it.

    `parse_args` goes through `parse_known_args`, which is therefore the one method to follow. Megatron reads RANK
    from the environment right after parsing, which is why the placement can still change it here.
    """
    parse_known_args = parser.parse_known_args

    def parse_and_tell(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        namespace, rest = parse_known_args(*args, **kwargs)
        refuse_misspelt(rest)  # else a script that ignores unknown words would train without the flag
        on_parsed(namespace)
        return namespace, rest

    parser.parse_known_args = parse_and_tell  # type: ignore[method-assign]
