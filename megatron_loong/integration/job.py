"""What the planner has to know to answer for `auto`: the hardware, and sizes out of Megatron's arguments."""

from __future__ import annotations

import torch

from megatron_loong.integration.options import LoongOptions
from megatron_loong.planner.choose import Job, hardware_of_gpu
from megatron_loong.planner.hardware import Hardware
from megatron_loong.planner.profiles import load_hardware


def job_of(options: LoongOptions, args: object | None) -> Job | None:
    """The job, or None where the hardware or a size is unknown: then `auto` goes by its rule of thumb.

    `args` are Megatron's, before or after its own validation, which fills in what is None here. `ValueError` when
    --loong-hardware is neither a profile nor a file of one.
    """
    hardware = known_hardware(options.loong_hardware)
    heads, seq_len = getattr(args, "num_attention_heads", None), getattr(args, "seq_length", None)
    head_dim = getattr(args, "kv_channels", None)
    if head_dim is None and heads and getattr(args, "hidden_size", None):
        head_dim = args.hidden_size // heads  # type: ignore[union-attr]
    if hardware is None or not heads or not seq_len or not head_dim:
        return None
    tp = getattr(args, "tensor_model_parallel_size", 1)
    groups = getattr(args, "num_query_groups", None) if getattr(args, "group_query_attention", False) else heads
    return Job(
        hardware,
        seq_len,
        max(1, (groups or heads) // tp),
        head_dim,
        tp,
        getattr(args, "micro_batch_size", None) or 1,
    )


def known_hardware(name: str) -> Hardware | None:
    """The profile or file of that name; for `auto` the profile of this process's GPU, if it has one."""
    if name != "auto":
        return load_hardware(name, "--loong-hardware")
    if not torch.cuda.is_available():
        return None
    return hardware_of_gpu(torch.cuda.get_device_name())
