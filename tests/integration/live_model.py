"""Live bytes of Megatron's GPTModel over one training step on the CPU. A program and its caller, and no tests.

`measure(cases)` starts the ranks once and runs every case on them: model, Megatron's DDP and optimizer, forward,
backward and optimizer step, under `LiveBytes`. A case is a `MemoryCase`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULT = "megatron_loong live bytes: "


@dataclass(frozen=True)
class MemoryCase:
    """One model, layout and set of switches."""

    num_layers: int = 2
    hidden_size: int = 64
    ffn_hidden_size: int = 192
    num_attention_heads: int = 4
    num_query_groups: int = 2
    vocab_size: int = 512
    seq_len: int = 256
    micro_batch_size: int = 1
    cp: int = 1
    tp: int = 1
    head_parallel_size: int = 1
    bf16: bool = True
    recompute: bool = False
    selective_checkpoint: bool = False
    keep_exchange: bool = False
    tiled_loss: int = 0
    tiled_mlp: int = 0
    offload_activations: bool = False
    offload_attention: bool = False
    distributed_optimizer: bool = False
    optimizer_instances: int = 1


def measure(cases: list[MemoryCase], world_size: int, timeout_s: float = 240) -> list[dict[str, Any]]:
    """What rank 0 measured of each case: bytes of states, peak of forward and backward, peak of the optimizer step."""
    repository = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "LIVE_MODEL_STORE": str(Path(folder) / "store"),
            "WORLD_SIZE": str(world_size),
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(repository), os.environ.get("PYTHONPATH")])),
        }
        command = [sys.executable, __file__, json.dumps([dataclasses.asdict(case) for case in cases])]
        logs = [Path(folder) / f"{rank}.log" for rank in range(world_size)]
        ranks = []
        try:
            for rank, log in enumerate(logs):
                with log.open("w") as output:
                    env = {**shared, "RANK": str(rank)}
                    ranks.append(subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT))
            failed = [rank for rank, process in enumerate(ranks) if process.wait(timeout_s)]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if failed:
            raise RuntimeError(f"rank {failed[0]} failed:\n{logs[failed[0]].read_text()[-4000:]}")
        text = logs[0].read_text()
    return [json.loads(line.removeprefix(RESULT)) for line in text.splitlines() if line.startswith(RESULT)]


def _main(cases: list[MemoryCase]) -> None:
    from megatron_loong.integration import cpu_mode

    cpu_mode.enable(allow_with_gpu=True)
    import torch
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{os.environ['LIVE_MODEL_STORE']}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    for case in cases:
        result = _measure_case(case)
        if rank == 0:
            print(f"\n{RESULT}{json.dumps(result)}", flush=True)
    dist.destroy_process_group()


def _measure_case(case: MemoryCase) -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from benchmarks.live_bytes import LiveBytes
    from megatron_loong.integration import install, uninstall

    install(_options(case))
    try:
        parallel_state.initialize_model_parallel(
            case.tp,
            context_parallel_size=case.cp,
            num_distributed_optimizer_instances=case.optimizer_instances,
        )
        model_parallel_cuda_manual_seed(1)
        with LiveBytes() as live, _host_copies_do_not_count(live):
            model, optimizer = _model_and_optimizer(case)
            for _ in range(2):  # Adam's states exist from the second step on
                states = live.live_bytes
                live.reset_peak()
                _forward_backward(case, model)
                activations, where = live.peak_bytes, live.at_peak
                live.reset_peak()
                optimizer.step()
                optimizer.zero_grad()
                model.zero_grad_buffer()
        return {
            "states_bytes": states,
            "peak_bytes": activations,
            "at_peak": where,
            "optimizer_peak_bytes": live.peak_bytes,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
    finally:
        parallel_state.destroy_model_parallel()
        uninstall()


@contextlib.contextmanager
def _host_copies_do_not_count(live: Any) -> Iterator[None]:
    """On a CPU the host copies of an offload are CPU tensors like all others; on a GPU they would not be there."""
    from megatron_loong.recompute import offload

    to_host = offload._Parcel._to_host

    def uncounted(self: Any, x: Any) -> Any:
        with live.paused():
            return to_host(self, x)

    offload._Parcel._to_host = uncounted  # type: ignore[method-assign]
    try:
        yield
    finally:
        offload._Parcel._to_host = to_host  # type: ignore[method-assign]


def _options(case: MemoryCase) -> dict[str, Any]:
    options: dict[str, Any] = {
        "loong_tiled_loss": case.tiled_loss,
        "loong_tiled_mlp": case.tiled_mlp,
        "loong_offload_activations": case.offload_activations,
    }
    if case.cp > 1:
        options |= {"context_parallel_impl": "loong", "loong_head_parallel_size": case.head_parallel_size}
        if case.selective_checkpoint:
            options |= {
                "loong_selective_checkpoint": "all",
                "loong_keep_exchange": "all" if case.keep_exchange else "off",
                "loong_offload_attention": case.offload_attention,
            }
    return options


def _model_and_optimizer(case: MemoryCase) -> tuple[Any, Any]:
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=case.num_layers,
        hidden_size=case.hidden_size,
        ffn_hidden_size=case.ffn_hidden_size,
        num_attention_heads=case.num_attention_heads,
        num_query_groups=case.num_query_groups,
        context_parallel_size=case.cp,
        tensor_model_parallel_size=case.tp,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        use_cpu_initialization=True,
        bf16=case.bf16,
        params_dtype=torch.bfloat16 if case.bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if case.bf16 else torch.float32,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        recompute_granularity="full" if case.recompute else None,
        recompute_method="uniform" if case.recompute else None,
        recompute_num_layers=1 if case.recompute else None,
    )
    model: Any = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=case.vocab_size,
        max_sequence_length=case.seq_len,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    if case.bf16:
        model = Float16Module(config, model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=case.distributed_optimizer,
        num_distributed_optimizer_instances=case.optimizer_instances,
        overlap_grad_reduce=False,
    )
    model = DistributedDataParallel(config, ddp, model)
    model.train()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            bf16=case.bf16,
            params_dtype=torch.bfloat16 if case.bf16 else torch.float32,
            use_distributed_optimizer=case.distributed_optimizer,
        ),
        [model],
    )
    return model, optimizer


def _forward_backward(case: MemoryCase, model: Any) -> None:
    import torch

    tokens = case.seq_len // case.cp
    ids = torch.randint(0, case.vocab_size, (case.micro_batch_size, tokens))
    positions = torch.arange(tokens).expand(case.micro_batch_size, -1)
    loss = model(input_ids=ids, position_ids=positions, attention_mask=None, labels=ids)
    loss.float().mean().backward()
    model.finish_grad_sync()


if __name__ == "__main__":
    from megatron_loong.kernels import cpu_flash

    # As on GPUs: the copies that are made to compute half precision in float32 are this processor's alone.
    cpu_flash.operator_dtype = lambda dtype: dtype
    _main([MemoryCase(**values) for values in json.loads(sys.argv[1])])
