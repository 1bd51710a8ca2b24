"""What the tiles of one layout cost a rank: kernel, merge, gradient sums, the copies of the all-to-all."""

from __future__ import annotations

from megatron_loong.config import CAUSAL, LoongConfig
from megatron_loong.planner.hardware import Hardware
from megatron_loong.planner.methods import Method
from megatron_loong.planner.programs import Tokens
from megatron_loong.planner.traffic import AttentionShape, shared_heads


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
        self._known: dict[tuple[int, int], tuple[float, float]] = {}

    def of(self, ring_rank: int, owner: int) -> tuple[float, float]:
        """(kernel, merge) of all tiles that `ring_rank` computes with the block of `owner`."""
        key = self.tokens.kind(ring_rank, owner)
        if key not in self._known:
            kernel_s = merge_s = 0.0
            for tile in self.tokens.tiles(*key):
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
        tiles = sum(times * sum(self.of(ring_rank, owner)) for owner, times in visits if times)
        return tiles + (ring * self.fold_s if self.backward else 0.0)

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
        """Forward: folding the tile's output in; the own tile is the running result. Backward: adding dq."""
        rows = self.shape.batch * query_len * self.heads
        if self.backward:
            moved = rows * self.shape.head_dim * self.method.dq_bytes_per_element
        elif own:
            moved = 0
        else:
            moved = rows * self.shape.value_dim * self.method.merge_bytes_per_element
        return moved / self.hardware.memory_bytes_per_s
