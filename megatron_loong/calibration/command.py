"""`megatron-loong calibrate`: a hardware profile measured with this project's own kernels and rings.

    python -m megatron_loong calibrate --output ours.json                        # starts ranks on this machine
    torchrun --nnodes 2 --nproc-per-node 8 ... -m megatron_loong calibrate ...   # a network, too

All ranks compute and send at the same time, as they do in training: what they share, they share here too. Without a
second node, or without a GPU, what cannot be measured is taken from the profile of the GPU, or from the link that can.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_loong.calibration import rates
from megatron_loong.comm.groups import build_groups
from megatron_loong.config import LoongConfig
from megatron_loong.planner.choose import hardware_of_gpu
from megatron_loong.planner.hardware import Curve, Hardware, hardware_to_text

_INSIDE = "MEGATRON_LOONG_CALIBRATING"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="megatron-loong calibrate", description="Measure this machine for `plan`.")
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE", help="where the profile goes: JSON, which is YAML too")
    add("--name", default="calibrated", help="of the profile")
    add("--ranks", type=int, help="ranks to start here, unless a launcher did (default: one a GPU; without GPUs 2)")
    add("--nics-per-node", type=int, help="NICs of a node (default: the GPU's profile, or 1)")
    add("--nic-order", choices=("block", "cyclic"), default="block", help="which ranks share a NIC")
    add("--heads", type=int, help="query heads of a tile (default 16; without GPUs 4)")
    add("--head-dim", type=int, help="their width (default 128; without GPUs 64)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add(
        "--lengths",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="block lengths (default 1K to 16K; without GPUs 128 to 2K)",
    )
    add("--seconds", type=float, default=0.5, help="for one measurement (default 0.5)")
    return parser


def main(argv: list[str]) -> int:
    """Measure, and write the profile on rank 0. 2: what was asked for cannot be."""
    args = parser().parse_args(argv)
    if "RANK" not in os.environ:
        return _start_ranks(args, argv)
    # Ranks of one machine talk by loopback unless told otherwise; its name resolves to that on every machine.
    if os.environ.get(_INSIDE):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        hardware = measure(args)
        if dist.get_rank() == 0:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(hardware_to_text(hardware), encoding="utf-8")
            print(f"megatron_loong: wrote {args.output}: {_summary(hardware)}")
        dist.barrier()
    except ValueError as error:
        print(f"megatron_loong: {error}", file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()
    return 0


def _start_ranks(args: argparse.Namespace, argv: list[str]) -> int:
    ranks = args.ranks or torch.cuda.device_count() or 2
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, _INSIDE: "1"}
    return subprocess.run([*launcher, "-m", "megatron_loong", "calibrate", *argv], env=environment).returncode


def measure(args: argparse.Namespace) -> Hardware:
    """The profile; every rank calls it and gets the same. `ValueError` when ranks and nodes do not fit."""
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if world % local:
        raise ValueError(f"{world} ranks do not fill nodes of {local}; start as many on each")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    named = hardware_of_gpu(torch.cuda.get_device_name()) if gpu else None
    dtype = getattr(torch, args.dtype)
    tile = rates.Tile(device, dtype, args.heads or (16 if gpu else 4), args.head_dim or (128 if gpu else 64))
    tile = rates.crowded(tile, 2 * args.seconds)
    lengths = sorted(args.lengths or ([1 << i for i in range(10, 15)] if gpu else [128, 256, 512, 1024, 2048]))
    curves = {
        (backward, causal): Curve(tuple((n, rates.attention(tile, n, causal, backward, args.seconds)) for n in lengths))
        for backward in (False, True)
        for causal in (False, True)
    }
    matmul = rates.matmul(tile, args.seconds)
    groups = build_groups(LoongConfig(world, 1, local), range(world))
    inside = rates.hop(groups, "inner", tile, args.seconds) if local > 1 else None
    between = rates.hop(groups, "outer", tile, args.seconds) if world > local else None
    groups.destroy()
    nics = args.nics_per_node or (named.nics_per_node if named and local % named.nics_per_node == 0 else 1)
    fallback = inside or between or rates.Link(1e9, 1e-4)
    link, nic = inside or fallback, between or fallback
    how = f"measured: megatron-loong calibrate, {world} ranks on {world // local} node(s), {_machine(device)}"
    return Hardware(
        name=args.name,
        gpus_per_node=local,
        peak_flops_per_s=named.peak_flops_per_s if named else matmul,
        memory_bytes=_memory_bytes(device, local),
        memory_bytes_per_s=rates.memory(tile, args.seconds),
        matmul_flops_per_s=matmul,
        attention_forward=curves[False, False],
        attention_forward_causal=curves[False, True],
        attention_backward=curves[True, False],
        attention_backward_causal=curves[True, True],
        node_link_bytes_per_s=link.bytes_per_s,
        node_link_latency_s=link.latency_s,
        nics_per_node=nics,
        nic_bytes_per_s=nic.bytes_per_s * local / nics,
        nic_latency_s=nic.latency_s,
        nic_order=args.nic_order,
        # On loopback all ranks of a node move their bytes through the same memory and the same cores.
        node_fabric_bytes_per_s=None if gpu else link.bytes_per_s * local,
        message_busy_s=link.busy_s,
        node_link_busy_s_per_byte=link.busy_s_per_byte,
        nic_busy_s_per_byte=nic.busy_s_per_byte,
        kernel_overhead_s=rates.overhead(tile, args.seconds),
        dtype_bytes=tile.dtype.itemsize,
        sources={
            "all": how,
            "nic_bytes_per_s": how if between else "not measured (one node): taken from the link inside it",
            "peak_flops_per_s": "data sheet of the GPU" if named else "the best matrix product measured",
        },
    )


def _memory_bytes(device: torch.device, local: int) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def _summary(hardware: Hardware) -> str:
    forward, backward = hardware.attention_forward.points[-1], hardware.attention_backward.points[-1]
    return (
        f"attention {forward[1] / 1e9:.4g} and {backward[1] / 1e9:.4g} GFLOP/s forward and backward at {forward[0]} "
        f"tokens, {hardware.node_link_bytes_per_s / 1e6:.4g} MB/s a rank inside a node, "
        f"{hardware.nic_bytes_per_s / 1e6:.4g} MB/s a NIC, tile overhead {1e6 * hardware.kernel_overhead_s:.0f} us"
    )
