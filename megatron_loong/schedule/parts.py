"""In how many parts heads go through, so that all-to-alls hide behind computing, and how many parts of a sum wait."""

from __future__ import annotations

from typing import NamedTuple

#: Beyond these parts there is little left to hide.
MOST_HEAD_PARTS = 4
#: Below these sizes of a part's share of q, messages and kernel calls cost more than they hide: inside a node, and
#: between nodes. On a GPU a part must also fill it: query rows x heads of one kernel call, 128 to a block.
LEAST_BYTES_IN_NODE, LEAST_BYTES_BETWEEN_NODES, LEAST_ROWS_ON_GPU = 2**21, 2**18, 2**16


class Queries(NamedTuple):
    """One rank's share of q after the all-to-all."""

    rows: int
    """Queries x heads."""
    row_bytes: int
    gpu: bool
    between_nodes: bool
    """Whether the context-parallel group is spread over nodes."""


def parts_of_heads(most: int, queries: Queries) -> int:
    """Parts of the heads by size: a divisor of `most`, the KV heads of a rank that can be parted.

    >>> parts_of_heads(8, Queries(2**15, 256, gpu=False, between_nodes=False))
    4
    """
    least = LEAST_BYTES_BETWEEN_NODES if queries.between_nodes else LEAST_BYTES_IN_NODE
    largest = min(MOST_HEAD_PARTS, queries.rows * queries.row_bytes // least)
    if queries.gpu:
        largest = min(largest, queries.rows // LEAST_ROWS_ON_GPU)
    return max(n for n in range(1, max(1, largest) + 1) if most % n == 0)


def waiting_bytes(sum_bytes: int) -> float:
    """Bytes of parts that are kept before they are added to a float32 sum of `sum_bytes`, in one pass over memory.

    2.25 sums are 4.5 bfloat16 parts of all rows. Adding n parts in p passes moves, in bytes an element, 2n to read
    them, 4 for the first sum, 8 (p - 2) for those between, and 6 for the last pass, which writes bfloat16; one pass
    alone 2n + 2. For n = 8 that is 74 with a pass for each part, 42 with passes of two, 34 of three, 26 of four, 18 of
    eight.
    At most 1 GiB, because where blocks are larger than that, kernels take so long that the passes hardly matter.

    >>> waiting_bytes(2**28) / 2**28, waiting_bytes(2**31) / 2**31
    (2.25, 0.5)
    """
    return min(2.25 * sum_bytes, 2**30)
