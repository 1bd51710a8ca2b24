"""InternEvo's double ring, the implementation of the LoongTrain paper, behind yunchang's all-to-all.

It is in no release on the package index: INTERNEVO_PATH names a checkout of InternEvo of 2024-07 or later. Two files
of it are loaded as they are, `utils.py` and `zigzag_ring_flash_attn_with_sliding_window.py` of
`internlm/model/ops/ring_flash_attn`; what they import from the rest of InternEvo is a configuration, which they are
given here.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.rivals.flash_attn_stand_in import _flash_attn_backward, _flash_attn_forward, install_stand_in
from benchmarks.rivals.interface import Contestant, GroupCache, Shape, zigzag_positions
from benchmarks.rivals.others import absent

_FOLDER = "internlm/model/ops/ring_flash_attn"
_FILE = "zigzag_ring_flash_attn_with_sliding_window"
_config = SimpleNamespace(
    parallel=SimpleNamespace(sequence_2D={"window_size": 1}),
    selective_checkpoint=False,
    model=SimpleNamespace(checkpoint=0),
    isp_num_layers=0,
)


class InternEvoDoubleRing(Contestant):
    """Head parallel `ulysses`, inner ring `window`, 1 < window < ring: it sends to itself on a ring of one."""

    def __init__(self, world_size: int, ulysses: int, window: int) -> None:
        name = f"InternEvo double ring u{ulysses} ring{world_size // ulysses} w{window}"
        super().__init__(name, "InternEvo", world_size)
        self.ulysses, self.window = ulysses, window
        self._groups: dict[str, Any] = {}
        self._function: Any = None
        self._exchange: Any = None

    def why_not(self, shape: Shape) -> str | None:
        """Heads that do not divide, or no checkout."""
        if shape.heads % self.ulysses or shape.kv_heads % self.ulysses:
            return f"head parallel {self.ulysses} must divide {shape.heads} heads and {shape.kv_heads} KV heads"
        folder = os.environ.get("INTERNEVO_PATH")
        if folder is None or not (Path(folder) / _FOLDER / f"{_FILE}.py").is_file():
            return f"INTERNEVO_PATH={folder} is not a checkout of InternEvo with {_FOLDER}/{_FILE}.py"
        return absent("yunchang") if self.ulysses > 1 else None

    def set_up(self, groups: GroupCache, shape: Shape) -> None:
        """Our communicators of the same layout; its whole ring is only asked for its size."""
        self._function = _load()
        double = groups.get(self.ulysses, self.window)
        self._groups = {
            "context_group": groups.get(self.ulysses).handle("inner").process_group,
            "inter_window_group": double.handle("outer").process_group,
            "intra_window_group": double.handle("inner").process_group,
            "dkv_inter_window_group": double.handle("outer_dkv").process_group,
            "dkv_intra_window_group": double.handle("inner_dkv").process_group,
        }
        if self.ulysses > 1:
            from yunchang.comm.all_to_all import SeqAllToAll4D

            head = double.handle("head").process_group
            self._exchange = lambda x, scatter, gather: SeqAllToAll4D.apply(head, x, scatter, gather)

    def positions(self, rank: int, seq_len: int) -> torch.Tensor:
        """Zigzag over the ring, cut again over the head group."""
        ring_rank, head_rank = divmod(rank, self.ulysses)
        return zigzag_positions(ring_rank, self.world_size // self.ulysses, seq_len).chunk(self.ulysses)[head_rank]

    def apply(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Its function between two all-to-alls."""
        _config.parallel.sequence_2D["window_size"] = self.window
        if self._exchange is None:
            return self._function(q, k, v, causal=True, **self._groups)
        q, k, v = (self._exchange(x, 2, 1) for x in (q, k, v))
        return self._exchange(self._function(q, k, v, causal=True, **self._groups), 1, 2)


def _old_forward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """flash-attn before 2.6.3 returned eight things."""
    out, lse, _, _ = _flash_attn_forward(*args, **kwargs)
    return out, None, None, None, None, lse, None, None


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


def _load() -> Any:
    """Its public function, with `flash_attn` and `internlm` in place only while its file is imported."""
    install_stand_in()
    package = "internevo_ring"
    if package not in sys.modules:
        context = SimpleNamespace(config=_config, is_forward=True)
        old_flash = _module(
            "flash_attn.flash_attn_interface",
            _flash_attn_forward=_old_forward,
            _flash_attn_backward=_flash_attn_backward,
        )
        while_importing = {
            "flash_attn.flash_attn_interface": old_flash,
            "internlm.core.context.parallel_context": _module("parallel_context", global_context=context),
            "internlm.core.parallel.comm": _module("comm", get_offload_manager=None),
        }
        while_importing |= {name: _module(name) for name in ("internlm", "internlm.core", "internlm.core.context")}
        while_importing["internlm.core.parallel"] = _module("internlm.core.parallel")
        sys.modules[package] = _module(package, __path__=[str(Path(os.environ["INTERNEVO_PATH"]) / _FOLDER)])
        # What the file itself adds to sys.modules would be taken back with the stubs, so it is kept.
        with mock.patch.dict(sys.modules, while_importing):
            loaded = importlib.import_module(f"{package}.{_FILE}")
        sys.modules[f"{package}.{_FILE}"] = loaded
    return sys.modules[f"{package}.{_FILE}"].zigzag_ring_flash_attn_qkvsplited_func_with_sliding_window
