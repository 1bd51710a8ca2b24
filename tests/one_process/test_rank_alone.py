"""One rank's schedule without its peers: the work is that of the real one, and the efficiency is what it says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import rank_alone
from benchmarks.flops import attention_flops
from benchmarks.local_copies import Copies, LocalCopies, init_world_of_one
from benchmarks.rank_alone import CountingKernel, count, efficiencies, kernel_alone, our_rank, rank_inputs
from benchmarks.rivals import ring_alone
from benchmarks.rivals.interface import Shape
from benchmarks.simulate import simulate
from megatron_loong import LoongConfig
from megatron_loong.comm.groups import LoongGroups
from megatron_loong.kernels.registry import KERNELS

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape(128, 8, 4, 16, torch.bfloat16)
CPU = torch.device("cpu")
LAYOUTS = [LoongConfig(4), LoongConfig(8, 2, 2), LoongConfig(4, 1, 2)]


def layer_flops(shape: Shape) -> int:
    return sum(
        attention_flops(
            shape.batch, shape.heads, shape.head_dim, shape.seq_len, shape.seq_len, causal=True, backward=backward
        )
        for backward in (False, True)
    )


@pytest.mark.parametrize("config", LAYOUTS, ids=LoongConfig.describe)
def test_the_work_is_that_of_the_ring_with_its_peers(config: LoongConfig) -> None:
    """Calls and FLOPs of every rank are those of the same rank among its peers, and add up to the layer's."""

    def among_peers(groups: LoongGroups) -> CountingKernel:
        counting = CountingKernel(KERNELS["cpu_flash"])
        q, k, v, dout = rank_inputs(SHAPE, config.context_parallel_size, CPU)
        apply = our_rank(config, groups.require_cp_rank(), SHAPE, counting, groups)  # type: ignore[arg-type]
        torch.autograd.grad(apply(q, k, v), (q, k, v), dout)
        return counting

    def figures(counted: CountingKernel) -> tuple[int, int, int]:
        return counted.forward_calls, counted.backward_calls, counted.flops

    alone = [figures(count(config, rank, SHAPE, CPU, "auto")) for rank in range(config.context_parallel_size)]
    assert alone == [figures(x) for x in simulate(config, among_peers)]
    assert sum(flops for _, _, flops in alone) == layer_flops(SHAPE)
    assert min(calls for calls, _, _ in alone) >= config.ring_size


def test_numbers_that_are_not_finite_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copies, "receive", lambda self, block: _poison(block))
    with pytest.raises(ArithmeticError, match="not finite"):
        count(LoongConfig(4), 1, SHAPE, CPU, "auto")


def _poison(block: torch.Tensor) -> Any:
    block.view(torch.uint8).fill_(255)  # NaN, whatever the bytes are taken for
    return lambda: None


def test_the_share_of_the_kernel_has_the_mean_of_the_ranks_flops() -> None:
    _, flops = kernel_alone(SHAPE, 4, CPU, KERNELS["cpu_flash"])
    assert 4 * flops == layer_flops(SHAPE)
    with pytest.raises(ValueError, match="--ranks 3: .* 8 heads"):
        kernel_alone(SHAPE, 3, CPU, KERNELS["cpu_flash"])


def test_efficiency_is_a_ratio_of_seconds_per_flop() -> None:
    def lasting(forward_s: float, backward_s: float) -> Any:
        def run() -> tuple[float, float]:
            start = time.perf_counter()
            return start + forward_s, start + forward_s + backward_s

        return run

    alone, rows = efficiencies({"half the work": (lasting(100, 100), 50)}, (lasting(50, 150), 100), 3, 0)
    assert alone.forward_backward_s == pytest.approx(200, rel=1e-3)
    assert rows[0].efficiency == pytest.approx(0.5, rel=1e-3)
    assert rows[0].forward_efficiency == pytest.approx(0.25, rel=1e-3)


def test_a_receive_gets_what_was_sent_and_zeros_for_another_size() -> None:
    copies = Copies()
    copies.send(torch.arange(4.0))
    same, other, wide = torch.empty(2, 2), torch.full((3,), 7.0), torch.full((4,), 7.0, dtype=torch.float64)
    for block in (same, other, wide):
        copies.receive(block)()
    assert same.flatten().tolist() == [0, 1, 2, 3] and not other.any() and not wide.any()
    received, sent = torch.empty(4, dtype=torch.uint8), torch.arange(4, dtype=torch.uint8)
    LocalCopies("head", 0, (0, 1)).all_to_all(received, sent, [2, 2], [2, 2])()
    assert torch.equal(received, sent)


def test_torch_distributed_believes_in_the_world() -> None:
    assert not dist.is_initialized()
    for rank in (2, 5):
        init_world_of_one(rank, 8)
        try:
            group: Any = dist.group.WORLD
            assert (dist.get_rank(group), dist.get_world_size(group)) == (rank, 8)
            sent, received = torch.ones(3), torch.zeros(3)
            operations = [dist.P2POp(dist.isend, sent, (rank + 1) % 8), dist.P2POp(dist.irecv, received, rank - 1)]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            assert torch.equal(sent, received)
        finally:
            dist.destroy_process_group()


def test_transformer_engine_gets_its_module_and_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a look-alike of its module; the real one has not run here."""
    asked: dict[str, Any] = {}

    class DotProductAttention:
        def __init__(self, heads: int, width: int, **options: Any) -> None:
            asked.update(heads=heads, width=width, **options)

        def set_context_parallel_group(
            self, cp_group: Any, cp_global_ranks: list[int], cp_stream: Any, cp_comm_type: str = "p2p"
        ) -> None:
            asked.update(ranks=cp_global_ranks, comm=cp_comm_type)

        def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return (q + k.repeat_interleave(q.shape[2] // k.shape[2], 2)).flatten(2)

    module = SimpleNamespace(DotProductAttention=DotProductAttention)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    init_world_of_one(1, 4)
    try:
        q, k = torch.randn(1, 8, 4, 16), torch.randn(1, 8, 2, 16)
        out = ring_alone._transformer_engine(None)(q, k, k)
    finally:
        dist.destroy_process_group()
    assert torch.equal(out, q + k.repeat_interleave(2, 2))
    wanted = {"heads": 4, "width": 16, "num_gqa_groups": 2, "qkv_format": "bshd", "attn_mask_type": "causal"}
    assert asked == {**wanted, "attention_dropout": 0.0, "ranks": [0, 1, 2, 3], "comm": "p2p"}


def bench_rank(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "bench_rank.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_script_measures_on_a_cpu(tmp_path: Path) -> None:
    done = bench_rank("--cpu", "--rank", "0", "7", "--json", str(tmp_path / "record.json"))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    (shape,) = record["shapes"]
    ours = [row for row in shape["results"] if row["name"].startswith("loong")]
    assert record["device"] == "CPU" and [row["name"] for row in ours] == ["loong rank 0", "loong rank 7"]
    assert shape["worst_efficiency"] == min(row["efficiency"] for row in ours) > 0
    for row in ours:
        expected = row["kernel_s"] / row["forward_backward_s"] * row["flops"] / (sum(x["flops"] for x in ours) / 2)
        assert row["efficiency"] == pytest.approx(expected, rel=0.05)
    assert not shape["left_out"]


def test_rivals_are_measured_or_said_to_be_missing(tmp_path: Path) -> None:
    """Exit code 3 (`bench.gpu.outcome.CANNOT`) where none is installed; ours is measured all the same."""
    done = bench_rank("--cpu", "--rivals", "--rounds", "1", "--json", str(tmp_path / "record.json"))
    record = json.loads((tmp_path / "record.json").read_text())
    here = [x for x in ring_alone.RINGS.values() if importlib.util.find_spec(x[0].split(".")[0])]
    assert done.returncode == (0 if here else 3), done.stderr
    assert [x["shape"].split(", ")[1:3] for x in record["shapes"]] == [["h 16", "g 8"], ["h 8", "g 8"]]
    for shape in record["shapes"]:
        assert len(shape["results"]) == 1 + len(here) and shape["results"][0]["name"] == "loong rank 7"
        assert len(shape["left_out"]) == 1 + len(ring_alone.RINGS) - len(here)
    assert ("no rival could run" in record.get("reason", "")) is not bool(here)


def zigzag_of_equals(ring_rank: int, ranks: int, behind: int = 0) -> Any:
    """Attention of one rank of a zigzag ring whose ranks all have its keys; `behind`: chunks that it forgets."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        half, outs = q.shape[1] // 2, []
        k, v = (torch.cat([x[:, :half]] * ranks + [x[:, half:]] * ranks, 1) for x in (k, v))
        for rows, chunk in ((slice(half), ring_rank), (slice(half, None), 2 * ranks - 1 - ring_rank)):
            seen = slice(min(behind, chunk) * half, (chunk + 1) * half)
            hidden = torch.ones(half, seen.stop - seen.start, dtype=torch.bool).triu(seen.stop - seen.start - half + 1)
            out = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q[:, rows], k[:, seen], v[:, seen])), ~hidden, enable_gqa=True
            )
            outs.append(out.transpose(1, 2))
        return torch.cat(outs, 1)

    return attend


def test_rivals_are_held_to_the_right_answer() -> None:
    shape = replace(SHAPE, dtype=torch.float32)
    for ring_rank in (0, 2, 3):
        assert ring_alone.error_of(zigzag_of_equals(ring_rank, 4), shape, ring_rank, 4, CPU) < 1e-5
        assert ring_alone.error_of(zigzag_of_equals(ring_rank, 4, behind=1), shape, ring_rank, 4, CPU) > 0.02


def test_a_rank_that_fails_leaves_the_results_of_the_others(tmp_path: Path) -> None:
    """Rank 8 of a ring of 8 does not exist."""
    done = bench_rank("--cpu", "--rank", "0", "8", "--json", str(tmp_path / "record.json"))
    assert done.returncode == 1, done.stdout + done.stderr
    (shape,) = json.loads((tmp_path / "record.json").read_text())["shapes"]
    assert [row["name"] for row in shape["results"] if row["name"].startswith("loong")] == ["loong rank 0"]
    assert shape["failed"]["rank 8"].startswith("Traceback") and shape["worst_efficiency"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_script_says_that_there_is_no_gpu() -> None:
    done = bench_rank()
    assert done.returncode == 2 and "no CUDA device here; --cpu" in done.stderr


def test_kernels_are_chosen_for_the_heads_of_a_tile() -> None:
    assert rank_alone.chosen_kernel(SHAPE, 2, CPU, "auto").name == "cpu_flash"
