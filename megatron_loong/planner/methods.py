"""Our attention and the ones it is held against: the same layouts, other programs and other memory traffic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from megatron_loong.config import LoongConfig
from megatron_loong.planner import programs
from megatron_loong.planner.links import Site
from megatron_loong.planner.parts import head_parts
from megatron_loong.planner.programs import Op
from megatron_loong.planner.traffic import AttentionShape, moving_bytes
from megatron_loong.schedule.rotation import Moving, RowBytes
from megatron_loong.schedule.routes import Place, forward_order

Program = Callable[[int, int], tuple[Op, ...]]
BackwardProgram = Callable[[int, int, bool, bool], tuple[Op, ...]]


@dataclass(frozen=True)
class Method:
    """What the simulation has to know of an implementation, from its source."""

    name: str
    forward_program: Program = programs.forward_program
    backward_program: BackwardProgram = programs.backward_program
    merge_bytes_per_element: int = 18
    """Memory traffic of folding one element of a block's output in: block read 2, widened copy written and read 4 + 4,
    running sum read and written 4 + 4 (ring-flash-attention's fused update is the same)."""
    dq_bytes_per_element: int = 10
    """dq read and written in float32, the tile's read in bf16."""
    dkv_bytes_per_element: int = 10
    return_bytes_per_element: int = 0
    """Of a gradient that returns to its owner, beyond reading it once: its way into a message and out of it."""
    stand_in_bytes_per_element: int = 0
    """Of dout, for a tile whose queries have come: passes of `out_with_delta`."""
    travelling_bytes_per_element: int = 0
    """Of dout, once, where queries move: delta, and the copy into the block that travels."""
    parts_wait: bool = False
    """Whether parts wait and then go into a sum in one pass (`schedule.parts.waiting_bytes`), of which the last writes
    the result; a part costs only its own bytes then."""
    narrow_gradients: bool = False
    """Whether gradients travel in the input's dtype; else in that of the sums, float32."""
    in_parts: bool = False
    """Whether heads go through in parts (`planner.parts`)."""
    either_side_moves: bool = False
    """Whether queries move in the backward pass where that is fewer bytes; else keys and values do."""

    def direct_returns(self, shape: AttentionShape) -> bool:
        """Whether gradients go straight to the first rank of a ring: those that are rounded to travel."""
        return self.narrow_gradients and shape.dtype_bytes < 4

    def parts(self, config: LoongConfig, shape: AttentionShape, site: Site) -> int:
        """In how many parts the heads go through."""
        return head_parts(config, shape, site) if self.in_parts else 1

    def token_bytes(self, config: LoongConfig, shape: AttentionShape, backward: bool) -> RowBytes:
        """Bytes of one token that goes round the ring, and of its gradient on the way home."""
        return self._moving(config, shape, backward)[1]

    def queries_move(self, config: LoongConfig, shape: AttentionShape, backward: bool) -> bool:
        """Whether it is queries that go round the ring."""
        return self._moving(config, shape, backward)[0] == "q"

    def _moving(self, config: LoongConfig, shape: AttentionShape, backward: bool) -> tuple[Moving, RowBytes]:
        width = shape.dtype_bytes if self.narrow_gradients else shape.sum_bytes
        return moving_bytes(config, shape, backward, width, self.either_side_moves)


@functools.lru_cache(maxsize=256)
def forward_order_backward(
    outer_ring_size: int, inner_ring_size: int, short: bool = False, direct_returns: bool = False
) -> tuple[Op, ...]:
    """The backward of LoongTrain's public code and of ring-flash-attention: blocks in the order of the forward, so
    that dKV needs ring_size hops to be home, and the hop to the next outer round is waited for where it is made; the
    same for blocks of any length, and gradients go from rank to rank.
    """
    ops: list[Op] = []
    for op in programs.forward_program(outer_ring_size, inner_ring_size):
        ops.append(op)
        if op.kind == "tile":
            ops += _travelling_gradient(op.place, outer_ring_size, inner_ring_size)
    return tuple(ops)


def _travelling_gradient(place: Place, outer_ring_size: int, inner_ring_size: int) -> list[Op]:
    """dKV that came with the block before is added to and passed on, on the ring on which its block goes next."""
    places = forward_order(outer_ring_size, inner_ring_size)
    index = places.index(place)
    ops: list[Op] = []
    if index and inner_ring_size > 1 and place.inner:
        ops.append(Op("wait", places[index - 1], "inner_dkv"))
    ops.append(Op("fold", place))
    if inner_ring_size > 1:
        ops.append(Op("post", place, "inner_dkv"))
    if place.inner == inner_ring_size - 1:
        if inner_ring_size > 1:
            ops.append(Op("wait", place, "inner_dkv"))
        if outer_ring_size > 1:
            ops += [Op("post", place, "outer_dkv"), Op("wait", place, "outer_dkv")]
    return ops


OURS = Method(
    "loong",
    narrow_gradients=True,
    in_parts=True,
    either_side_moves=True,
    merge_bytes_per_element=2,
    dq_bytes_per_element=2,
    dkv_bytes_per_element=2,
    parts_wait=True,
    return_bytes_per_element=4,  # written for the wire, read where it arrives
    stand_in_bytes_per_element=40,
    travelling_bytes_per_element=28,
)

LOONGTRAIN = Method("LoongTrain", backward_program=forward_order_backward)
"""InternEvo's double ring: sums in float32, gradients travel in float32."""

MEGATRON_CP = Method("Megatron-CP", backward_program=forward_order_backward, narrow_gradients=True)
"""TransformerEngine's p2p ring: gradients travel in bf16."""

TORCH_CP = Method(
    "PyTorch CP",
    backward_program=forward_order_backward,
    merge_bytes_per_element=38,
    dq_bytes_per_element=18,
    dkv_bytes_per_element=18,
)
"""PyTorch's ring (torch.distributed.tensor.experimental, `_SDPAMerger`): one kernel for each operator of a merge, all
in float32, in which gradients travel too."""

ULYSSES = Method("DeepSpeed-Ulysses")
"""Without a ring there is nothing to merge."""
