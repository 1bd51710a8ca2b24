"""Which side of the attention moves round the ring in the backward pass: the one of fewer bytes."""

from __future__ import annotations

from typing import Literal, NamedTuple

Moving = Literal["kv", "q"]
"""Keys and values move and every rank computes for its own queries, or the other way round."""


class RowBytes(NamedTuple):
    """Bytes of one token that moves."""

    there: int
    """What is sent to every rank."""
    home: int
    """Its gradient, or its output, sent back to the owner."""


def backward_rows(
    query: tuple[int, int, int], kv: tuple[int, int, int], width: int, wire_width: int, sum_width: int
) -> dict[Moving, RowBytes]:
    """Bytes of a token by the side that moves, for what one rank has after the all-to-all.

    query: (heads, width of a q head, of an out head). kv: (heads, width of k, of v). width: bytes of an input's
    element; wire_width: of a travelling gradient's; sum_width: of lse and delta. Keys travel as (k, v; dk, dv),
    queries as (q, dout, lse, delta; dq). BurstAttention (arXiv 2403.09347) section 3.1 has the second.

    >>> backward_rows((8, 64, 64), (8, 64, 64), 2, 2, 4)
    {'kv': RowBytes(there=2048, home=2048), 'q': RowBytes(there=2112, home=1024)}
    """
    heads, head_dim, value_dim = query
    # `out` need not travel: kernels use it only to form delta = (dout * out).sum(-1), which is one number a row.
    kv_elements = kv[0] * (kv[1] + kv[2])
    return {
        "kv": RowBytes(kv_elements * width, kv_elements * wire_width),
        "q": RowBytes(heads * ((head_dim + value_dim) * width + 2 * sum_width), heads * head_dim * wire_width),
    }


def backward_moving(rows: dict[Moving, RowBytes], query_tokens: int, kv_tokens: int) -> Moving:
    """The side whose tokens are fewer bytes in all; keys where there is no difference."""
    return "q" if sum(rows["q"]) * query_tokens < sum(rows["kv"]) * kv_tokens else "kv"
