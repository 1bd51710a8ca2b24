r"""The longest sequence that layers of Llama-8B's shape train on one GPU, switch by switch, found by trying.

    python scripts/longest_sequence.py --layers 4                 # one GPU: what its allocator says, until it is full
    python scripts/longest_sequence.py --cpu --memory-gb 0.2 ...  # no GPU: live bytes counted, tensors kept small

bf16 parameters and gradients, no optimizer states; the attention is `attention_2d` on one rank.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.live_bytes import LiveBytes
from megatron_loong import LoongConfig, attention_2d, build_groups
from megatron_loong.recompute import selective
from megatron_loong.recompute.offload import Parking, inputs_wait_in
from megatron_loong.recompute.tiled import tiled
from megatron_loong.recompute.tiled_loss import tiled_cross_entropy

#: Each adds to those above it.
STEPS = ("full recomputation", "tiled loss", "tiled MLP", "offloaded inputs", "selective", "selective, offloaded")


class Layer(torch.nn.Module):
    """One layer; tensors are [b, s, hidden]."""

    def __init__(self, args: argparse.Namespace, switches: set[str]) -> None:
        super().__init__()
        self.args, self.switches = args, switches
        self.groups = build_groups(LoongConfig(1), [0])
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(args.hidden) for _ in range(2))
        width = args.hidden // args.heads
        self.qkv = torch.nn.Linear(args.hidden, (args.heads + 2 * args.kv_heads) * width, bias=False)
        self.proj = torch.nn.Linear(args.hidden, args.hidden, bias=False)
        self.up = torch.nn.Linear(args.hidden, 2 * args.ffn, bias=False)
        self.down = torch.nn.Linear(args.ffn, args.hidden, bias=False)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [self.args.heads, self.args.kv_heads, self.args.kv_heads]
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (sum(heads), -1)).split(heads, dim=2)
        with selective.keeping("ring" if self.switches & {"selective", "selective, offloaded"} else "nothing"):
            x = x + self.proj(attention_2d(q, k, v, self.groups).flatten(2))
        normed = self.norms[1](x)
        if "tiled MLP" not in self.switches:
            return x + self.mlp(normed)
        weights = [self.up.weight, self.down.weight]
        return x + tiled(self.mlp, normed.transpose(0, 1), weights, tiles=64).transpose(0, 1)


def train_step(args: argparse.Namespace, switches: set[str], seq_len: int, device: str) -> None:
    """Build, run forward and backward, and let go of everything."""
    torch.manual_seed(0)
    make: Any = {"dtype": torch.bfloat16, "device": device}
    layers = [Layer(args, switches).to(**make) for _ in range(args.layers)]
    head = torch.nn.Parameter(torch.randn(args.vocab, args.hidden, **make) / args.hidden**0.5)
    h = torch.randn(1, seq_len, args.hidden, **make).requires_grad_()
    labels = torch.randint(0, args.vocab, (1, seq_len), device=device)
    stash, inputs = Parking(), Parking()
    for layer in layers:
        park = [stash.lot().park] if "selective, offloaded" in switches else []
        offloads = "offloaded inputs" in switches
        with inputs_wait_in(inputs.lot(), (h,)) if offloads else contextlib.nullcontext():
            h = checkpoint(layer, h, use_reentrant=False, context_fn=lambda park=park: selective.context_fn(*park))
    if "tiled loss" in switches:
        losses = tiled_cross_entropy(h, head, labels)
    else:
        losses = F.cross_entropy((h @ head.t()).float().flatten(0, 1), labels.flatten(), reduction="none")
    losses.mean().backward()


def fits(args: argparse.Namespace, switches: set[str], seq_len: int) -> bool:
    """Whether a step stays within the memory."""
    if args.cpu:
        with LiveBytes() as live:
            train_step(args, switches, seq_len, "cpu")
        return live.peak_bytes <= args.memory_gb * 1e9
    # What the last step left in cycles (checkpoints, hooks, a traceback) would count as this one's.
    gc.collect()
    torch.cuda.empty_cache()
    try:
        train_step(args, switches, seq_len, "cuda")
        return True
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if is_out_of_memory(error):
            return False
        raise


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, PyTorch's or that of cuDNN, cuBLAS or the host, which have no error type of their own.

    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    """
    return bool(re.search(r"out of memory|ALLOC(ATION)?_FAILED|can't allocate memory", str(error)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"layers": 4, "hidden": 4096, "heads": 32, "kv-heads": 8, "ffn": 14336, "vocab": 128256, "step": 4096}
    for name, default in shape.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cpu", action="store_true", help="count live bytes on the CPU, host copies among them")
    parser.add_argument("--memory-gb", type=float, default=1.0, help="with --cpu: how much there is")
    chosen = parser.parse_args()
    for index in range(len(STEPS)):
        low, high = 0, 1
        while fits(chosen, set(STEPS[: index + 1]), high * chosen.step):
            low, high = high, 2 * high
        while high - low > max(1, low // 16):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(chosen, set(STEPS[: index + 1]), middle * chosen.step) else (low, middle)
        print(f"+ {STEPS[index]:24} {low * chosen.step:>12,} tokens", flush=True)
