"""The one error of waiting for other ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from megatron_loong.comm import flight


class CommunicationError(RuntimeError):
    """A message or a collective failed or timed out. The message names the group, the ranks and what was under way."""


@contextlib.contextmanager
def collective(what: str, group: str, ranks: Sequence[int]) -> Iterator[None]:
    """Around a whole collective in `group` of global `ranks`: an error of the backend becomes `CommunicationError`."""
    operations = [flight.begin("collective", what, group, ranks)]
    flight.wait(operations)
    with errors_of(operations):
        yield
    flight.done(operations)


@contextlib.contextmanager
def errors_of(operations: Sequence[flight.Operation]) -> Iterator[None]:
    """The same where operations of one group are posted, and again where they are waited for."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # this rank's own error: nobody is lost
    except RuntimeError as error:
        flight.wait(operations)  # for what failed where it was posted
        path = flight.write(error)
        record = f" The last steps of this rank are in {path}; `megatron-loong postmortem` reads them." if path else ""
        first = operations[0]
        raise CommunicationError(
            f"{_named(operations)} in the {first.group} {list(first.ranks)} did not complete; one of these processes "
            f"is gone, or did not get here within the group's timeout.{record} Cause: {error}"
        ) from error


def _named(operations: Sequence[flight.Operation]) -> str:
    what = ", ".join(dict.fromkeys(x.what for x in operations))
    if operations[0].peer is None:
        return f"all-to-all of {what}" if operations[0].operation == "all-to-all" else what
    ends = (f"rank {x.peer} ({'sending' if x.operation == 'send' else 'receiving'})" for x in operations)
    return f"{what}: the hop with {' and '.join(ends)}"
