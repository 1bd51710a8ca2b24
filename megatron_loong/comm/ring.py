"""One hop of a ring: post, compute, wait."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_loong.comm import ledger
from megatron_loong.comm.errors import CommunicationError
from megatron_loong.topology.groups import GroupHandle


class Ring:
    """A ring over the members of one communicator: sends to coordinate + 1, receives from coordinate - 1."""

    def __init__(self, handle: GroupHandle) -> None:
        self.handle = handle
        self.next_global_rank = handle.global_ranks[(handle.rank + 1) % handle.size]
        self.previous_global_rank = handle.global_ranks[(handle.rank - 1) % handle.size]

    def pass_on(self, block: torch.Tensor, step: str) -> tuple[torch.Tensor, Callable[[], None]]:
        """Post the hop of `block` (contiguous) and of its counterpart from the previous member.

        Returns (incoming, wait): `incoming` has block's shape and may be read after `wait()`; until then `block`
        must not be written. `step` says in errors where in the schedule this hop belongs. `wait` raises
        `CommunicationError`, naming group, step and peer, when the peer is gone or the group's timeout runs out.
        """
        group = self.handle.process_group
        assert group is not None, f"a ring of size 1 has nobody to pass on to ({self.handle.name})"
        incoming = torch.empty_like(block)
        ledger.record(self.handle.name, block.numel() * block.element_size())
        try:
            works = self._post(block, incoming, group)
        except (RuntimeError, ValueError) as error:
            raise self._failure(
                step, f"ranks {self.previous_global_rank} and {self.next_global_rank}", error
            ) from error

        def wait() -> None:
            # A second wait() on a gloo p2p work blocks until the timeout, so each is waited for once, here; and
            # gloo's wait() without an argument ignores the timeout of the group.
            for peer, work in works:
                try:
                    work.wait(self.handle.timeout)
                except RuntimeError as error:
                    raise self._failure(step, peer, error) from error
            works.clear()

        return incoming, wait

    def _post(
        self, block: torch.Tensor, incoming: torch.Tensor, group: dist.ProcessGroup
    ) -> list[tuple[str, dist.Work]]:
        receive_from, send_to = self.previous_global_rank, self.next_global_rank
        if dist.get_backend(group) == "gloo":
            receive = dist.irecv(incoming, src=receive_from, group=group)
            send = dist.isend(block, dst=send_to, group=group)
            assert receive is not None and send is not None
            return [(f"rank {receive_from} (receiving)", receive), (f"rank {send_to} (sending)", send)]
        # NCCL: one group call, so that a ring of two cannot deadlock on the order of its sends and receives.
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, block, send_to, group), dist.P2POp(dist.irecv, incoming, receive_from, group)]
        )
        return [(f"ranks {receive_from} and {send_to}", work) for work in works]

    def _failure(self, step: str, peer: str, error: Exception) -> CommunicationError:
        return CommunicationError(
            f"{self.handle.name} ring {list(self.handle.global_ranks)}, {step}: the hop with {peer} did not complete; "
            f"that process is gone, or did not get here within the group's timeout. Cause: {error}"
        )
