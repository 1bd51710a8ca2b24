"""Measurements that others have published, and the layouts that they were taken with."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_loong.config import LoongConfig
from megatron_loong.planner.methods import LOONGTRAIN, MEGATRON_CP, ULYSSES, Method
from megatron_loong.planner.model import MODELS, ModelShape

_K, _M = 1 << 10, 1 << 20


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
    """`TFLOP/s` (per GPU), `tokens/s` (per GPU) or `MFU`."""
    implementation: Method
    passes: tuple[bool, ...] = (False, True)
    """Attention rows: which of forward (False) and backward (True) are timed together."""
    heads: tuple[int, int] = (0, 0)
    """Attention rows: query and KV heads, of width 128."""
    model: ModelShape | None = None
    recompute: str = "full"
    global_batch_size: int = 1


#: 40 heads of 128 as in BurstEngine's attention benchmark; layers and MLP are assumed to be those of a Llama-like 14B.
_BURST_14B = ModelShape(40, 5120, 40, 40, 13824, 32000)


def _loongtrain() -> list[Row]:
    """LoongTrain (arXiv 2406.18485), 32 A100 in 4 nodes, 7B with 8 KV heads, 4M tokens a step."""
    study, model = "LoongTrain, 7B-GQA on 32 A100", MODELS["llama2-7b-gqa"]

    def row(seq_len: int, method: str, config: LoongConfig, published: float, implementation: Method) -> Row:
        selective = implementation is LOONGTRAIN
        return Row(
            study,
            f"{seq_len // _K}K tokens",
            method,
            "a100",
            config,
            seq_len,
            published,
            "MFU" if published < 1 else "tokens/s",
            implementation,
            model=model,
            recompute="selective" if selective else "full",
            global_batch_size=4 * _M // seq_len,
        )

    return [
        row(128 * _K, "DeepSpeed-Ulysses", LoongConfig(32, 32), 629.9, ULYSSES),
        row(128 * _K, "Megatron-CP", LoongConfig(32, 1), 706.2, MEGATRON_CP),
        row(128 * _K, "LoongTrain, HP 8 x CP 4", LoongConfig(32, 8), 838.1, LOONGTRAIN),
        row(_M, "DeepSpeed-Ulysses", LoongConfig(32, 32), 0.365, ULYSSES),
        row(_M, "LoongTrain, HP 8 x CP 4", LoongConfig(32, 8), 0.448, LOONGTRAIN),
    ]


def _burst_training() -> list[Row]:
    """BurstEngine's end-to-end measurements, 32 A800 in 4 nodes."""

    def row(model: ModelShape, size: str, seq_len: int, method: str, config: LoongConfig, published: float) -> Row:
        ulysses = config.ring_size == 1
        return Row(
            "BurstEngine, training on 32 A800",
            f"{size}, {seq_len // _M}M tokens",
            method,
            "a800",
            config,
            seq_len,
            published,
            "tokens/s",
            ULYSSES if ulysses else LOONGTRAIN,
            model=model,
            recompute="full" if ulysses else "selective",
        )

    model = MODELS["llama2-7b"]
    return [
        row(model, "7B MHA", 2 * _M, "DeepSpeed-Ulysses", LoongConfig(32, 32), 70.8),
        row(model, "7B MHA", 2 * _M, "LoongTrain double ring", LoongConfig(32, 1, 8), 77.4),
        row(model, "7B MHA", 2 * _M, "LoongTrain 2D", LoongConfig(32, 8), 88.0),
        row(_BURST_14B, "14B MHA", _M, "LoongTrain 2D", LoongConfig(32, 8), 99.7),
    ]


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


def _magi() -> list[Row]:
    """MagiAttention's distributed benchmark: H100, causal, 8K tokens a GPU, heads 64:8; its layouts are those of
    exps/dist_attn/run_benchmark.py (Ulysses degree 8 where there is a ring too)."""
    gpus = (8, 16, 32, 64)
    double_rings = {8: None, 16: 2, 32: 2, 64: 4}
    published = {
        "Ulysses": ((602, 557, 581, 587), (582, 560, 571, 585)),
        "ring": ((424, 456, 453, 448), (435, 475, 469, 458)),
        "USP": ((594, 590, 595, 587), (572, 570, 575, 572)),
        "LoongTrain": ((595, 588, 582, 590), (567, 549, 547, 561)),
    }
    layouts = {
        "Ulysses": lambda n: (LoongConfig(n, n), ULYSSES),
        "ring": lambda n: (LoongConfig(n, 1), MEGATRON_CP),
        "USP": lambda n: (LoongConfig(n, 8), MEGATRON_CP),
        "LoongTrain": lambda n: (LoongConfig(n, 8, double_rings[n]), LOONGTRAIN),
    }
    rows = []
    for backward, name in ((False, "forward"), (True, "backward")):
        for method, values in published.items():
            for n, value in zip(gpus, values[backward], strict=True):
                config, implementation = layouts[method](n)
                rows.append(
                    Row(
                        "MagiAttention, attention on H100",
                        f"{name}, {n} GPUs",
                        method,
                        "h100",
                        config,
                        8 * _K * n,
                        value,
                        "TFLOP/s",
                        implementation,
                        passes=(backward,),
                        heads=(64, 8),
                    )
                )
    return rows


def rows() -> list[Row]:
    """Every published number that the cost model is held against."""
    return [*_loongtrain(), *_burst_training(), *_burst_attention(), *_magi()]
