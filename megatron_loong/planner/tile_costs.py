"""What the tiles of one layout cost a rank: kernel, merge, gradient sums, the copies of the all-to-all."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_loong.config import CAUSAL, LoongConfig
from megatron_loong.planner.hardware import Hardware
from megatron_loong.planner.methods import Method
from megatron_loong.planner.programs import Tokens, backward_program
from megatron_loong.planner.traffic import AttentionShape, shared_heads
from megatron_loong.schedule.parts import waiting_bytes
from megatron_loong.schedule.tiles import Tile, halved


class TileCosts:
    """Seconds by (ring rank, owner), each computed once."""

    def __init__(
        self, config: LoongConfig, shape: AttentionShape, hardware: Hardware, backward: bool, method: Method
    ) -> None:
        self.config, self.shape, self.hardware, self.backward, self.method = config, shape, hardware, backward, method
        self.tokens = Tokens(config, shape.seq_len, shape.causal)
        self.heads = shape.heads // config.head_parallel_size
        self.block_tokens = self.tokens.block_tokens(0)
        kv_heads = shared_heads(config, shape)[1]
        elements = shape.batch * self.block_tokens * kv_heads * (shape.head_dim + shape.value_dim)
        self.fold_s = elements * method.dkv_bytes_per_element / hardware.memory_bytes_per_s
        """Adding the gradients of one block."""
        self.opens = backward and config.ring_size > 1 and method.backward_program is backward_program
        """Whether the own tiles are computed in two parts."""
        self.short = self.block_tokens < config.least_rows_to_cut
        """Whether they are too short for that."""
        self.queries_move = method.queries_move(config, shape, backward)
        rows = shape.batch * self.block_tokens * self.heads
        queries, results = rows * shape.head_dim, rows * shape.value_dim + (0 if not backward else elements)
        passed = (queries if self.queries_move else elements) * method.return_bytes_per_element if backward else 0
        self.return_s = passed / hardware.memory_bytes_per_s
        """Writing the gradient of one block for its way home, and adding it there, beyond `fold_s`."""
        once = results * self._sum_bytes_per_element(results)
        if self.queries_move:
            once += rows * shape.value_dim * method.travelling_bytes_per_element
        self.sums_s = once / hardware.memory_bytes_per_s if config.ring_size > 1 else 0.0
        """Passes over the sums, and packing what travels."""
        self._known: dict[tuple[int, int, str], tuple[float, float]] = {}

    def _sum_bytes_per_element(self, results: int) -> int:
        """A float32 sum is read and written between two passes; the last writes the result in bfloat16.

        Backward the own block's tiles are a part and a half; forward they are read here: `_merge_s` leaves them out.
        """
        if not self.method.parts_wait:
            return 0
        parts = self.config.ring_size + (0.5 if self.backward else 0)
        passes = math.ceil(parts / max(waiting_bytes(4 * results) / (2 * results), 1))
        return 8 * (passes - 1) + 2 + (0 if self.backward else self.method.merge_bytes_per_element)

    def of(self, ring_rank: int, owner: int, part: str = "tile") -> tuple[float, float]:
        """(kernel, merge) of the tiles that `ring_rank` computes with the block of `owner`.

        part: `tile` for all of them; `opening` or `rest` of those that are computed in two parts.
        """
        key = (*self.tokens.kind(ring_rank, owner), part)
        if key not in self._known:
            kernel_s = merge_s = 0.0
            tiles: Sequence[Tile] = self.tokens.tiles(*key[:2])
            if part != "tile":
                tiles = halved(tiles, self.config.least_rows_to_cut)[part == "rest"]
            for tile in tiles:
                query_len, kv_len = tile.q.stop - tile.q.start, tile.kv.stop - tile.kv.start
                kernel_s += self._kernel_s(query_len, kv_len, tile.window == CAUSAL)
                merge_s += self._merge_s(query_len, own=key[0] == key[1])
            self._known[key] = kernel_s, merge_s
        return self._known[key]

    def pass_s(self, ring_rank: int) -> float:
        """Kernels, merges and gradient sums of one rank over all blocks: compute that no layout of the ring avoids."""
        ring = self.config.ring_size
        if self.tokens.balanced:
            visits = [(ring_rank, 1), (0, ring_rank), (ring - 1, ring - 1 - ring_rank)]
        else:
            visits = [(owner, 1) for owner in range(ring)]
        seconds = self.sums_s + sum(times * sum(self.of(ring_rank, owner)) for owner, times in visits if times)
        if self.backward:
            seconds += ring * self.fold_s + (ring - 1) * self.return_s
        if self.opens:
            parts = sum(sum(self.of(ring_rank, ring_rank, part)) for part in ("opening", "rest"))
            seconds += parts - sum(self.of(ring_rank, ring_rank))
        return seconds

    def copy_s(self, rank_bytes: int) -> float:
        """Packing (or unpacking) what one all-to-all exchanges, the rank's own share included."""
        hp = self.config.head_parallel_size
        return 2 * rank_bytes * hp / (hp - 1) / self.hardware.memory_bytes_per_s

    def _kernel_s(self, query_len: int, kv_len: int, causal: bool) -> float:
        shape = self.shape
        area = query_len * kv_len / (2 if causal else 1)
        flops = 2 * shape.batch * area * self.heads * (shape.head_dim + shape.value_dim)
        if self.backward:
            flops *= 2.5
        rate = self.hardware.attention_flops_per_s(query_len, kv_len, causal=causal, backward=self.backward)
        return flops / rate + self.hardware.kernel_overhead_s

    def _merge_s(self, query_len: int, own: bool) -> float:
        """Forward: merging the tile's output; the own tile is the first result. Backward: adding dq."""
        rows = self.shape.batch * query_len * self.heads
        if self.backward:
            moved = rows * self.shape.head_dim * self.method.dq_bytes_per_element
            if self.queries_move and not own:
                moved += rows * self.shape.value_dim * self.method.stand_in_bytes_per_element
        elif own:
            moved = 0
        else:
            moved = rows * self.shape.value_dim * self.method.merge_bytes_per_element
        return moved / self.hardware.memory_bytes_per_s
