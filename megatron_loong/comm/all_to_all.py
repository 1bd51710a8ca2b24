"""The all-to-all of the head group on one packed buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_loong.comm import ledger
from megatron_loong.comm.routes import transport_for
from megatron_loong.topology.errors import CommunicationError, not_completed
from megatron_loong.topology.groups import GroupHandle


def send_buffer(handle: GroupHandle, like: torch.Tensor, numel: int) -> torch.Tensor:
    """Uninitialised, of the dtype and on the device of `like`: for what goes to `all_to_all` next, whole."""
    if not handle.in_order:
        return like.new_empty(numel)
    return transport_for(handle, like.device).buffer(numel * like.element_size(), like.device).view(like.dtype)


def all_to_all(
    send: torch.Tensor,
    send_lengths: Sequence[int],
    receive_lengths: Sequence[int],
    handle: GroupHandle,
    what: str,
) -> Callable[[], torch.Tensor]:
    """Begin to exchange pieces of flat buffers; returns what waits for the result (once).

    Piece p of `send` goes to head coordinate p, piece p of the result came from p. `send_lengths[p]` and
    `receive_lengths[p]` are in elements. `what` says in errors what was under way. `CommunicationError`, from here or
    from the wait, when a peer is gone or time runs out.
    """
    assert handle.process_group is not None and send.is_contiguous() and send.numel() == sum(send_lengths)
    width = send.element_size()
    ledger.record(handle.name, (send.numel() - send_lengths[handle.rank]) * width)
    # Pieces travel in the group's own order (ascending global ranks), which may differ from the coordinates'.
    order, in_order, slots = handle.order, handle.in_order, handle.slots
    received = torch.empty(sum(receive_lengths), dtype=send.dtype, device=send.device)
    outgoing = send if in_order else _reordered(send, send_lengths, order)

    def failure(error: Exception) -> CommunicationError:
        return not_completed(f"all-to-all of {what}", "head group", handle.global_ranks, error)

    transport = transport_for(handle, send.device)
    try:
        # Bytes, so that the backend need not know the dtype.
        pending = transport.all_to_all(
            received.view(torch.uint8),
            outgoing.view(torch.uint8),
            [receive_lengths[peer] * width for peer in order],
            [send_lengths[peer] * width for peer in order],
        )
    except RuntimeError as error:
        raise failure(error) from error

    under_way = [(pending, received)]  # emptied by the wait, so that what was sent and came goes with its last user
    del pending, received, outgoing, send

    def wait() -> torch.Tensor:
        pending, received = under_way.pop()
        try:
            pending(handle.timeout)
        except RuntimeError as error:
            raise failure(error) from error
        return received if in_order else _reordered(received, [receive_lengths[peer] for peer in order], slots)

    return wait


def _reordered(buffer: torch.Tensor, lengths: Sequence[int], order: Sequence[int]) -> torch.Tensor:
    pieces = buffer.split(list(lengths))
    return torch.cat([pieces[i] for i in order])
