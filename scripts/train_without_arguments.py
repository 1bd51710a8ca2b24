# ruff: noqa: E402
"""A GPT over megatron.core alone: a program without Megatron's command line, which builds its configs itself.

torchrun --nproc-per-node 2 scripts/train_without_arguments.py     # on GPUs, or without any on gloo
python scripts/train_without_arguments.py                          # one rank, the same losses
"""

from __future__ import annotations

import inspect
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parents[1]))

from megatron_loong.integration import LoongOptions, cpu_mode, install

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    cpu_mode.enable()  # before Megatron is imported; slow, for trying things out

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank

SEQ_LEN, VOCABULARY, STEPS, MICRO_BATCHES = 64, 256, 3, 2


def build(cp: int) -> tuple[Any, Any, TransformerConfig]:
    """Model, optimizer and config."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=2,
        context_parallel_size=cp,  # as in initialize_model_parallel: here, layers read it
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
    )
    torch.manual_seed(1)
    model: Any = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, SEQ_LEN, position_embedding_type="rope")
    if ON_GPU:
        model = model.cuda()
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3), [model])
    return model, optimizer, config


def batches(device: torch.device) -> Any:
    """Whole sequences, the same on every rank; a real program reads its data here."""
    draw = torch.Generator().manual_seed(2)
    while True:
        text = torch.randint(VOCABULARY, (1, SEQ_LEN + 1), generator=draw).to(device)
        ones = torch.ones(1, SEQ_LEN, device=device)
        yield {
            "tokens": text[:, :-1].contiguous(),
            "labels": text[:, 1:].contiguous(),
            "loss_mask": ones,
            "position_ids": torch.arange(SEQ_LEN, device=device)[None],
        }


def sum_loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Loss sum and number of tokens of this rank, and what to report.

    Three values: Megatron then adds up both over the ranks before it divides. With two, (loss, report), it takes each
    rank's own mean, which is wrong where ranks have different numbers of tokens with loss.
    """
    total, tokens = (losses * loss_mask).sum(), loss_mask.sum().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens])}


def forward_step(data: Any, model: Any) -> Any:
    """One micro-batch: this rank's tokens of it."""
    # From 0.18 on Megatron asks whether context parallelism is hybrid, with no default; before, it does not know.
    hybrid = [False] if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters else []
    cp_group: Any = parallel_state.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(next(data), *hybrid, cp_group=cp_group)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(sum_loss, batch["loss_mask"])


def main() -> None:
    rank, cp = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        if ON_GPU:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if ON_GPU else "gloo")
    if cp > 1:
        install(LoongOptions(context_parallel_impl="loong", loong_head_parallel_size=2))
    parallel_state.initialize_model_parallel(context_parallel_size=cp)
    model_parallel_cuda_manual_seed(1)
    model, optimizer, _ = build(cp)
    data = batches(torch.device("cuda" if ON_GPU else "cpu"))
    step = get_forward_backward_func()
    dp_cp_group: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for number in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = step(
            forward_step_func=forward_step,
            data_iterator=data,
            model=model,
            num_microbatches=MICRO_BATCHES,
            seq_length=SEQ_LEN,
            micro_batch_size=1,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        total = torch.stack([report["lm loss"] for report in reports]).sum(0)
        dist.all_reduce(total, group=dp_cp_group)
        if rank == 0:
            print(f"step {number + 1}: loss {float(total[0] / total[1]):.6f}, gradient norm {norm:.6f}", flush=True)
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
