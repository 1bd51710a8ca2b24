"""The one error of waiting for other ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


class CommunicationError(RuntimeError):
    """A message or a collective failed or timed out. The message names the group, the ranks and what was under way."""


@contextlib.contextmanager
def collective(what: str, group: str, ranks: Sequence[int]) -> Iterator[None]:
    """Around communication in `group` of global `ranks`: an error of the backend becomes `CommunicationError`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # this rank's own error: nobody is lost
    except RuntimeError as error:
        raise CommunicationError(
            f"{what} in the {group} {list(ranks)} did not complete; one of these processes is gone, or did not get "
            f"here within the group's timeout. Cause: {error}"
        ) from error
