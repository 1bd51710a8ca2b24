"""Training runs that others have published, and the layouts that they were taken with."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from benchmarks.published_attention import attention_rows
from benchmarks.published_row import SECONDS, Row
from megatron_loong.config import LoongConfig
from megatron_loong.planner.methods import LOONGTRAIN, MEGATRON_CP, OURS, TORCH_CP, ULYSSES, Method
from megatron_loong.planner.model import MODELS, ModelShape

_K, _M = 1 << 10, 1 << 20

#: 40 heads of 128 as in BurstEngine's attention benchmark; layers and MLP are assumed to be those of a Llama-like 14B.
_BURST_14B = ModelShape(40, 5120, 40, 40, 13824, 32000)
_QWEN3_0_6B = ModelShape(28, 1024, 16, 8, 3072, 151936, kv_channels=128)
_GLM_4_5_AIR = ModelShape(46, 4096, 96, 8, 10944, 151552, 128, True, 128, 8, 1408, 1408)
_MIXTRAL_8X22B = ModelShape(56, 6144, 48, 8, 16384, 32768, num_experts=8)
_QWEN2_57B_A14B = ModelShape(28, 3584, 28, 4, 18944, 151936, None, True, 64, 8, 2560, 20480)
_INTERNLM_7B = ModelShape(32, 4096, 32, 32, 11008, 103168)
_MPT_7B = ModelShape(32, 4096, 32, 32, 16384, 50368, gated=False)


class ShortRun(NamedTuple):
    """A training run of short sequences on eight GPUs: what a profile's `training_efficiency` is taken from."""

    hardware: str
    model: ModelShape
    seq_len: int
    micro_batch_size: int
    global_batch_size: int
    recompute: str
    sharded: bool
    tokens_per_gpu_s: float


#: InternEvo, doc/en/train_performance.md (zero1 = 8); llm-foundry, scripts/train/benchmarking/README.md (FSDP).
SHORT_RUNS = (
    ShortRun("a100", _INTERNLM_7B, 2048, 8, 64, "full", False, 3314),
    ShortRun("a100", _INTERNLM_7B, 2048, 2, 64, "none", False, 4103),
    ShortRun("a100", _MPT_7B, 2048, 6, 96, "none", True, 4641),
    ShortRun("a100", _MPT_7B, 4096, 16, 256, "full", True, 3684),
    ShortRun("h100", _MPT_7B, 2048, 6, 48, "none", True, 10643),
    ShortRun("h100", _MPT_7B, 4096, 16, 256, "full", True, 8611),
)


def _loongtrain() -> list[Row]:
    """LoongTrain (arXiv 2406.18485), 32 A100 in 4 nodes, 7B with 8 KV heads, 4M tokens a step. Its public code
    (InternEvo) runs full recomputation unless `selective_checkpoint` is set; the text does not say that it was."""
    study, model = "LoongTrain, 7B-GQA on 32 A100", MODELS["llama2-7b-gqa"]
    rows = [
        (128 * _K, "DeepSpeed-Ulysses", LoongConfig(32, 32), 629.9, ULYSSES),
        (128 * _K, "Megatron-CP", LoongConfig(32, 1), 706.2, MEGATRON_CP),
        (128 * _K, "LoongTrain, HP 8 x CP 4", LoongConfig(32, 8), 838.1, LOONGTRAIN),
        (_M, "DeepSpeed-Ulysses", LoongConfig(32, 32), 0.365, ULYSSES),
        (_M, "LoongTrain, HP 8 x CP 4", LoongConfig(32, 8), 0.448, LOONGTRAIN),
    ]
    return [
        Row(
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
            global_batch_size=4 * _M // seq_len,
            sharded=implementation is not MEGATRON_CP,
        )
        for seq_len, method, config, published, implementation in rows
    ]


def _burst_training() -> list[Row]:
    """BurstEngine's end-to-end measurements, 32 A800 in 4 nodes. All with full recomputation and parameters sharded:
    its evaluation/baselines/InternEvo has `sele_ckpt=0`, `checkpoint=True`, `weight=dict(size=hp_size * cp_size)`."""
    study, model = "BurstEngine, training on 32 A800", MODELS["llama2-7b"]
    rows = [
        (model, "7B MHA", 2 * _M, "DeepSpeed-Ulysses", LoongConfig(32, 32), 70.8),
        (model, "7B MHA", 2 * _M, "LoongTrain double ring", LoongConfig(32, 1, 8), 77.4),
        (model, "7B MHA", 2 * _M, "LoongTrain 2D", LoongConfig(32, 8), 88.0),
        (_BURST_14B, "14B MHA", _M, "LoongTrain 2D", LoongConfig(32, 8), 99.7),
    ]
    return [
        Row(
            study,
            f"{size}, {seq_len // _M}M tokens",
            method,
            "a800",
            config,
            seq_len,
            published,
            "tokens/s",
            ULYSSES if config.ring_size == 1 else LOONGTRAIN,
            model=shape,
            sharded=True,
        )
        for shape, size, seq_len, method, config, published in rows
    ]


def _trl() -> list[Row]:
    """TRL's guide to a million tokens (huggingface/trl #6845, #6846): H100, PyTorch's context parallelism and FSDP2
    over all GPUs, full recomputation with its inputs on the host. cuDNN ran: #6846 corrects the earlier figures."""
    rows = [
        ("Qwen3-8B, 1M", MODELS["qwen3-8b"], 8, _M, 380.0),
        ("Qwen3-8B, 2M", MODELS["qwen3-8b"], 16, 2 * _M, 696.0),
        ("Qwen3-8B, 4M", MODELS["qwen3-8b"], 32, 4 * _M, 1346.0),
        ("Qwen3-32B, 1M", MODELS["qwen3-32b"], 8, _M, 1295.0),
        ("Qwen3-30B-A3B, 1M", MODELS["qwen3-30b-a3b"], 8, _M, 483.0),
        ("Qwen3-0.6B, 1M", _QWEN3_0_6B, 8, _M, 137.0),
        ("Qwen3-0.6B, 4M", _QWEN3_0_6B, 8, 4 * _M, 2135.0),
    ]
    return [
        Row(
            "TRL, training on 8 to 32 H100",
            f"{case} tokens",
            "PyTorch CP",
            "h100, SDPA",
            LoongConfig(gpus, 1),
            seq_len,
            seconds,
            SECONDS,
            TORCH_CP,
            model=model,
            sharded=True,
        )
        for case, model, gpus, seq_len, seconds in rows
    ]


def _nemo() -> list[Row]:
    """NeMo, docs/source/performance/performance_long_sequence.md (container 24.03.01): Llama 2 7B with linear layers in
    fp8 on DGX H100, 4M tokens a step. FLOPs as nemo/utils/flops_formulas.py had them then: of the whole square. The
    kernel is FlashAttention-2: `use_flash_attention` in NeMo-Framework-Launcher's llama2_7b.yaml."""
    rows = [(128, 4, 4, 8, 555), (256, 4, 8, 8, 549), (512, 8, 16, 4, 549), (1024, 8, 32, 4, 536)]
    return [
        Row(
            "NeMo, Llama 2 7B in fp8 on 128 to 1,024 H100",
            f"{length}K tokens",
            f"Megatron-CP, TP {tensor}",
            "h100, FA2, fp8",
            LoongConfig(context, 1),
            length * _K,
            published,
            "TFLOP/s",
            MEGATRON_CP,
            model=MODELS["llama2-7b"],
            recompute="none",
            global_batch_size=4 * _K // length,
            tensor=tensor,
            data=data,
            counts_mask=False,
        )
        for length, tensor, context, data, published in rows
    ]


def _prime_rl() -> list[Row]:
    """prime-rl #2418: GLM-4.5-Air, 64K tokens, FlashAttention-3, 8 x H200, FSDP; only relative to no CP.

    Its ring gathers the keys and values (src/prime_rl/trainer/models/layers/ring_attn.py): every rank's queries are one
    run of the sequence, so that the last rank has the most to do, and nothing is merged.
    """
    gathered = Method("all-gather", merge_bytes_per_element=0, dq_bytes_per_element=0, narrow_gradients=True)
    rows = [(2, 2, 0.92), (2, 1, 0.71), (4, 4, 1.01), (4, 1, 0.68)]
    return [
        Row(
            "prime-rl, GLM-4.5-Air on 8 H200",
            f"CP {context}",
            "ring" if head == 1 else "Ulysses",
            "h200",
            LoongConfig(context, head, sequence_layout="zigzag" if head > 1 else "contiguous"),
            64 * _K,
            published,
            "of CP 1",
            ULYSSES if head > 1 else gathered,
            model=_GLM_4_5_AIR,
            global_batch_size=8,
            data=8 // context,
            sharded=True,
        )
        for context, head, published in rows
    ]


def _single_rows() -> list[Row]:
    """USP (arXiv 2405.07719), abstract; MoE Parallel Folding (arXiv 2504.14960), abstract. Layouts, batch sizes and
    recomputation are assumed: those of the papers are not in the abstracts."""
    mixtral = {"recompute": "none", "global_batch_size": 256, "tensor": 2, "expert": 8}
    usp = Row(
        "USP, Llama 3 8B on 16 A800",
        "208K tokens",
        "USP, head 8 x ring 2",
        "a800",
        LoongConfig(16, 8),
        208 * _K,
        0.47,
        "MFU",
        LOONGTRAIN,
        model=MODELS["llama3-8b"],
    )
    folding = dataclasses.replace(
        usp,
        study="MoE Parallel Folding on H100",
        case="4K tokens",
        method="Mixtral 8x22B, 128 GPUs, TP 2, PP 8 x 7, EP 8",
        hardware="h100",
        config=LoongConfig(1),
        seq_len=4 * _K,
        published=0.493,
        implementation=OURS,
        model=_MIXTRAL_8X22B,
        pipeline=(8, 7),
        data=8,
        **mixtral,
    )
    qwen = dataclasses.replace(
        folding,
        method="Qwen2-57B-A14B, 64 GPUs, TP 2, PP 4 x 7, EP 8",
        published=0.39,
        model=_QWEN2_57B_A14B,
        pipeline=(4, 7),
    )
    return [usp, folding, qwen]


def rows() -> list[Row]:
    """Every published number that the cost model is held against."""
    training = [*_loongtrain(), *_burst_training(), *_trl(), *_nemo(), *_prime_rl(), *_single_rows()]
    return [*training, *attention_rows()]
