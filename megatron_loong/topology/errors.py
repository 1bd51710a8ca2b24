"""The one error of whoever waits for other ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


class CommunicationError(RuntimeError):
    """A message or a collective failed or ran out of time; says which group, what was under way, and which peers."""


def not_completed(what: str, group: str, ranks: Sequence[int], error: Exception) -> CommunicationError:
    """The error of a collective in `group` of global `ranks`, any of which may be the one that is lost."""
    return CommunicationError(
        f"{what} in the {group} {list(ranks)} did not complete; one of these processes is gone, or did not get here "
        f"within the group's timeout. Cause: {error}"
    )


@contextlib.contextmanager
def collective(what: str, group: str, ranks: Sequence[int]) -> Iterator[None]:
    """Around a collective: what its backend raises becomes `not_completed`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # this rank's own, and nobody is lost
    except RuntimeError as error:
        raise not_completed(what, group, ranks, error) from error
