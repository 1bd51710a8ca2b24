"""One policy-gradient step of a GPT on a pack, cut as verl does; a program that builds its configs itself, no tests.

Prints loss and gradient norm. On one rank each document goes through alone, with Megatron's own attention.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import train_without_arguments as base
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_loong import unshard_sequence
from megatron_loong.integration import LoongOptions, install
from tests.integration.foreign_cuts import verl

LENGTHS, ADVANTAGES = (13, 7, 31, 1, 18), (1.5, -0.5, 0.3, 1.0, -1.2)


def log_probs_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of each token's successor: [t]."""
    return logits[0].float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def policy_loss(log_probs: list[torch.Tensor], old: list[torch.Tensor]) -> torch.Tensor:
    """PPO's clipped objective, as a mean over the tokens of each document, then over the documents."""
    losses = []
    for new, before, advantage in zip(log_probs, old, ADVANTAGES, strict=True):
        ratio = (new - before).exp()
        losses.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean())
    return torch.stack(losses).mean()


def main() -> None:
    """One step."""
    rank, cp = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    if cp > 1:
        install(LoongOptions("loong", loong_head_parallel_size=2, loong_pack_layout="per_document"))
    parallel_state.initialize_model_parallel(context_parallel_size=cp)
    model_parallel_cuda_manual_seed(1)
    model = base.build(cp)[0].module
    draw = torch.Generator().manual_seed(2)
    texts = [torch.randint(1, base.VOCABULARY, (n + 1,), generator=draw) for n in LENGTHS]
    old = [torch.randn(n, generator=draw) * 0.05 - 5.5 for n in LENGTHS]
    tokens, targets = [x[:-1] for x in texts], [x[1:] for x in texts]
    if cp == 1:
        alone = [model(x[None], torch.arange(len(x))[None], None) for x in tokens]
        log_probs = [log_probs_of(logits, y) for logits, y in zip(alone, targets, strict=True)]
    else:
        cut_tokens, told = verl(tokens, cp, rank)
        cut_targets, _ = verl(targets, cp, rank)
        positions, _ = verl([torch.arange(len(x)) for x in tokens], cp, rank)
        ends = torch.tensor(told["cu_seqlens_q_padded"], dtype=torch.int32)
        longest = int(ends.diff().max())
        params: Any = PackedSeqParams("thd", ends, ends, ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)
        logits = model(cut_tokens[None], positions[None], None, packed_seq_params=params)
        groups = model.decoder.layers[0].self_attention.core_attention.groups
        whole = unshard_sequence(log_probs_of(logits, cut_targets), groups, dim=0, cu_seqlens=ends)
        starts = itertools.islice(ends.tolist(), len(LENGTHS))
        log_probs = [whole[start : start + n] for start, n in zip(starts, LENGTHS, strict=True)]
    loss = policy_loss(log_probs, old)
    loss.backward()
    total = torch.zeros(())
    for parameter in model.parameters():
        # DDP's gradients are in its buffers, and here without it: each rank has those of its own tokens, to be summed.
        gradient = parameter.main_grad if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient, group=parallel_state.get_context_parallel_group())
        total += gradient.double().square().sum().float()
    print(f"\nloss {float(loss.detach())!r}, gradient norm {float(total.sqrt())!r}", flush=True)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
