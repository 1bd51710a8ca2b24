"""Adapters of the rivals that run without a GPU. Their code is used as installed; only the groups are handed to it."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch

from benchmarks.rivals.flash_attn_stand_in import flash_attn_func, install_stand_in
from benchmarks.rivals.interface import (
    Contestant,
    GroupCache,
    Shape,
    contiguous_positions,
    zigzag_positions,
)
from megatron_loong.kernels.cpu_flash import flash_forward


def absent(*modules: str) -> str | None:
    """None when all of these modules can be imported, else which cannot."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed (requirements/bench.txt)" if missing else None


def without_hugging_face_adapters() -> None:
    """ring-flash-attn's adapter for Hugging Face does not import with transformers 5; nothing else of it needs that."""
    adapters: Any = ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules.setdefault(adapters.__name__, adapters)


class RingFlashAttn(Contestant):
    """zhuzilin/ring-flash-attention: one zigzag ring over all ranks."""

    def __init__(self, world_size: int) -> None:
        super().__init__("ring-flash-attn zigzag", "ring-flash-attn", world_size)
        self._group: Any = None
        self._function: Any = None

    def why_not(self, shape: Shape) -> str | None:
        """Not installed."""
        return absent("ring_flash_attn")

    def set_up(self, groups: GroupCache, shape: Shape) -> None:
        """The inner ring of our single ring."""
        install_stand_in()
        without_hugging_face_adapters()
        from ring_flash_attn import zigzag_ring_flash_attn_func

        self._function = zigzag_ring_flash_attn_func
        self._group = groups.get(1).handle("inner").process_group

    def positions(self, rank: int, seq_len: int) -> torch.Tensor:
        """Zigzag over the ring."""
        return zigzag_positions(rank, self.world_size, seq_len)

    def apply(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Its public function."""
        return self._function(q, k, v, causal=True, group=self._group)


class YunchangUSP(Contestant):
    """feifeibear/long-context-attention: Ulysses x zigzag ring (USP). `ulysses_first`: all-to-all in the node."""

    def __init__(self, world_size: int, ulysses: int, ulysses_first: bool = True) -> None:
        where = "" if ulysses_first else ", ring first"
        name = f"yunchang USP u{ulysses} ring{world_size // ulysses}{where}"
        super().__init__(name, "yunchang", world_size)
        self.ulysses, self.placement = ulysses, "head_first" if ulysses_first else "context_first"
        self._layer: Any = None

    def why_not(self, shape: Shape) -> str | None:
        """Heads that do not divide, or not installed."""
        if shape.heads % self.ulysses or shape.kv_heads % self.ulysses:
            return f"ulysses {self.ulysses} must divide {shape.heads} heads and {shape.kv_heads} KV heads"
        return absent("yunchang")

    def set_up(self, groups: GroupCache, shape: Shape) -> None:
        """Its layer takes the groups from a global at construction."""
        install_stand_in()
        from yunchang import LongContextAttention
        from yunchang.globals import PROCESS_GROUP

        mine = groups.get(self.ulysses, placement=self.placement)
        PROCESS_GROUP.ULYSSES_PG = mine.handle("head").process_group
        PROCESS_GROUP.RING_PG = mine.handle("inner").process_group
        self._layer = LongContextAttention(ring_impl_type="zigzag")

    def positions(self, rank: int, seq_len: int) -> torch.Tensor:
        """Zigzag over the ring, cut again over the Ulysses ranks."""
        ring = self.world_size // self.ulysses
        if self.placement == "head_first":
            ring_rank, head_rank = divmod(rank, self.ulysses)
        else:
            head_rank, ring_rank = divmod(rank, ring)
        return zigzag_positions(ring_rank, ring, seq_len).chunk(self.ulysses)[head_rank]

    def apply(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Its layer."""
        return self._layer(q, k, v, causal=True)


class YunchangUlysses(Contestant):
    """yunchang's Ulysses alone."""

    def __init__(self, world_size: int) -> None:
        super().__init__(f"yunchang Ulysses u{world_size}", "yunchang", world_size)
        self._layer: Any = None

    def why_not(self, shape: Shape) -> str | None:
        """Heads that do not divide, or not installed."""
        if shape.heads % self.world_size or shape.kv_heads % self.world_size:
            return f"{self.world_size} ranks must divide {shape.heads} heads and {shape.kv_heads} KV heads"
        return absent("yunchang")

    def set_up(self, groups: GroupCache, shape: Shape) -> None:
        """The head group over all ranks."""
        install_stand_in()
        from yunchang import UlyssesAttention

        self._layer = UlyssesAttention(groups.get(self.world_size).handle("head").process_group)
        self._layer.attn_fn = flash_attn_func

    def positions(self, rank: int, seq_len: int) -> torch.Tensor:
        """Contiguous."""
        return contiguous_positions(rank, self.world_size, seq_len)

    def apply(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Its layer."""
        return self._layer(q, k, v, causal=True)


class DeepSpeedUlysses(Contestant):
    """DeepSpeed's DistributedAttention; its Hugging Face class where there are fewer KV heads than ranks."""

    def __init__(self, world_size: int) -> None:
        super().__init__(f"DeepSpeed Ulysses u{world_size}", "deepspeed", world_size)
        self._layer: Any = None
        self._replicates = False
        self._position_ids = torch.empty(0)

    def why_not(self, shape: Shape) -> str | None:
        """Heads that do not divide, or not installed."""
        n = self.world_size
        if shape.heads % n or (shape.kv_heads % n and n % shape.kv_heads):
            return f"{n} ranks must divide {shape.heads} heads, and {shape.kv_heads} KV heads divide or be divided"
        return absent("deepspeed", "hjson", *(["transformers"] if shape.kv_heads < n else []))

    def set_up(self, groups: GroupCache, shape: Shape) -> None:
        """Its own communication object over the world that is there already."""
        import deepspeed.comm

        group = groups.get(self.world_size).handle("head").process_group
        if not deepspeed.comm.is_initialized():
            deepspeed.comm.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)
        self._replicates = shape.kv_heads < self.world_size
        if not self._replicates:
            from deepspeed.sequence.layer import DistributedAttention

            self._layer = DistributedAttention(_causal, group, scatter_idx=2, gather_idx=1)
            return
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        local = shape.seq_len // self.world_size
        self._layer = UlyssesSPAttentionHF(
            _causal_hf,
            shape.batch,
            shape.heads,
            shape.head_dim,
            shape.kv_heads,
            1,
            group,
            local_seq_length=local,
            global_seq_length=shape.seq_len,
        )
        self._position_ids = torch.arange(local).expand(shape.batch, -1).contiguous()

    def positions(self, rank: int, seq_len: int) -> torch.Tensor:
        """Contiguous."""
        return contiguous_positions(rank, self.world_size, seq_len)

    def apply(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Its layer."""
        if not self._replicates:
            return self._layer(q, k, v, 0)
        inputs = [x.transpose(1, 2) for x in (q, k, v)]
        out, _ = self._layer(self._layer, *inputs, None, position_ids=self._position_ids)
        return out.view(q.shape)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    return flash_attn_func(q, k, v, causal=True)


def _causal_hf(_module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
    """[b, heads, s, d] -> ([b, s, heads, d], no weights)."""
    out, _lse = flash_forward(q, k, v, is_causal=True)
    return out.transpose(1, 2), None
