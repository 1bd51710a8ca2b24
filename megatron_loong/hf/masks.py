"""What transformers' mask functions mean, for an attention that makes no mask of them.

transformers describes a mask as a function of (batch, head, query, key), put together from a few of its own, and asks
each attention implementation to make of it what it needs (`AttentionMaskInterface`). Only their names and what they
close over tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch


class Pattern(NamedTuple):
    """The mask of some layers, as transformers hands it to their attention."""

    causal: bool
    window: tuple[int, int] | None = None
    """Keys seen before and after a query's own place."""
    padding: torch.Tensor | None = None
    """bool [b, s]: False where this rank's tokens are padding."""
    unknown: str | None = None
    """What in the mask is not known here. The layers that use it refuse it: some models make masks that none uses."""


def pattern_of(
    *, mask_function: Callable[..., Any], attention_mask: torch.Tensor | None = None, **unused: Any
) -> Pattern:
    """The mask function of this attention; transformers calls it once for each kind of layer."""
    causal, window, unknown = False, None, None
    for name, function in _leaves(mask_function):
        if name == "causal_mask_function":
            causal = True
        elif name == "sliding_window_overlay":  # the query's own key and those before it are `sliding_window`
            window = (_closed_over(function)["sliding_window"] - 1, 0)
        elif name == "sliding_window_bidirectional_overlay":
            window = (_closed_over(function)["sliding_window"],) * 2
        elif name not in ("bidirectional_mask_function", "packed_sequence_mask_function"):
            # Packs are read off the positions of all ranks; those of this one look packed in any case.
            unknown = _WORDS.get(name, f"the mask function {name}: use a model without")
    if window is not None and causal:
        window = (window[0], 0)
    return Pattern(causal, window, attention_mask, unknown)


_WORDS = {
    "chunked_overlay": "chunked attention (attention_chunk_size): use layers with full or sliding-window attention",
    "blockwise_overlay": "blocks of tokens that see each other both ways (images): use a model of text alone",
    "or_masks": "a mask that joins others (or_mask_function): use a causal, sliding-window or bidirectional one",
}


def _leaves(function: Callable[..., Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The mask functions that must all hold for a pair to be seen, by the names of what made them."""
    name = function.__qualname__.split(".")[0] if isinstance(function, FunctionType) else type(function).__name__
    if name == "and_masks":
        for one in _closed_over(function)["mask_functions"]:
            yield from _leaves(one)
    elif name == "remap_positions_for_packed_sequence":
        yield from _leaves(_closed_over(function)["mask_function"])
    else:
        yield name, function


def _closed_over(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))
