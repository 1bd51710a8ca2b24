"""Floating-point operations of attention: what a layer needs, and what one call of the operator does."""

from __future__ import annotations

#: Matrix products of a forward (q k^T, p v) and of a backward (the scores again, dp, dq, dk, dv) per score.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


def scores(query_len: int, kv_len: int, causal: bool) -> int:
    """Scores that one head computes; `causal` as PyTorch's operator aligns it, at the upper left.

    >>> scores(4, 4, causal=True), scores(4, 8, causal=False)
    (10, 32)
    """
    if not causal:
        return query_len * kv_len
    square = min(query_len, kv_len)
    return square * (square + 1) // 2 + (query_len - square) * kv_len


def attention_flops(
    batch: int, heads: int, head_dim: int, query_len: int, kv_len: int, *, causal: bool, backward: bool
) -> int:
    """Operations of one attention call; multiply and add count as two. A backward does 2.5 times its forward.

    >>> forward = attention_flops(1, 8, 64, 4096, 4096, causal=True, backward=False)
    >>> forward / (2 * 4096**2 * 8 * 64)  # the paper's 2 S^2 h d, which leaves out the diagonal's half
    1.00...
    """
    products = BACKWARD_PRODUCTS if backward else FORWARD_PRODUCTS
    return 2 * products * batch * heads * head_dim * scores(query_len, kv_len, causal)
