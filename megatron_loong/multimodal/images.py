"""Which rank encodes which image. Pure: every rank finds the same answer from sizes that all of them know."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ImageDeal:
    """The images of a batch, shared out to the ranks of a context-parallel group. See `deal_images`."""

    rows: tuple[int, ...]
    """By image: how many tokens of the language model it becomes."""
    encoders: tuple[int, ...]
    """By image: the cp_rank that encodes it."""

    def images_of(self, cp_rank: int) -> list[int]:
        """Images that a rank encodes, in ascending order; perhaps none."""
        return [image for image, encoder in enumerate(self.encoders) if encoder == cp_rank]

    def rows_of(self, cp_rank: int) -> int:
        """Rows that a rank's images become: what its encoder and projector are to return."""
        return sum(self.rows[image] for image in self.images_of(cp_rank))


def deal_images(rows: Sequence[int], ranks: int, costs: Sequence[float] | None = None) -> ImageDeal:
    """Share out images (or frames) to `ranks` ranks, so that the most loaded one has as little as can be had simply.

    `rows`: by image, how many tokens of the language model it becomes. `costs`: by image, what encoding it costs, in
    any unit, such as `encoder_cost`; its rows unless given. The dearest image goes first, each to the rank with least
    so far (at most 4/3 of the best); equal images go round. An image is what the encoder sees alone: frames that
    attend to one another are one image. Raises `ValueError` for sizes that are negative or do not match.

    >>> deal_images([4, 4, 4, 4, 4], ranks=2).encoders
    (0, 1, 0, 1, 0)
    >>> deal_images([4, 16, 4, 8], ranks=2).encoders
    (1, 0, 1, 1)
    """
    costs = list(rows if costs is None else costs)
    if ranks < 1 or len(costs) != len(rows) or any(n < 0 for n in (*rows, *costs)):
        raise ValueError(
            f"rows={list(rows)!r:.80} and costs={costs!r:.80} must be one number for each image, none below 0, and "
            f"ranks={ranks} at least 1"
        )
    encoders = [0] * len(costs)
    loads = [(0.0, rank) for rank in range(ranks)]
    for image in sorted(range(len(costs)), key=lambda image: -costs[image]):
        load, encoders[image] = heapq.heappop(loads)
        # A whisker for each image, so that images of no cost go round too.
        heapq.heappush(loads, (load + max(costs[image], 1e-9), encoders[image]))
    return ImageDeal(tuple(rows), tuple(encoders))


def encoder_cost(patches: int, hidden_size: int) -> int:
    """What one layer of a vision transformer costs for an image, in units of 4 * hidden_size FLOPs.

    24 p h^2 FLOPs for its matrix products (an MLP of 4 h) and 4 p^2 h for full attention.

    >>> encoder_cost(256, 1024) / encoder_cost(64, 1024)
    4.12...
    """
    return patches * (6 * hidden_size + patches)
