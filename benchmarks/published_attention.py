"""Measurements of attention alone that others have published."""

from __future__ import annotations

import dataclasses

from benchmarks.published_row import B200_CUDNN, HARDWARE, Row
from megatron_loong.config import LoongConfig
from megatron_loong.planner.hardware import Curve
from megatron_loong.planner.methods import LOONGTRAIN, MEGATRON_CP, ULYSSES

_K, _M = 1 << 10, 1 << 20


def _burst_attention() -> list[Row]:
    """BurstEngine's attention alone, forward and backward together, 32 A800, 40 heads."""
    published = {
        "LoongTrain double ring": (LoongConfig(32, 1, 8), LOONGTRAIN, (99, 145, 160, 141)),
        "LoongTrain 2D": (LoongConfig(32, 8), LOONGTRAIN, (140, 167, 175, 182)),
        "Megatron-CP": (LoongConfig(32, 1), MEGATRON_CP, (53, 105)),
    }
    return [
        Row(
            "BurstEngine, attention on 32 A800",
            f"{seq_len // _K}K tokens",
            method,
            "a800",
            config,
            seq_len,
            value,
            "TFLOP/s",
            implementation,
            heads=(40, 40),
        )
        for method, (config, implementation, values) in published.items()
        for seq_len, value in zip((128 * _K, 256 * _K, 512 * _K, _M), values, strict=False)
    ]


def _magi(
    gpu: str, hardware: str, tokens: int, published: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[Row]:
    """MagiAttention's distributed benchmark: causal, heads 64:8, forward and backward on 8, 16, 32 and 64 GPUs; its
    layouts are those of exps/dist_attn/run_benchmark.py (Ulysses degree 8 where there is a ring too)."""
    double_rings = {8: None, 16: 2, 32: 2, 64: 4}
    layouts = {
        "Ulysses": lambda n: (LoongConfig(n, n), ULYSSES),
        "ring": lambda n: (LoongConfig(n, 1), MEGATRON_CP),
        "USP": lambda n: (LoongConfig(n, 8), MEGATRON_CP),
        "LoongTrain": lambda n: (LoongConfig(n, 8, double_rings[n]), LOONGTRAIN),
    }
    rows = []
    for backward, name in ((False, "forward"), (True, "backward")):
        for method, values in published.items():
            for n, value in zip((8, 16, 32, 64), values[backward], strict=True):
                config, implementation = layouts[method](n)
                rows.append(
                    Row(
                        f"MagiAttention, attention on {gpu}",
                        f"{name}, {n} GPUs",
                        method,
                        hardware,
                        config,
                        tokens * n,
                        value,
                        "TFLOP/s",
                        implementation,
                        passes=(backward,),
                        heads=(64, 8),
                    )
                )
    return rows


_MAGI_H100 = {
    "Ulysses": ((602, 557, 581, 587), (582, 560, 571, 585)),
    "ring": ((424, 456, 453, 448), (435, 475, 469, 458)),
    "USP": ((594, 590, 595, 587), (572, 570, 575, 572)),
    "LoongTrain": ((595, 588, 582, 590), (567, 549, 547, 561)),
}
#: The same benchmark's causal documents, `cudnn`, at 32K tokens.
_B200_DOCUMENTS = (1020e12, 508e12)
#: Read off the figures, +-10.
_MAGI_B200 = {
    "Ulysses": ((1167, 1001, 975, 970), (821, 827, 859, 867)),
    "ring": ((1141, 1136, 1134, 1141), (758, 768, 772, 772)),
    "USP": ((1150, 1210, 1263, 1294), (815, 857, 894, 910)),
    "LoongTrain": ((1138, 1218, 1244, 1294), (815, 843, 867, 898)),
}
#: Documents by length, (longest, how many): exps/dist_attn/benchmark/datasets/default/doc_length_distribution.csv.
_DOCUMENTS = (
    (10, 30254),
    (50, 391188),
    (100, 699596),
    (200, 1377757),
    (500, 3794735),
    (1024, 3316785),
    (2048, 2106566),
    (4096, 988525),
    (8192, 410002),
    (16384, 173574),
    (32768, 115007),
    (65536, 18428),
    (131072, 22513),
    (196608, 18284),
)


def documents_share(seq_len: int) -> float:
    """What documents of at most a quarter of the pack leave of its causal mask; each is in the middle of its class."""
    middles = [((low + high) / 2, n) for (low, _), (high, n) in zip(((0, 0), *_DOCUMENTS), _DOCUMENTS, strict=False)]
    kept = [(min(length, seq_len / 4), n) for length, n in middles]
    return sum(n * length**2 for length, n in kept) / sum(n * length for length, n in kept) / seq_len


def _magi_documents() -> list[Row]:
    """The same benchmark with documents, B200, all-to-all only: the simulation of rings knows no packs."""
    rows = []
    for n, forward, backward in ((8, 678, 595), (64, 261, 403)):
        share = documents_share(16 * _K * n)
        for is_backward, value in ((False, forward), (True, backward)):
            row = Row(
                "MagiAttention, documents on B200",
                f"{'backward' if is_backward else 'forward'}, {n} GPUs",
                "Ulysses",
                f"b200, documents of {n} GPUs",
                LoongConfig(n, n),
                16 * _K * n,
                value,
                "TFLOP/s",
                ULYSSES,
                passes=(is_backward,),
                heads=(64, 8),
                documents=share,
            )
            rows.append(row)
        # One tile over the pack, which takes as long as its documents do.
        curves = [Curve(((1 << 30, rate / share),)) for rate in _B200_DOCUMENTS]
        HARDWARE[f"b200, documents of {n} GPUs"] = dataclasses.replace(
            B200_CUDNN, attention_forward_causal=curves[0], attention_backward_causal=curves[1]
        )
    return rows


def attention_rows() -> list[Row]:
    """BurstEngine's and MagiAttention's."""
    magi = [*_magi("H100", "h100", 8 * _K, _MAGI_H100), *_magi("B200", "b200, cuDNN", 16 * _K, _MAGI_B200)]
    return [*_burst_attention(), *magi, *_magi_documents()]
