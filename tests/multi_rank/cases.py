"""What the workers run. Module-level functions f(rank, ...), so that they can be pickled by name."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_loong import LoongConfig, attention_2d, build_groups, shard_sequence, unshard_sequence
from megatron_loong.attention.options import AttentionOptions
from megatron_loong.comm.groups import COMMUNICATORS, GroupHandle, LoongGroups
from megatron_loong.comm.ledger import count_bytes
from tests.dense import dense_with_gradients

NAMES = ("out", "dq", "dk", "dv")


def random_inputs(
    batch: int,
    seq_len: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: int = 0,
    v_dim: int = 0,
) -> tuple[torch.Tensor, ...]:
    """q, k, v, dout in bshd, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    widths = [(heads, head_dim), (kv_heads, head_dim), (kv_heads, v_dim or head_dim), (heads, v_dim or head_dim)]
    return tuple(
        torch.randn(batch, seq_len, n, d, generator=generator, dtype=torch.float64).to(dtype) for n, d in widths
    )


def run_attention(
    inputs: tuple[torch.Tensor, ...], groups: LoongGroups, qkv_format: str = "bshd", **options: Any
) -> dict[str, torch.Tensor]:
    """This rank's out, dq, dk, dv in bshd from full inputs."""
    q, k, v, dout = (shard_sequence(x, groups) for x in inputs)
    if qkv_format == "sbhd":
        q, k, v, dout = (x.transpose(0, 1).contiguous() for x in (q, k, v, dout))
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention_2d(q, k, v, groups, qkv_format=qkv_format, **options)  # type: ignore[arg-type]
    grads = torch.autograd.grad(out, (q, k, v), dout)
    results = dict(zip(NAMES, (out.detach(), *grads), strict=True))
    return {name: x.transpose(0, 1) if qkv_format == "sbhd" else x for name, x in results.items()}


def assert_close(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float, where: str) -> None:
    """Each half of the local tokens apart, so that one bad half cannot hide behind a good one."""
    for name in NAMES:
        halves = zip(results[name].chunk(2, 1), expected[name].chunk(2, 1), strict=True)
        for half, (found, right) in zip(("first", "second"), halves, strict=False):
            assert found.shape == right.shape, f"{name} {where}: shape {list(found.shape)}, not {list(right.shape)}"
            error = (found.double() - right).abs().max().item()
            assert error <= bound, f"{name} {where}, {half} half: max abs error {error:.1e} > {bound:.0e}"


def float64_layout(rank: int, cp: int, hp: int, w: int, placements: list[str], heads: int, formats: list[str]) -> int:
    """Every placement, causal and full, g in {1, 2, h}, against dense attention; returns the number of comparisons."""
    compared = 0
    for placement in placements:
        for layout in ("zigzag", "contiguous"):
            if layout == "contiguous" and placement != placements[0]:
                continue
            # Short own blocks are cut as long ones are in use, or not at all, as short ones are.
            cut = (placements.index(placement) % 2 == 0) == (layout == "zigzag")
            config = LoongConfig(cp, hp, w, placement, layout, 4 if cut else LoongConfig.least_rows_to_cut)
            groups = build_groups(config, range(cp))
            for causal in (True, False):
                for index, kv_heads in enumerate(sorted({1, 2 if heads % 2 == 0 else 1, heads})):
                    if rank >= cp:
                        continue
                    qkv_format = formats[(index + compared) % len(formats)]
                    inputs = random_inputs(2, 4 * cp, heads, kv_heads, 8, torch.float64, seed=compared)
                    expected = dense_with_gradients(*inputs, causal)
                    local = {name: shard_sequence(x, groups) for name, x in expected.items()}
                    results = run_attention(inputs, groups, qkv_format, causal=causal)
                    where = f"on rank {rank} ({config.describe()}, {kv_heads=}, {causal=}, {qkv_format})"
                    assert_close(results, local, 1e-12, where)
                    whole = unshard_sequence(results["out"], groups)
                    assert (whole - expected["out"]).abs().max() <= 1e-12, f"unshard {where}"
                    compared += 1
            groups.destroy()
    return compared


def bytes_sent(rank: int, config: LoongConfig, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Any:
    """(forward bytes, backward bytes) by communicator for (seq_len, heads, kv_heads, head_dim), batch 1."""
    seq_len, heads, kv_heads, head_dim = shape
    groups = build_groups(config, range(config.context_parallel_size))
    result = None
    if groups.cp_rank is not None:
        inputs = random_inputs(1, seq_len, heads, kv_heads, head_dim, dtype)
        q, k, v, dout = (shard_sequence(x, groups).requires_grad_() for x in inputs)
        with count_bytes() as forward:
            out = attention_2d(q, k, v, groups)
        with count_bytes() as backward:
            torch.autograd.grad(out, (q, k, v), dout)
        result = dict(forward.sent_bytes), dict(backward.sent_bytes)
    groups.destroy()
    return result


def replicated_kv_heads(rank: int) -> None:
    """12 query heads, 6 KV heads, hp 4 and 12, 3 KV heads: replicas so that the head group divides them."""
    config = LoongConfig(8, 4, 2)
    groups = build_groups(config, range(8))
    for heads, kv_heads in ((12, 6), (12, 3)):
        inputs = random_inputs(1, 32, heads, kv_heads, 8, torch.float64)
        expected = {n: shard_sequence(x, groups) for n, x in dense_with_gradients(*inputs, True).items()}
        assert_close(run_attention(inputs, groups), expected, 1e-12, f"on rank {rank}, {heads=} {kv_heads=}")
    groups.destroy()


def heads_in_parts(rank: int, config: LoongConfig) -> Any:
    """Parts of the heads against all at once: exact, and as many bytes; cross-attention's two exchanges too."""
    groups = build_groups(config, range(8))
    inputs = random_inputs(2, 64, 16, 8, 8, torch.float64, v_dim=4)
    expected = {n: shard_sequence(x, groups) for n, x in dense_with_gradients(*inputs, True).items()}
    sent = []
    for parts in (1, 2, 4):
        with count_bytes() as ledger:
            results = run_attention(inputs, groups, head_parts=parts)
        assert_close(results, expected, 1e-12, f"on rank {rank} in {parts} parts")
        sent.append(dict(ledger.sent_bytes))
    offset = torch.linspace(-1, 1, 16, dtype=torch.float64)
    one, four = (
        run_attention(inputs, groups, head_parts=parts, softmax_offset=offset, dropout_p=0.2, dropout_seed=1)
        for parts in (1, 4)
    )
    assert_close(four, one, 1e-12, f"on rank {rank}, with what belongs to a head")
    groups.destroy()
    return sent


def dtypes_and_value_width(rank: int, kernel: str) -> None:
    """Loose absolute bounds per dtype; a given softmax_scale; v narrower than k."""
    groups = build_groups(LoongConfig(8, 2, 2), range(8))
    bounds = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 2e-2}
    for dtype, bound in bounds.items():
        inputs = random_inputs(1, 32, 4, 2, 16, dtype, v_dim=8)
        expected = dense_with_gradients(*inputs, True, 0.2)
        local = {name: shard_sequence(x, groups) for name, x in expected.items()}
        results = run_attention(inputs, groups, kernel=kernel, softmax_scale=0.2)
        assert all(x.dtype == dtype for x in results.values())
        assert_close(results, local, bound, f"on rank {rank} in {dtype}")
    groups.destroy()


def scattered_ranks(rank: int, cp_global_ranks: list[int]) -> None:
    """cp_rank is the index into cp_global_ranks, whatever the order; torch sorts the ranks of a group."""
    for placement in ("head_first", "context_first"):
        groups = build_groups(LoongConfig(4, 2, 1, placement), cp_global_ranks)
        if groups.cp_rank is not None:
            assert cp_global_ranks[groups.cp_rank] == rank
            inputs = random_inputs(1, 16, 4, 2, 8, torch.float64)
            expected = {n: shard_sequence(x, groups) for n, x in dense_with_gradients(*inputs, True).items()}
            results = run_attention(inputs, groups)
            assert_close(results, expected, 1e-12, f"on rank {rank}")
            assert torch.equal(unshard_sequence(shard_sequence(inputs[0], groups), groups), inputs[0])
        groups.destroy()


def two_cp_groups(rank: int) -> None:
    """Interleaved groups of four, each with its own data, as under data parallelism."""
    mine = [r for r in range(8) if r % 2 == rank % 2]
    groups = build_groups(LoongConfig(4, 2, 2), mine)
    assert set(groups.handle("inner").global_ranks) <= set(mine)
    inputs = random_inputs(1, 16, 4, 2, 8, torch.float64, seed=rank % 2)
    expected = {n: shard_sequence(x, groups) for n, x in dense_with_gradients(*inputs, True).items()}
    assert_close(run_attention(inputs, groups), expected, 1e-12, f"on rank {rank}")
    groups.destroy()


def rms_error_ratios(
    rank: int,
    config: LoongConfig,
    dtype: torch.dtype,
    plant_bf16_merge: bool,
    gradient_wire: str = "auto",
    kv_heads: int = 4,
) -> dict[str, float]:
    """RMS error against float64, over that of the same kernel on one device with the same inputs."""
    from megatron_loong.kernels import row_ops

    groups = build_groups(config, range(config.context_parallel_size))
    inputs = random_inputs(1, 512, 8, kv_heads, 32, dtype)
    truth = dense_with_gradients(*inputs, True)
    one_device = run_attention(inputs, groups_of_one())
    honest = row_ops.merge_rows

    def bf16_merge(into: row_ops.Tensors, parts: list[row_ops.Tensors]) -> None:
        honest(into, parts)
        for x in into:
            x.copy_(x.bfloat16())

    try:
        if plant_bf16_merge:
            row_ops.merge_rows = bf16_merge
        results = run_attention(inputs, groups, gradient_wire=gradient_wire)
    finally:
        row_ops.merge_rows = honest
    whole = {name: unshard_sequence(x, groups) for name, x in results.items()}
    groups.destroy()
    return {name: (_rms(whole[name], truth[name]) / _rms(one_device[name], truth[name])).item() for name in NAMES}


def _rms(found: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (found.double() - right).square().mean().sqrt()


def groups_of_one() -> LoongGroups:
    """A context-parallel group of one inside a larger world: nothing to communicate, the kernel as it is."""
    handles = {name: GroupHandle(name, (0,), 0, None) for name in COMMUNICATORS}
    return LoongGroups(LoongConfig(), (0,), 0, handles)


def kv_blocks_held(rank: int) -> tuple[int, int]:
    """Most KV buffers alive at any tile besides the rank's own, in a single and in a double ring."""
    import gc

    from megatron_loong.kernels.registry import choose_kernel

    counts = []
    block_bytes = 8 * 2 * (64 // 8) * 2 * 24
    for w in (8, 4):
        groups = build_groups(LoongConfig(8, 1, w), range(8))
        inputs = random_inputs(1, 64, 2, 2, 24, torch.float64)
        most = 0

        class Spy:
            def __init__(self, kernel: Any) -> None:
                self.kernel, self.name = kernel, kernel.name

            def __getattr__(self, name: str) -> Any:
                return getattr(self.kernel, name)

            def forward(self, *args: Any, **options: Any) -> Any:
                nonlocal most
                storages = {
                    x.untyped_storage().data_ptr()
                    for x in gc.get_objects()
                    if type(x) is torch.Tensor and x.untyped_storage().nbytes() == block_bytes
                }
                most = max(most, len(storages) - 1)
                return self.kernel.forward(*args, **options)

        request = AttentionOptions().request(*inputs[:3], groups.config.head_parallel_size)
        q, k, v, _ = (shard_sequence(x, groups) for x in inputs)
        with torch.no_grad():
            attention_2d(q, k, v, groups, kernel=Spy(choose_kernel(request)))  # type: ignore[arg-type]
        counts.append(most)
        groups.destroy()
    return counts[0], counts[1]


def error_message(rank: int, what: str) -> str:
    """The message that this rank gets for a planted mistake."""
    try:
        _make_mistake(rank, what)
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _make_mistake(rank: int, what: str) -> None:
    config = LoongConfig(8, 8)
    if what == "ranks do not fit":
        build_groups(config, range(7))
    elif what == "rank twice":
        build_groups(config, [0, 1, 2, 3, 4, 5, 6, 6])
    elif what == "overlap":
        build_groups(LoongConfig(4), [0, 1, 2, 3] if rank < 5 else [4, 5, 6, 3])
    elif what == "one rank differs":
        build_groups(config, range(7) if rank == 3 else range(8))
    else:
        groups = build_groups(config, range(8))
        heads = 4 if what == "too few heads" else 8
        kv_heads = 3 if what == "groups do not divide" else heads
        q = torch.zeros(1, 4, heads, 8)
        k = torch.zeros(1, 4, kv_heads, 8)
        options: dict[str, Any] = {
            "wrong local length": {"seq_len": 40},
            "window": {"window_size": (-2, 0)},
            "packed without boundaries": {"qkv_format": "thd"},
            "boundaries that fall": {"cu_seqlens": [0, 9, 5, 32]},
            "dropout": {"dropout_p": 1.0, "dropout_seed": 1},
            "sink of another size": {"softmax_offset": torch.zeros(3)},
            "kernel without soft cap": {"softcap": 10.0, "kernel": "cpu_flash"},
            "unknown kernel": {"kernel": "no_such_kernel"},
        }.get(what, {})
        try:
            attention_2d(q, k, k, groups, **options)
        finally:
            groups.destroy()


def still_alive(rank: int) -> int:
    """A collective that only works when nobody is stuck elsewhere."""

    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rank)
    return gathered[rank]


def fails_on_rank_one(rank: int) -> float:
    """For the test of the harness."""
    return 1 / (1 - rank)


def lose_a_peer(rank: int, config: LoongConfig, how: str, timeout_s: float, flight_folder: str) -> str:
    """Rank 2 dies or hangs at its second tile; the others report what they were told and after how long."""
    import datetime
    import signal
    import time

    from megatron_loong.comm.errors import CommunicationError
    from megatron_loong.kernels.registry import choose_kernel

    os.environ["LOONG_FLIGHT_FOLDER"] = flight_folder
    groups = build_groups(config, range(4), timeout=datetime.timedelta(seconds=timeout_s))
    inputs = random_inputs(1, 32, 4, 4, 8, torch.float64)
    kernel, calls = choose_kernel(AttentionOptions().request(*inputs[:3], groups.config.head_parallel_size)), 0

    class Fatal:
        name = kernel.name

        def __getattr__(self, name: str) -> Any:
            return getattr(kernel, name)

        def forward(self, *args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if rank == 2 and calls == 2:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(3 * timeout_s)
            return kernel.forward(*args, **options)

    q, k, v, _ = (shard_sequence(x, groups) for x in inputs)
    start = time.monotonic()
    try:
        for _layer in range(3):  # the rank farthest from the loss notices in the next layer
            attention_2d(q, k, v, groups, kernel=Fatal(), seq_len=32)  # type: ignore[arg-type]
    except CommunicationError as error:
        return f"{time.monotonic() - start:.1f} {error}"
    return "no error"


def lose_a_peer_before(rank: int, config: LoongConfig, timeout_s: float, flight_folder: str) -> str:
    """Rank 2 dies, and the others ask each other for lengths."""
    import datetime
    import signal

    from megatron_loong.comm.errors import CommunicationError
    from megatron_loong.comm.sequence import gather_lengths

    os.environ["LOONG_FLIGHT_FOLDER"] = flight_folder
    groups = build_groups(config, range(4), timeout=datetime.timedelta(seconds=timeout_s))
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        for _ in range(3):
            gather_lengths([4], groups, torch.device("cpu"))
    except CommunicationError as error:
        return f"0 {error}"
    return "0 no error"


def groups_of_one_order(rank: int, config: LoongConfig, cp_groups: list[list[int]]) -> dict[str, tuple[int, ...]]:
    """Members of each of this rank's communicators, after attention over them gave the right result."""
    mine = next(group for group in cp_groups if rank in group)
    groups = build_groups(config, mine)
    inputs = random_inputs(1, 4 * len(mine), 4, 2, 8, torch.float64, seed=min(mine))
    expected = {n: shard_sequence(x, groups) for n, x in dense_with_gradients(*inputs, True).items()}
    assert_close(run_attention(inputs, groups), expected, 1e-12, f"on rank {rank} in {mine}")
    members = {name: handle.global_ranks for name, handle in groups.handles.items()}
    groups.destroy()
    return members


def groups_made_and_released(rank: int, config: LoongConfig) -> tuple[int, int, int]:
    """Number of process groups that torch knows before, with and after ours, made and released three times."""
    import torch.distributed as dist

    table = dist.distributed_c10d._world.pg_map
    before = len(table)
    during = 0
    for _ in range(3):
        groups = build_groups(config, range(8))
        during = len(table)
        groups.destroy()
        groups.destroy()
        with pytest.raises(RuntimeError, match="were destroyed"):
            groups.handle("head")
    return before, during, len(table)


def groups_by_members_alone(rank: int) -> None:
    """Ranks 2 to 5 make groups, release them and make them again; the others never call."""
    members = [2, 3, 4, 5]
    if rank not in members:
        return
    for _ in range(3):
        groups = build_groups(LoongConfig(4, 2, 1), members, local_synchronization=True)
        inputs = random_inputs(1, 16, 4, 2, 8, torch.float64)
        expected = {n: shard_sequence(x, groups) for n, x in dense_with_gradients(*inputs, True).items()}
        assert_close(run_attention(inputs, groups), expected, 1e-12, f"on rank {rank}")
        groups.destroy()
