"""The one error of waiting for other ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from megatron_loong.comm import flight


class CommunicationError(RuntimeError):
    """A message or a collective failed or timed out. The message names the group, the ranks and what was under way."""


@contextlib.contextmanager
def collective(
    what: str, group: str, ranks: Sequence[int], operations: Sequence[flight.Operation] = ()
) -> Iterator[None]:
    """Around communication in `group` of global `ranks`: an error of the backend becomes `CommunicationError`.

    `operations`: what it belongs to where it is posted in one place and waited for in another; else a whole collective.
    """
    whole = () if operations else [flight.begin("collective", what, group, ranks)]
    flight.wait(whole)
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # this rank's own error: nobody is lost
    except RuntimeError as error:
        flight.wait(operations)  # for what failed where it was posted
        path = flight.write(error)
        record = f" The last steps of this rank are in {path}; `megatron-loong postmortem` reads them." if path else ""
        raise CommunicationError(
            f"{what} in the {group} {list(ranks)} did not complete; one of these processes is gone, or did not get "
            f"here within the group's timeout.{record} Cause: {error}"
        ) from error
    flight.done(whole)
