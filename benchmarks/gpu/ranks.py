"""Several processes, attention over a real process group; they share a GPU where there are fewer than processes.

python -m benchmarks.gpu.ranks --backend gloo [--cpu]
"""

from __future__ import annotations

import faulthandler
import functools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.cuda import nccl

from benchmarks.gpu import child, exact, outcome
from benchmarks.gpu.outcome import CannotRunError, Run
from benchmarks.gpu.simulated import one_rank
from megatron_loong.comm.groups import build_groups
from megatron_loong.config import LoongConfig
from megatron_loong.layout.sharding import token_positions

RANKS = 4
LAYOUTS = [LoongConfig(RANKS), LoongConfig(RANKS, 1, 2), LoongConfig(RANKS, 2), LoongConfig(RANKS, 4)]
#: NCCL that takes several ranks on one device, when asked.
SHARED_BY_NCCL = (2, 30)
#: Of all ranks together.
LIMIT_S = 60.0


def fault(backend: str, device_type: str) -> str | None:
    """Why this backend cannot have these ranks here; None where it can."""
    if backend != "nccl":
        return None
    if device_type != "cuda" or not dist.is_nccl_available():
        return "NCCL needs a CUDA device and a torch that has it"
    if torch.cuda.device_count() < RANKS and nccl.version() < SHARED_BY_NCCL:
        return f"NCCL {nccl.version()} has no two ranks on one device, which takes {SHARED_BY_NCCL} or {RANKS} GPUs"
    return None


def check(run: Run, backend: str) -> None:
    """Attention on four processes that share a device, or have one each, over a process group of this backend."""
    reason = fault(backend, run.device.type)
    if reason is not None:
        raise CannotRunError(reason)
    devices = min(RANKS, torch.cuda.device_count()) if run.device.type == "cuda" else 0
    run.figures |= {"ranks": RANKS, "gpus": devices}
    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    # A server that has imported this file forks them: PyTorch is imported once more, not four times.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__spec__.name])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        shared = backend, run.device.type, Path(folder) / "store", file
        ranks = [context.Process(target=one_of_them, args=(*shared, rank)) for rank in range(RANKS)]
        try:
            for x in ranks:
                x.start()
            end = time.monotonic() + LIMIT_S
            # One that has failed leaves the others waiting for it.
            while any(x.exitcode is None for x in ranks) and not any(x.exitcode for x in ranks):
                assert time.monotonic() < end, f"no end after {LIMIT_S:g} s"
                time.sleep(0.05)
        finally:
            codes = [x.exitcode for x in ranks]
            for x in ranks:
                x.kill()
            if file.exists():
                run.figures["max_error_float64"] = json.loads(file.read_text())
        assert not any(codes), f"exit codes of the ranks: {codes}; see their output above"
        assert len(run.figures["max_error_float64"]) == len(LAYOUTS)


def one_of_them(backend: str, device_type: str, store: Path, file: Path, rank: int) -> None:
    """What each process runs: float64, reference kernel, against one device. `AssertionError` names the layout."""
    faulthandler.dump_traceback_later(LIMIT_S - child.MARGIN_S)
    device = torch.device(device_type)
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    # A store in a file: no port that another could have.
    address = f"file://{store}"
    dist.init_process_group(backend, address, timedelta(seconds=60), world_size=RANKS, rank=rank)
    tensors = exact.inputs(64, (8, 4), (16, 16), torch.float64, device)
    errors: dict[str, float] = {}
    for config in LAYOUTS:
        if rank == 0:
            print(f"{config.describe()} ...", flush=True)
        groups, worst = build_groups(config, range(RANKS)), torch.zeros((), dtype=torch.float64, device=device)
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
        errors[config.describe()] = worst.item()
        if rank == 0:
            outcome.write_json(file, errors)
            print(f"{config.describe()}: ok, largest error {worst.item():.1e}", flush=True)
    dist.destroy_process_group()


def main() -> int:
    """The step."""
    parser = outcome.parser(__doc__)
    parser.add_argument("--backend", required=True, choices=["gloo", "nccl"])
    args = parser.parse_args()
    return outcome.run(functools.partial(check, backend=args.backend), args)


if __name__ == "__main__":
    sys.exit(main())
