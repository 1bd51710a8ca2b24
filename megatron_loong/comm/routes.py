"""Which way the blocks of a communicator travel."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_loong.comm.transport import Direct, HostMemory, PinnedMemory, Staged, Transport
from megatron_loong.topology.groups import GroupHandle


def transport_for(handle: GroupHandle, device: torch.device) -> Transport:
    """How blocks on `device` travel in a communicator: the same object for all its life."""
    key = f"transport of {device}"
    if key not in handle.kept:
        handle.kept[key] = _chosen(handle, device)
    return handle.kept[key]


def _chosen(handle: GroupHandle, device: torch.device) -> Transport:
    group = handle.process_group
    assert group is not None, f"a group of one has nobody to talk to ({handle.name})"
    if isinstance(group, Transport):
        return group
    # Such as "cpu:gloo,cuda:nccl": a group may have a backend for each kind of device.
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    backend = backends.get(device.type, "gloo")
    wire = Direct(group, backend)
    return Staged(wire, _host_memory(device)) if _must_be_staged(backend, device) else wire


def _must_be_staged(backend: str, device: torch.device) -> bool:
    return backend == "gloo" and device.type != "cpu"


def _host_memory(device: torch.device) -> HostMemory:
    if device.type != "cuda":
        raise NotImplementedError(f"gloo cannot send tensors on {device.type}; staging is written for CUDA")
    return PinnedMemory()
