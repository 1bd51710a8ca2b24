"""Named nodes, and nodes read from files.

Every number here has its published source beside it; nothing here was measured by this project.
Curves are over block length in tokens, head width 128, bf16. How links fall short of their line rate is published
less often than the line rate: two ratios are used for all profiles, `NVLINK_ACHIEVED` and `NIC_ACHIEVED`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from megatron_loong.planner.hardware import CURVES, Curve, Hardware

#: 376-380 of 450 GB/s in one direction between two H100: NVIDIA/nccl issue #1264, p2pBandwidthLatencyTest.
NVLINK_ACHIEVED = 380 / 450
#: Of an HDR port in large messages: calculon-ai/calculon, systems/a100_80g.json (network 25 GB/s, efficiency 0.9).
NIC_ACHIEVED = 0.9
#: Of HBM in streaming kernels: 2903 of 3350 GB/s device to device on H100, aigatech/vpbenchmarking README.
MEMORY_ACHIEVED = 2903 / 3350

#: Of PCIe in large copies: the same file (mem2, 32 GB/s, efficiency 0.95).
PCIE_ACHIEVED = 0.95

_GIB = 1 << 30
_MAMF = "stas00/ml-engineering, compute/accelerator, table of maximum achievable matmul FLOPS (BF16)"
_MAGI = (
    "MagiAttention v1.1 kernel benchmark, {kernel}, heads 64:8, read off "
    "assets/magi_attn/exp/kernel/{gpu}/{{full,causal}}_mask/{{fwd,bwd}}/flops_report.png"
)
_FA2 = (
    "FlashAttention-2 (arXiv 2307.08691): forward + backward together from assets/flash2_a100_fwd_bwd_benchmark.png "
    "(A100, head dim 128), split by the abstract's 73% of peak forward and 63% backward"
)


def _tera(**points: float) -> Curve:
    """`k1=558` is 558e12 at 1024 tokens; `h1` is half of that length."""
    lengths = {"h1": 512, "k1": 1024, "k2": 2048, "k4": 4096, "k8": 8192, "k16": 16384, "k32": 32768}
    return Curve(tuple((lengths[name], rate * 1e12) for name, rate in points.items()))


#: TFLOP/s of forward and backward together; 203 at 16K is what 73% and 63% of 312 come to (3.5 / (1/228 + 2.5/196.5)).
_A100_BOTH = _tera(h1=151, k1=172, k2=187, k4=196, k8=201, k16=203)
_A100_BOTH_CAUSAL = _tera(h1=99, k1=133, k2=155, k4=173, k8=182, k16=189)
_FA2_FORWARD, _FA2_BACKWARD = 0.73 * 312 / 203, 0.63 * 312 / 203


def _latency(source: str) -> dict[str, str]:
    return {"node_link_latency_s": source, "nic_latency_s": source}


_SHORT_RUNS = (
    "median over published training runs of 2K and 4K tokens on eight GPUs, which attention hardly slows down "
    "({runs}); benchmarks/published.py has them, and a test computes it again"
)
_LATENCY = _latency("calculon-ai/calculon, systems/a100_80g.json: 10 us in the node, 20 us between nodes")

A100 = Hardware(
    name="a100",
    gpus_per_node=8,
    peak_flops_per_s=312e12,
    memory_bytes=80 * _GIB,
    memory_bytes_per_s=2039e9 * MEMORY_ACHIEVED,
    matmul_flops_per_s=271.2e12,
    attention_forward=_A100_BOTH.scaled(_FA2_FORWARD),
    attention_forward_causal=_A100_BOTH_CAUSAL.scaled(_FA2_FORWARD),
    attention_backward=_A100_BOTH.scaled(_FA2_BACKWARD),
    attention_backward_causal=_A100_BOTH_CAUSAL.scaled(_FA2_BACKWARD),
    node_link_bytes_per_s=300e9 * NVLINK_ACHIEVED,
    node_link_latency_s=10e-6,
    nics_per_node=4,
    nic_bytes_per_s=25e9 * NIC_ACHIEVED,
    nic_latency_s=20e-6,
    host_link_bytes_per_s=32e9 * PCIE_ACHIEVED,
    training_efficiency=0.77,
    sources={
        "host_memory_bytes": "NVIDIA DGX A100 640GB data sheet: 2 TB",
        "host_link_bytes_per_s": "PCIe 4.0 x16 (NVIDIA A100 data sheet: 64 GB/s both directions), x PCIE_ACHIEVED",
        "training_efficiency": _SHORT_RUNS.format(runs="InternEvo's and MosaicML llm-foundry's 7B, A100"),
        "peak_flops_per_s": "NVIDIA A100 data sheet: 312 TFLOPS bf16 dense",
        "memory_bytes": "NVIDIA A100 80GB SXM data sheet",
        "memory_bytes_per_s": "NVIDIA A100 80GB SXM data sheet: 2039 GB/s, x MEMORY_ACHIEVED",
        "matmul_flops_per_s": f"{_MAMF}: A100 SXM 271.2",
        "attention": _FA2,
        "node_link_bytes_per_s": "NVIDIA A100 data sheet: NVLink 600 GB/s both directions together, x NVLINK_ACHIEVED",
        "nics_per_node": "LoongTrain (arXiv 2406.18485) section 6.1: four 200 Gb/s HDR InfiniBand ports a node; a "
        "DGX A100 has eight (NVIDIA DGX A100 data sheet): give --nics-per-node 8",
        "nic_bytes_per_s": "200 Gb/s HDR, x NIC_ACHIEVED",
        **_LATENCY,
    },
)

A800 = dataclasses.replace(
    A100,
    name="a800",
    node_link_bytes_per_s=200e9 * NVLINK_ACHIEVED,
    sources={
        **A100.sources,
        "node_link_bytes_per_s": "NVIDIA A800: NVLink 400 GB/s both directions together, x NVLINK_ACHIEVED; all else "
        "as A100",
    },
)

H100 = Hardware(
    name="h100",
    gpus_per_node=8,
    peak_flops_per_s=989e12,
    memory_bytes=80 * _GIB,
    memory_bytes_per_s=2903e9,
    matmul_flops_per_s=794.5e12,
    attention_forward=_tera(k1=558, k2=672, k4=678, k8=673, k16=687, k32=702),
    attention_forward_causal=_tera(k1=283, k2=584, k4=663, k8=657, k16=672, k32=680),
    attention_backward=_tera(k1=335, k2=453, k4=517, k8=556, k16=587, k32=601),
    attention_backward_causal=_tera(k1=208, k2=353, k4=462, k8=517, k16=562, k32=586),
    node_link_bytes_per_s=450e9 * NVLINK_ACHIEVED,
    node_link_latency_s=10e-6,
    nics_per_node=8,
    nic_bytes_per_s=50e9 * NIC_ACHIEVED,
    nic_latency_s=20e-6,
    host_link_bytes_per_s=64e9 * PCIE_ACHIEVED,
    training_efficiency=0.68,
    sources={
        "host_memory_bytes": "NVIDIA DGX H100 and DGX B200 data sheets: 2 TB (B200: up to 4)",
        "host_link_bytes_per_s": "PCIe 5.0 x16 (NVIDIA data sheet: 128 GB/s both directions), x PCIE_ACHIEVED",
        "training_efficiency": _SHORT_RUNS.format(runs="MosaicML llm-foundry's 7B, H100"),
        "peak_flops_per_s": "NVIDIA H100 SXM data sheet: 989 TFLOPS bf16 dense",
        "memory_bytes": "NVIDIA H100 SXM data sheet",
        "memory_bytes_per_s": "aigatech/vpbenchmarking README: 2903 of 3350 GB/s device to device",
        "matmul_flops_per_s": f"{_MAMF}: H100 SXM 794.5",
        "attention": _MAGI.format(kernel="FlashAttention-3", gpu="h100"),
        "node_link_bytes_per_s": "NVIDIA H100 data sheet: NVLink 900 GB/s both directions, x NVLINK_ACHIEVED",
        "nics_per_node": "NVIDIA DGX H100 data sheet: eight 400 Gb/s ConnectX-7 ports for compute",
        "nic_bytes_per_s": "400 Gb/s NDR, x NIC_ACHIEVED",
        **_LATENCY,
    },
)

H800 = dataclasses.replace(
    H100,
    name="h800",
    node_link_bytes_per_s=200e9 * NVLINK_ACHIEVED,
    sources={
        **H100.sources,
        "node_link_bytes_per_s": "DeepSeek-V3 insights (arXiv 2505.09343): NVLink of H800 cut from 900 to 400 GB/s "
        "(both directions), x NVLINK_ACHIEVED; all else as H100",
    },
)

H200 = dataclasses.replace(
    H100,
    name="h200",
    memory_bytes=141 * 10**9,
    memory_bytes_per_s=4800e9 * MEMORY_ACHIEVED,
    sources={
        **H100.sources,
        "memory_bytes": "NVIDIA H200 SXM data sheet: 141 GB",
        "memory_bytes_per_s": "NVIDIA H200 SXM data sheet: 4.8 TB/s, x MEMORY_ACHIEVED; the chip is H100's",
    },
)

B200 = Hardware(
    name="b200",
    gpus_per_node=8,
    peak_flops_per_s=2250e12,
    memory_bytes=180 * 10**9,
    memory_bytes_per_s=8000e9 * MEMORY_ACHIEVED,
    matmul_flops_per_s=1745e12,
    attention_forward=_tera(k1=205, k2=835, k4=1380, k8=1335, k16=1300, k32=1297),
    attention_forward_causal=_tera(k1=101, k2=397, k4=1332, k8=1377, k16=1367, k32=1390),
    attention_backward=_tera(k1=149, k2=440, k4=845, k8=1045, k16=1110, k32=1130),
    attention_backward_causal=_tera(k1=77, k2=248, k4=612, k8=938, k16=1033, k32=1092),
    node_link_bytes_per_s=900e9 * NVLINK_ACHIEVED,
    node_link_latency_s=10e-6,
    nics_per_node=8,
    nic_bytes_per_s=50e9 * NIC_ACHIEVED,
    nic_latency_s=20e-6,
    host_link_bytes_per_s=64e9 * PCIE_ACHIEVED,
    training_efficiency=0.68,
    sources={
        "host_memory_bytes": "NVIDIA DGX H100 and DGX B200 data sheets: 2 TB (B200: up to 4)",
        "host_link_bytes_per_s": "PCIe 5.0 x16 (NVIDIA data sheet: 128 GB/s both directions), x PCIE_ACHIEVED",
        "training_efficiency": "as H100: no bf16 training run of short sequences on B200 was found",
        "peak_flops_per_s": "NVIDIA HGX B200 data sheet: 2.25 PFLOPS bf16 dense",
        "memory_bytes": "NVIDIA DGX B200 data sheet: 1440 GB in eight GPUs",
        "memory_bytes_per_s": "NVIDIA DGX B200 data sheet: 64 TB/s in eight GPUs, x MEMORY_ACHIEVED",
        "matmul_flops_per_s": f"{_MAMF}: B200 SXM 1745",
        "attention": _MAGI.format(kernel="FlashAttention-4", gpu="b200"),
        "node_link_bytes_per_s": "NVIDIA DGX B200 data sheet: NVLink 1.8 TB/s both directions, x NVLINK_ACHIEVED",
        "nics_per_node": "NVIDIA DGX B200 data sheet: eight 400 Gb/s ConnectX-7 ports",
        "nic_bytes_per_s": "400 Gb/s NDR, x NIC_ACHIEVED",
        **_LATENCY,
    },
)

#: Named profiles, the oldest first.
PROFILES: dict[str, Hardware] = {x.name: x for x in (A100, A800, H100, H800, H200, B200)}


def hardware_from_mapping(values: Mapping[str, Any], where: str) -> Hardware:
    """A profile from a mapping; `base: h100` takes what is not given from a named profile.

    Raises `ValueError` naming `where` for an unknown or missing field, and for numbers that cannot be.
    """
    fields = dict(values)
    base = fields.pop("base", None)
    known = {item.name for item in dataclasses.fields(Hardware)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"{where}: no field {', '.join(unknown)}; a hardware profile has {', '.join(sorted(known))}")
    for name in set(CURVES) & set(fields):
        if not isinstance(fields[name], Mapping):
            raise ValueError(f"{where}: {name} must map block lengths to rates, such as {{1024: 1.5e14, 8192: 2e14}}")
        fields[name] = Curve(tuple(sorted((int(length), float(rate)) for length, rate in fields[name].items())))
    if base is not None:
        if base not in PROFILES:
            raise ValueError(f"{where}: base {base!r} is unknown; use one of {', '.join(PROFILES)}")
        return dataclasses.replace(PROFILES[base], **fields)
    required = {f.name for f in dataclasses.fields(Hardware) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - set(fields)):
        raise ValueError(f"{where}: missing {', '.join(missing)}; or write `base:` with one of {', '.join(PROFILES)}")
    return Hardware(**fields)


def load_hardware(name_or_path: str, flag: str = "--hardware") -> Hardware:
    """A named profile, or a profile from a YAML (JSON) file.

    Raises `ValueError`, naming `flag`, when it is neither, and for YAML other than JSON where PyYAML is missing.

    >>> load_hardware("h100").nics_per_node
    8
    """
    if name_or_path.lower() in PROFILES:
        return PROFILES[name_or_path.lower()]
    if not os.path.isfile(name_or_path):
        raise ValueError(
            f"{flag} {name_or_path}: neither a file nor a profile; the profiles are {', '.join(PROFILES)}, and "
            "`python -m megatron_loong calibrate` writes a file for the machine that it runs on"
        )
    with open(name_or_path, encoding="utf-8") as file:
        text = file.read()
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        values = _yaml_mapping(text, f"{flag} {name_or_path}")
    if not isinstance(values, Mapping):
        raise ValueError(f"{flag} {name_or_path}: the file must hold a mapping of hardware fields")
    return hardware_from_mapping(values, f"{flag} {name_or_path}")


def _yaml_mapping(text: str, where: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise ValueError(
            f"{where} is not JSON, and reading other YAML needs PyYAML: pip install pyyaml, "
            "or write the file as JSON (which is YAML too)"
        ) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from None
