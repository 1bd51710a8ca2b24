"""What a published measurement is, and the hardware that it was taken on: a profile with the kernel of the study."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_loong.config import LoongConfig
from megatron_loong.planner.hardware import Curve, Hardware
from megatron_loong.planner.methods import Method
from megatron_loong.planner.model import ModelShape
from megatron_loong.planner.profiles import PROFILES

SECONDS = "s a step"


@dataclass(frozen=True)
class Row:
    """One published number. Attention rows have no model; training rows have one."""

    study: str
    case: str
    """Rows of one study and case are held against each other."""
    method: str
    hardware: str
    config: LoongConfig
    seq_len: int
    published: float
    unit: str
    """`TFLOP/s` (per GPU), `tokens/s` (per GPU), `MFU`, `s a step`, or `of CP 1`: tokens/s relative to no CP."""
    implementation: Method
    passes: tuple[bool, ...] = (False, True)
    """Attention rows: which of forward (False) and backward (True) are timed together."""
    heads: tuple[int, int] = (0, 0)
    """Attention rows: query and KV heads, of width 128."""
    documents: float = 1.0
    """Attention rows: what documents that do not see one another leave of the causal mask."""
    model: ModelShape | None = None
    recompute: str = "full"
    global_batch_size: int = 1
    tensor: int = 1
    pipeline: tuple[int, int] = (1, 1)
    """Stages, and chunks of layers of each (interleaved 1F1B)."""
    data: int = 1
    expert: int = 1
    sharded: bool = False
    """Whether parameters and gradients are sharded too (ZeRO-3, FSDP)."""
    counts_mask: bool = True
    """Whether the study's FLOPs are those of a causal mask; else of the whole square."""

    def speed(self, value: float) -> float:
        """More is faster."""
        return 1 / value if self.unit == SECONDS else value


# ---- hardware: profiles with the kernel that a study ran ------------------------------------------------------

_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def _kernel(base: Hardware, full: Sequence[float], causal: Sequence[float], *backward: Sequence[float]) -> Hardware:
    """Forward, full and causal, then backward: TFLOP/s at 1K to 32K tokens."""
    names = ("attention_forward", "attention_forward_causal", "attention_backward", "attention_backward_causal")
    curves = (Curve(tuple((n, r * 1e12) for n, r in zip(_LENGTHS, c, strict=True))) for c in (full, causal, *backward))
    return dataclasses.replace(base, **dict(zip(names, curves, strict=True)))


#: MagiAttention v1.1 kernel benchmark, as in profiles.py: its series `fa2`, `sdpa` (PyTorch's, which takes cuDNN on
#: Hopper) and, on B200, `cudnn` (TransformerEngine's call of it).
_H100_FA2 = _kernel(
    PROFILES["h100"],
    (316, 361, 376, 372, 372, 377),
    (188, 272, 328, 350, 363, 367),
    (224, 277, 308, 319, 331, 335),
    (140, 210, 266, 301, 322, 330),
)
_H100_SDPA = _kernel(
    PROFILES["h100"],
    (533, 629, 626, 608, 608, 617),
    (325, 474, 562, 591, 588, 607),
    (315, 436, 488, 503, 521, 534),
    (180, 305, 403, 460, 498, 518),
)
B200_CUDNN = _kernel(
    PROFILES["b200"],
    (248, 922, 1280, 1318, 1315, 1328),
    (130, 532, 918, 1148, 1240, 1288),
    (364, 625, 808, 860, 870, 864),
    (178, 335, 504, 642, 710, 738),
)
#: fp8 matrix products: what makes the model give the 768 TFLOP/s that NeMo's table has at 4K tokens; a test computes it
#: again.
H100_FP8_FLOPS_PER_S = 1817e12
HARDWARE = {
    **PROFILES,
    "h100, SDPA": _H100_SDPA,
    "h100, FA2, fp8": dataclasses.replace(_H100_FA2, matmul_flops_per_s=H100_FP8_FLOPS_PER_S),
    "b200, cuDNN": B200_CUDNN,
}
