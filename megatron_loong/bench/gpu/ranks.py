"""Several processes, attention over a real process group; they share a GPU where there are fewer than processes.

python -m megatron_loong.bench.gpu.ranks --backend gloo [--cpu] [--ranks 4]
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from megatron_loong.bench.gpu import exact
from megatron_loong.bench.gpu.outcome import CannotRunError, main
from megatron_loong.bench.gpu.simulated import one_rank
from megatron_loong.config import LoongConfig
from megatron_loong.sequence.sharding import token_positions
from megatron_loong.topology.groups import build_groups

RANKS = 4
LAYOUTS = [LoongConfig(RANKS), LoongConfig(RANKS, 1, 2), LoongConfig(RANKS, 2), LoongConfig(RANKS, 4)]
#: What NCCL says of two ranks on one device where it does not allow them.
REFUSAL = "Duplicate GPU detected"


def start(backend: str, device: torch.device) -> dict[str, Any]:
    """Attention on four processes that share a device, or have one each, over a process group of this backend."""
    if backend == "nccl" and (device.type != "cuda" or not dist.is_nccl_available()):
        raise CannotRunError("NCCL needs a CUDA device and a torch that has it")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command = [*torchrun, "-m", __spec__.name, "--backend", backend, *(["--cpu"] if device.type == "cpu" else [])]
    # NCCL 2.30 on takes several ranks on one device when asked.
    environment = {**os.environ, "NCCL_MULTI_RANK_GPU_ENABLE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(ended.stdout)
    if ended.returncode and backend == "nccl" and REFUSAL in ended.stdout:
        raise CannotRunError(f"this NCCL ({_nccl_version()}) does not allow several ranks on one device")
    assert ended.returncode == 0, f"torchrun ended with {ended.returncode}; see above"
    errors = [float(line.split()[-1]) for line in ended.stdout.splitlines() if "largest error" in line]
    assert len(errors) == 1, f"{len(errors)} reports of a largest error, not one"
    version = {"nccl": _nccl_version()} if backend == "nccl" else {}
    devices = min(RANKS, torch.cuda.device_count()) if device.type == "cuda" else 0
    return {
        "ranks": RANKS,
        "gpus": devices,
        "layouts": [x.describe() for x in LAYOUTS],
        "max_error_float64": errors[0],
        **version,
    }


def one_of_them(backend: str, device: torch.device) -> None:
    """What each process runs: float64, reference kernel, against one device. `AssertionError` names the layout."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    rank, worst = dist.get_rank(), torch.zeros((), dtype=torch.float64, device=device)
    tensors = exact.inputs(64, (8, 4), (16, 16), torch.float64, device)
    for config in LAYOUTS:
        groups = build_groups(config, range(RANKS))
        for causal in (True, False):
            right = exact.float64(tensors, causal)
            found = one_rank(groups, tensors, causal, "reference")
            mine = token_positions(config, rank, tensors[0].shape[1]).to(device)
            for name, x in zip(exact.NAMES, found, strict=True):
                error = exact.max_error(x, right[name][:, mine])
                assert error <= 1e-12, f"{name} on rank {rank}, {config.describe()}, {causal=}: {error:.1e} > 1e-12"
                worst.clamp_(min=error)
        groups.destroy()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if rank == 0:
        print(f"largest error of all ranks and layouts {worst.item()}")
    dist.destroy_process_group()


def _nccl_version() -> str:
    return ".".join(str(x) for x in nccl.version())


if __name__ == "__main__":
    arguments = sys.argv[1:]
    place = arguments.index("--backend")
    wanted = arguments[place + 1]
    del arguments[place : place + 2]
    if "RANK" in os.environ:
        one_of_them(wanted, torch.device("cpu" if "--cpu" in arguments else "cuda"))
    else:
        check = functools.partial(start, wanted)
        sys.exit(main(check, arguments))
