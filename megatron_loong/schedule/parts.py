"""In how many parts an attention goes through, so that all-to-alls hide behind its computing.

Heads in parts, each with KV heads of its own; or, where there is no ring and a rank's heads cannot be parted, the two
halves of the sequence and slices of them (`attention.halves`).
"""

from __future__ import annotations

from typing import NamedTuple

#: Beyond these parts of the heads, of the sequence, there is little left to hide.
MOST_HEAD_PARTS, MOST_SEQUENCE_PARTS = 4, 8
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

    def fill(self, parts: int) -> bool:
        """Whether each of so many parts is large enough."""
        least = LEAST_BYTES_BETWEEN_NODES if self.between_nodes else LEAST_BYTES_IN_NODE
        filled = self.rows * self.row_bytes >= parts * least
        return filled and (not self.gpu or self.rows >= parts * LEAST_ROWS_ON_GPU)


def parts_of_heads(most: int, queries: Queries) -> int:
    """Parts of the heads by size: a divisor of `most`, the KV heads of a rank that can be parted.

    >>> parts_of_heads(8, Queries(2**15, 256, gpu=False, between_nodes=False))
    4
    """
    return max(n for n in range(1, MOST_HEAD_PARTS + 1) if n == 1 or (most % n == 0 and queries.fill(n)))


def parts_of_sequence(queries: Queries, most_slices: int) -> int:
    """Parts of the sequence by size and place, where it can be parted: inside a node its halves do not pay.

    most_slices: of a half (`TokenLayout.most_slices`).

    >>> parts_of_sequence(Queries(2**14, 128, gpu=False, between_nodes=True), most_slices=1024)
    8
    """
    even = range(2, min(MOST_SEQUENCE_PARTS, 2 * most_slices) + 1, 2)
    return max((n for n in even if queries.between_nodes and queries.fill(n)), default=1)
