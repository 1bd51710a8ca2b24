"""The all-to-all of the head group on one packed buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_loong.comm import flight, ledger
from megatron_loong.comm.errors import errors_of
from megatron_loong.comm.groups import GroupHandle
from megatron_loong.comm.transport import Pending, transport_for


def all_to_all(
    send: torch.Tensor,
    send_lengths: Sequence[int],
    receive_lengths: Sequence[int],
    handle: GroupHandle,
    what: str,
) -> Pending[torch.Tensor]:
    """Begin to exchange pieces of a flat buffer; the wait returns the pieces that arrived, in one flat tensor.

    Piece p of `send` goes to head coordinate p, and piece p of the result came from p. Lengths are in elements; `what`
    names the tensors in errors. Raises `CommunicationError`, from here or from the wait, when a peer is lost or does
    not arrive within the group's timeout.
    """
    assert handle.process_group is not None and send.is_contiguous() and send.numel() == sum(send_lengths)
    width = send.element_size()
    name, sent_bytes = f"{handle.name} group", (send.numel() - send_lengths[handle.rank]) * width
    ledger.record(handle.name, sent_bytes)
    operations = [flight.begin("all-to-all", what, name, handle.global_ranks, None, sent_bytes)]
    received = torch.empty(sum(receive_lengths), dtype=send.dtype, device=send.device)
    with errors_of(operations):
        # As bytes, so that the backend need not know the dtype.
        pending = transport_for(handle, send.device).all_to_all(
            received.view(torch.uint8),
            send.view(torch.uint8),
            [length * width for length in receive_lengths],
            [length * width for length in send_lengths],
        )
    # The wait empties this list, so that both buffers are freed with their last user although `wait` lives on.
    under_way = [(pending, received)]
    del pending, received, send

    def wait() -> torch.Tensor:
        pending, received = under_way.pop()
        flight.wait(operations)
        with errors_of(operations):
            pending()
        flight.done(operations)
        return received

    return wait
