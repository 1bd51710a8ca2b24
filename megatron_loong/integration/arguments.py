"""The command-line flags, and where a parser of Megatron's is listened to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from megatron_loong.integration.options import IMPLEMENTATIONS, LoongOptions, flag_of

_HELP = {
    "context_parallel_impl": "Who runs attention over --context-parallel-size ranks: Megatron (native) or "
    "LoongTrain's 2D-Attention (loong).",
    "loong_head_parallel_size": "Ranks over which attention heads are split by all-to-all. auto: the largest that "
    "divides the query heads of one tensor-parallel rank and the context-parallel size and fits in a node.",
    "loong_inner_ring_size": "Ranks of one inner ring of Double-Ring-Attention. auto: the ring ranks inside a node.",
    "loong_placement": "Which coordinate varies fastest over adjacent ranks: head_first, context_first, or an order of "
    "head, inner and outer such as inner-head-outer.",
    "loong_kernel": "Attention kernel of a tile; auto takes the first that can serve and says why not the others.",
}


def size_or_auto(text: str) -> int | str:
    """A number, or `auto`; what is neither stays as it is, for `LoongOptions` to refuse by name."""
    return int(text) if text.isdigit() else text


def add_loong_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags. Their values are checked together, when the arguments have been parsed."""
    defaults = LoongOptions()
    group = parser.add_argument_group(title="megatron_loong")
    for field, text in _HELP.items():
        extra: dict[str, Any] = {}
        if field == "context_parallel_impl":
            extra["choices"] = IMPLEMENTATIONS
        elif field.endswith("_size"):
            extra["type"] = size_or_auto
        group.add_argument(flag_of(field), default=getattr(defaults, field), help=text, **extra)


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
        on_parsed(namespace)
        return namespace, rest

    parser.parse_known_args = parse_and_tell  # type: ignore[method-assign]
