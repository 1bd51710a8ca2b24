"""One drawn case of masks, shapes and layout over gloo ranks, against dense attention with the explicit mask."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from megatron_loong import LoongConfig, attention_2d, build_groups, shard_sequence, unshard_sequence
from megatron_loong.kernels.dropout import keep_mask
from tests.dense import dense_attention, dense_with_gradients, document_mask
from tests.multi_rank.cases import random_inputs

SEED = 0x1234_5678_9ABC_DEF0


@dataclass(frozen=True)
class Case:
    """What is drawn."""

    config: LoongConfig
    documents: tuple[int, ...]
    """Boundaries; (0, S) is one sequence, given without cu_seqlens unless `packed`."""
    packed: bool = False
    kv_documents: tuple[int, ...] | None = None
    """Cross-attention."""
    lengths: tuple[int, ...] | None = None
    """Running sums of the documents' real tokens, behind which they are padded."""
    causal: bool = True
    window: tuple[int, int] | None = None
    batch: int = 1
    heads: int = 4
    kv_heads: int = 4
    v_dim: int = 8
    qkv_format: str = "bshd"
    sink: bool = False
    dead_sink: bool = False
    """The first head's sink is -inf: none."""
    softcap: float = 0.0
    dropout_p: float = 0.0
    tell_lengths: bool = True

    def allowed(self) -> torch.Tensor:
        left, right = self.window or (-1, -1)
        window = (left, 0 if self.causal else right)
        if self.lengths is None:
            return document_mask(self.documents, self.kv_documents or self.documents, window)
        # The mask of the documents without their padding, spread out to where they begin.
        starts = zip(self.documents, itertools.pairwise(self.lengths), strict=False)
        places = [start + token for start, (a, b) in starts for token in range(b - a)]
        allowed = torch.zeros(self.documents[-1], self.documents[-1], dtype=torch.bool)
        allowed[torch.tensor(places)[:, None], places] = document_mask(self.lengths, self.lengths, window)
        return allowed

    def boundaries(self) -> Any:
        """`cu_seqlens` of queries; None for one sequence."""
        if not self.packed:
            return None
        return torch.tensor(self.documents if self.lengths is None else [self.lengths, self.documents]).int()

    def options(self) -> dict[str, Any]:
        """Arguments of attention_2d."""
        options: dict[str, Any] = {"causal": self.causal, "window_size": self.window, "softcap": self.softcap}
        if self.packed:
            options["cu_seqlens"] = self.boundaries()
            if self.kv_documents:
                options["cu_seqlens_kv"] = torch.tensor(self.kv_documents, dtype=torch.int32)
        if self.tell_lengths:
            options["seq_len"] = self.documents[-1]
            if self.kv_documents:
                options["kv_seq_len"] = self.kv_documents[-1]
        if self.dropout_p:
            options |= {"dropout_p": self.dropout_p, "dropout_seed": SEED}
        return options


def run_case(rank: int, case: Case, tolerance: float = 1e-12) -> int:
    """Compare out, dq, dk, dv and dsink; returns the number of comparisons."""
    groups = build_groups(case.config, range(case.config.context_parallel_size))
    if groups.cp_rank is None:
        return 0
    try:
        return _compare(rank, case, groups, tolerance)
    finally:
        groups.destroy()


def _compare(rank: int, case: Case, groups: Any, tolerance: float) -> int:
    kv_documents = case.kv_documents or case.documents
    seq_len, kv_len = case.documents[-1], kv_documents[-1]
    q, _, _, dout = random_inputs(case.batch, seq_len, case.heads, 1, 8, torch.float64, 1, v_dim=case.v_dim)
    _, k, v, _ = random_inputs(case.batch, kv_len, 1, case.kv_heads, 8, torch.float64, 2, v_dim=case.v_dim)
    sink = torch.linspace(-1, 2, case.heads, dtype=torch.float64) if case.sink else None
    if sink is not None and case.dead_sink:
        sink[0] = -torch.inf
    dense: dict[str, Any] = {"allowed": case.allowed(), "sink": sink, "softcap": case.softcap}
    options = case.options()
    if case.dropout_p:
        places = torch.arange(max(seq_len, kv_len))
        dense["kept"] = keep_mask(
            SEED, case.dropout_p, case.batch, range(case.heads), places[:seq_len], places[:kv_len]
        )
        dense["dropout_p"] = case.dropout_p
    expected = dense_with_gradients(q, k, v, dout, **dense)
    q_boundaries = case.boundaries()
    kv_boundaries = case.kv_documents or q_boundaries if case.packed else None
    local = [shard_sequence(x, groups, 1, cu_seqlens=q_boundaries) for x in (q, dout)]
    local += [shard_sequence(x, groups, 1, cu_seqlens=kv_boundaries) for x in (k, v)]
    q, dout, k, v = (_to_format(x, case.qkv_format).detach().requires_grad_() for x in local)
    leaves = [q, k, v] if sink is None else [q, k, v, sink.requires_grad_()]
    out = attention_2d(q, k, v, groups, qkv_format=case.qkv_format, softmax_offset=sink, **options)  # type: ignore[arg-type]
    found = [out, *torch.autograd.grad(out, leaves, dout)]
    compared = 0
    for name, x in zip(("out", "dq", "dk", "dv"), found, strict=False):
        boundaries = q_boundaries if name in ("out", "dq") else kv_boundaries
        whole = unshard_sequence(_from_format(x, case.qkv_format), groups, 1, cu_seqlens=boundaries)
        assert whole.shape == expected[name].shape, f"{name}: {list(whole.shape)}, not {list(expected[name].shape)}"
        error = (whole - expected[name]).abs().max().item()
        assert error <= tolerance, f"{name} on rank {rank}: max abs error {error:.1e} > {tolerance:.0e} in {case}"
        compared += 1
    if sink is not None:
        total = sum_over_group(found[-1], groups)
        error = (total - expected["dsink"]).abs().max().item()
        assert error <= tolerance, f"dsink: max abs error {error:.1e} in {case}"
        compared += 1
    return compared


def sum_over_group(x: torch.Tensor, groups: Any) -> torch.Tensor:
    """What Megatron's gradient reduction does for parameters."""
    import torch.distributed as dist

    total = x.detach().clone()
    for name in ("head", "inner", "outer"):
        group = groups.handle(name).process_group
        if group is not None:
            dist.all_reduce(total, group=group)
    return total


def _to_format(x: torch.Tensor, qkv_format: str) -> torch.Tensor:
    return x.transpose(0, 1) if qkv_format == "sbhd" else x.squeeze(0) if qkv_format == "thd" else x


def _from_format(x: torch.Tensor, qkv_format: str) -> torch.Tensor:
    return x.transpose(0, 1) if qkv_format == "sbhd" else x.unsqueeze(0) if qkv_format == "thd" else x


def max_logits_case(rank: int, config: LoongConfig) -> None:
    """The greatest score of each head over the sequence, and the same over documents."""
    groups = build_groups(config, range(config.context_parallel_size))
    if groups.cp_rank is not None:
        for documents in ((0, 37), (0, 5, 6, 30, 37)):
            q, k, v, _ = random_inputs(2, 37, 6, 3, 8, torch.float64)
            case = Case(config, documents)
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) / 8**0.5
            expected = scores.masked_fill(~case.allowed(), -torch.inf).amax((0, 2, 3))
            most = torch.full((6,), -torch.inf)
            q, k, v = (shard_sequence(x, groups, 1, cu_seqlens=documents) for x in (q, k, v))
            attention_2d(q, k, v, groups, cu_seqlens=documents, max_logits=most)
            import torch.distributed as dist

            for name in ("head", "inner", "outer"):
                group = groups.handle(name).process_group
                if group is not None:
                    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
            assert torch.allclose(most.double(), expected, atol=1e-5), (rank, most, expected)
    groups.destroy()


def dropout_replay(rank: int, config: LoongConfig, tokens: int) -> tuple[float, float]:
    """The same seed gives the same bits, another seed others; returns how much is kept and the mean of dv's ones."""
    groups = build_groups(config, range(config.context_parallel_size))
    q, k, v, dout = (shard_sequence(x, groups) for x in random_inputs(1, tokens, 4, 4, 8, torch.float64))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run(seed: int | None) -> list[torch.Tensor]:
        out = attention_2d(*leaves, groups, dropout_p=0.25, dropout_seed=seed)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    first, again, other = run(7), run(7), run(8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(3)
    drawn = run(None)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(drawn, run(None), strict=True)), "drawn from torch's generator"
    # With equal scores and v = 1, an output is the kept share of its row over 1 - p: its mean over many rows is 1.
    flat = attention_2d(
        torch.zeros_like(q), torch.zeros_like(k), torch.ones_like(v), groups, dropout_p=0.25, causal=False
    )
    groups.destroy()
    return float(flat.mean()), float(flat.std())


def windowed_bytes(rank: int, config: LoongConfig, seq_len: int, windows: list[int | None]) -> list[tuple[int, int]]:
    """(forward, backward) bytes that this rank sends for each causal window."""
    from megatron_loong.comm.ledger import count_bytes

    groups = build_groups(config, range(config.context_parallel_size))
    sent = []
    for window in windows:
        q, k, v, dout = (
            shard_sequence(x, groups).requires_grad_() for x in random_inputs(1, seq_len, 2, 2, 8, torch.float32)
        )
        with count_bytes() as forward:
            out = attention_2d(q, k, v, groups, window_size=None if window is None else (window, 0), seq_len=seq_len)
        with count_bytes() as backward:
            torch.autograd.grad(out, (q, k, v), dout)
        sent.append((forward.total_bytes, backward.total_bytes))
    groups.destroy()
    return sent


def latent_case(rank: int, config: LoongConfig, documents: tuple[int, ...]) -> tuple[int, int]:
    """Multi-latent attention with the latent on the ring against dense attention, and (latent, expanded) bytes sent."""
    from megatron_loong.comm.ledger import count_bytes

    heads, nope, rope, value, r, tokens = 8, 6, 4, 5, 12, documents[-1]
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, latent, k_rope = random(1, tokens, heads, nope + rope), random(1, tokens, 1, r), random(1, tokens, 1, rope)
    weight, dout = random(heads, nope + value, r), random(1, tokens, heads, value)

    def expanded(x: torch.Tensor, x_rope: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        up = torch.einsum("bsr,her->bshe", x[:, :, 0], w)
        return torch.cat([up[..., :nope], x_rope.expand(-1, -1, heads, -1)], -1), up[..., nope:]

    leaves = [x.clone().requires_grad_() for x in (q, latent, k_rope, weight)]
    dense_out = dense_attention(leaves[0], *expanded(*leaves[1:]), allowed=document_mask(documents, documents, (-1, 0)))
    right = [dense_out, *torch.autograd.grad(dense_out, leaves, dout)]

    groups = build_groups(config, range(config.context_parallel_size))
    shared = [shard_sequence(x, groups, 1, cu_seqlens=documents) for x in (q, latent, k_rope, dout)]
    leaves = [x.detach().requires_grad_() for x in (*shared[:3], weight)]
    options: dict[str, Any] = {"cu_seqlens": documents, "seq_len": tokens}
    with count_bytes() as of_latent:
        out = attention_2d(*leaves[:3], groups, kv_up_weight=leaves[3], **options)
        found = [out, *torch.autograd.grad(out, leaves, shared[3])]
    with count_bytes() as of_expanded:
        plain = attention_2d(leaves[0], *expanded(*leaves[1:]), groups, **options)
        torch.autograd.grad(plain, leaves, shared[3])
    for name, x, expected in zip(("out", "dq", "dlatent", "dk_rope"), found, right, strict=False):
        error = (unshard_sequence(x, groups, 1, cu_seqlens=documents) - expected).abs().max().item()
        assert error <= 1e-12, f"{name} on rank {rank}: {error:.1e}"
    error = (sum_over_group(found[4], groups) - right[4]).abs().max().item()
    assert error <= 1e-11, f"dweight: {error:.1e}"
    groups.destroy()
    return of_latent.total_bytes, of_expanded.total_bytes
