"""The all-to-all of the head group on one packed buffer."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_loong.comm import ledger
from megatron_loong.comm.errors import CommunicationError
from megatron_loong.topology.groups import GroupHandle


def all_to_all(send: torch.Tensor, handle: GroupHandle, what: str) -> torch.Tensor:
    """Exchange row p of `send` [P, ...] (contiguous) with head coordinate p; row p of the result came from p.

    `what` says in errors what was under way. Raises `CommunicationError` when a peer is gone or time runs out.
    """
    group = handle.process_group
    assert group is not None and send.shape[0] == handle.size and send.is_contiguous()
    slots = handle.slots
    in_order = slots == list(range(handle.size))
    received = torch.empty_like(send)
    ledger.record(handle.name, send.numel() * send.element_size() * (handle.size - 1) // handle.size)
    # Rows travel in the group's own order (ascending global ranks), which may differ from the coordinates'.
    outgoing = send if in_order else send[_inverse(slots)]
    try:
        # Bytes, so that the backend need not know the dtype.
        dist.all_to_all_single(_as_bytes(received), _as_bytes(outgoing), group=group)
    except RuntimeError as error:
        raise CommunicationError(
            f"all-to-all of {what} in the head group {list(handle.global_ranks)} did not complete; one of these "
            f"processes is gone, or did not get here within the group's timeout. Cause: {error}"
        ) from error
    return received if in_order else received[slots]


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], -1).view(torch.uint8)


def _inverse(permutation: list[int]) -> list[int]:
    return [permutation.index(i) for i in range(len(permutation))]
