"""What the workers run for images: a small vision-language model, over ranks and on one. Functions f(rank, ...)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from megatron_loong import (
    LoongConfig,
    attention_2d,
    build_groups,
    deal_images,
    join_tokens,
    shard_sequence,
    token_positions,
)
from megatron_loong.comm.ledger import count_bytes
from megatron_loong.multimodal import join
from megatron_loong.multimodal.images import encoder_cost
from tests.dense import dense_attention
from tests.integration import planted

HIDDEN, HEADS, VISION, PIXELS, VOCABULARY, IMAGE_TOKEN = 16, 4, 8, 12, 32, 0


@dataclass(frozen=True)
class Batch:
    """Samples as they are written: a number above 0 is so much text, -n an image of n rows (4 n patches)."""

    samples: tuple[tuple[int, ...], ...]
    packed: bool = False
    """Whether the samples are documents of one pack; else each is a row, padded at its end."""

    @property
    def rows(self) -> list[int]:
        return [-n for sample in self.samples for n in sample if n < 0]

    @property
    def boundaries(self) -> list[int] | None:
        ends = [sum(map(abs, sample)) for sample in self.samples]
        return [sum(ends[:i]) for i in range(len(ends) + 1)] if self.packed else None

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and loss mask, [b, S]."""
        draw = torch.Generator().manual_seed(3)
        parts = [
            [
                torch.zeros(-n, dtype=torch.int64) if n < 0 else torch.randint(1, VOCABULARY, (n,), generator=draw)
                for n in s
            ]
            for s in self.samples
        ]
        whole = [torch.cat(sample) for sample in parts]
        if self.packed:
            whole = [torch.cat(whole)]
        ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=1)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones(len(x)) for x in whole], batch_first=True).double()
        return ids, real * (ids != IMAGE_TOKEN)


class Model(torch.nn.Module):
    """A tower whose patches attend to one another, a projector that joins four, and two layers with mrope."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.patches, self.mix = torch.nn.Linear(PIXELS, VISION), torch.nn.Linear(VISION, 3 * VISION)
        self.projector = torch.nn.Linear(4 * VISION, HIDDEN)
        self.embedding = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(2))
        self.double()

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """[patches, PIXELS] -> [patches / 4, HIDDEN]."""
        x = self.patches(image)
        q, k, v = self.mix(x).chunk(3, -1)
        x = x + (q @ k.t() / math.sqrt(VISION)).softmax(-1) @ v
        return self.projector(x.reshape(-1, 4 * VISION))

    def losses(self, x: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor, attend: Callable[..., Any]) -> Any:
        """Per token [b, s] of embeddings [b, s, h]; positions [3, b, s] (time, height, width)."""
        for layer in self.layers:
            q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in layer(x).chunk(3, -1))
            x = x + attend(rotated(q, positions), rotated(k, positions), v).flatten(-2)
        return functional.cross_entropy((x @ self.embedding.weight.t()).transpose(1, 2), labels, reduction="none")


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """mrope: each pair of channels turns by one of the three positions."""
    pairs = x.shape[-1] // 2
    angles = torch.stack([positions[i % 3] * 0.3**i for i in range(pairs)], -1)[:, :, None].double()
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def whole_batch(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, labels, loss mask [b, S] and positions [3, b, S]: an image stands still in time and moves over its grid."""
    ids, mask = batch.tokens()
    labels = functional.pad(ids[:, 1:], (0, 1), value=1)
    steps = torch.arange(ids.shape[1]).expand_as(ids)
    image = ids == IMAGE_TOKEN
    positions = torch.stack([(steps - image.cumsum(1)), torch.where(image, steps % 3, steps), steps])
    return ids, labels, mask * (labels != IMAGE_TOKEN), positions


def pictures(batch: Batch) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(9)
    return [torch.randn(4 * n, PIXELS, generator=draw, dtype=torch.float64) for n in batch.rows]


def expected(model: Model, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss sum and gradients on one rank: every image encoded, `masked_scatter`, dense attention."""
    ids, labels, mask, positions = whole_batch(batch)
    x = model.embedding(ids)
    rows = [model.encode(image) for image in pictures(batch)]
    if rows:
        x = x.masked_scatter((ids == IMAGE_TOKEN)[..., None], torch.cat(rows))
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    if batch.boundaries:
        document = torch.bucketize(torch.arange(ids.shape[1]), torch.tensor(batch.boundaries[1:]), right=True)
        seen &= document[:, None] == document[None]
    loss = (model.losses(x, positions, labels, lambda q, k, v: dense_attention(q, k, v, allowed=seen)) * mask).sum()
    if loss.requires_grad:  # else all that is left to train is a tower that has no image
        loss.backward()
    return loss.detach(), taken_gradients(model)


def taken_gradients(model: Model) -> dict[str, torch.Tensor]:
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if p.requires_grad
    }


def over_ranks(
    model: Model, batch: Batch, groups: Any, cp_group: Any, blank: bool = False, frozen: Sequence[str] = ()
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same on this rank: own images, own tokens; gradients and loss summed over the ranks."""
    ids, labels, mask, positions = whole_batch(batch)
    cuts: dict[str, Any] = {"cu_seqlens": batch.boundaries}
    deal = deal_images(
        batch.rows, groups.config.context_parallel_size, [encoder_cost(4 * n, VISION) for n in batch.rows]
    )
    own = [model.encode(pictures(batch)[image]) for image in deal.images_of(groups.cp_rank)]
    if not own:
        own = [model.encode(torch.zeros(4, PIXELS).double())[:0] if blank else torch.zeros(0, HIDDEN).double()]
    rows = torch.cat(own)
    text = model.embedding(shard_sequence(ids, groups, 1, **cuts))
    everything_frozen = {"patches", "mix", "projector"} <= set(frozen)
    x = join_tokens(text, rows, ids == IMAGE_TOKEN, deal, groups, cp_group=cp_group, frozen=everything_frozen, **cuts)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not batch.packed:
            return attention_2d(q, k, v, groups, qkv_format="bshd", causal=True, seq_len=ids.shape[1])
        out = attention_2d(q[0], k[0], v[0], groups, qkv_format="thd", causal=True, **cuts)
        return out[None]

    local = (shard_sequence(t, groups, dim, **cuts) for t, dim in ((positions, 2), (labels, 1), (mask, 1)))
    local_positions, local_labels, local_mask = local
    loss = (model.losses(x, local_positions, local_labels, attend) * local_mask).sum()
    loss.backward()
    total, gradients = loss.detach().clone(), taken_gradients(model)
    for tensor in (total, *gradients.values()):
        dist.all_reduce(tensor, group=cp_group)
    return total, gradients


def trains_as_on_one(rank: int, config: LoongConfig, batches: list[Batch], fault: str = "", **options: Any) -> float:
    """Loss and every gradient against one rank's; the greatest difference, relative to each tensor's greatest value."""
    cp = config.context_parallel_size
    groups = build_groups(config, range(cp))
    cp_group = dist.new_group(range(cp)) if cp < dist.get_world_size() else None
    worst = 0.0
    if rank < cp:
        original = join._Exchange.backward
        if fault:
            getattr(planted, fault)()
        try:
            for batch in batches:
                reference, model = Model(), Model()
                for one in (reference, model):
                    for name in options.get("frozen", ()):
                        getattr(one, name).requires_grad_(False)
                loss, gradients = over_ranks(model, batch, groups, cp_group, **options)
                right_loss, right = expected(reference, batch)
                assert gradients.keys() == right.keys()
                for name, found, wanted in (
                    ("loss", loss, right_loss),
                    *((n, gradients[n], right[n]) for n in right),
                ):
                    error = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300))
                    error = 0.0 if bool((found == wanted).all()) else error
                    assert error <= 1e-12, f"{name} on rank {rank} of {batch.samples}: relative error {error:.1e}"
                    worst = max(worst, error)
        finally:
            join._Exchange.backward = original  # type: ignore[method-assign]
    groups.destroy()
    return worst


def bytes_by_formula(rank: int, config: LoongConfig, batch: Batch) -> tuple[int, int, int, int]:
    """(counted, by the formula) of this rank's forward, then of its backward: rows x width x bytes, own ones apart."""
    cp = config.context_parallel_size
    groups = build_groups(config, range(cp))
    cp_group = dist.new_group(range(cp))
    result = (0, 0, 0, 0)
    if rank < cp:
        ids = batch.tokens()[0]
        deal = deal_images(batch.rows, cp)
        rows = torch.randn(deal.rows_of(rank), HIDDEN, requires_grad=True)
        cuts: dict[str, Any] = {"cu_seqlens": batch.boundaries}
        local_ids = shard_sequence(ids, groups, 1, **cuts)
        with count_bytes() as forward:
            x = join_tokens(
                torch.zeros(*local_ids.shape, HIDDEN), rows, ids == IMAGE_TOKEN, deal, groups, cp_group=cp_group, **cuts
            )
        with count_bytes() as backward:
            x.sum().backward()
        assert rows.grad is not None and bool((rows.grad == 1).all()), (
            "each row is at one place, and its gradient is home"
        )
        # Spelled out: who encodes each place's row, and who holds the place.
        encoders = [e for e, n in zip(deal.encoders, batch.rows, strict=True) for _ in range(n)]
        flat = (ids == IMAGE_TOKEN).flatten().nonzero().flatten().tolist()
        holder = {}
        for r in range(cp):
            for p in token_positions(config, r, ids.shape[1], cu_seqlens=batch.boundaries).tolist():
                holder.update({row * ids.shape[1] + p: r for row in range(len(ids))})
        pairs = [(e, holder[place]) for e, place in zip(encoders, flat, strict=True)]
        out = sum(e == rank != h for e, h in pairs) * HIDDEN * 4
        back = sum(h == rank != e for e, h in pairs) * HIDDEN * 4
        result = (forward.total_bytes, out, backward.total_bytes, back)
    groups.destroy()
    return result


def mistakes(rank: int) -> list[str]:
    """What is refused before anything is sent, on every rank alike."""
    groups = build_groups(LoongConfig(8, 2), range(8))
    ids = Batch(((3, -4, 9),)).tokens()[0]
    deal = deal_images([4], 8)
    rows = torch.zeros(deal.rows_of(rank), HIDDEN)
    text = torch.zeros(1, 2, HIDDEN)
    vision = ids == IMAGE_TOKEN
    subset = dist.new_group([0, 1])
    said = []
    for change in (
        {"vision": vision[0]},
        {"vision": torch.zeros_like(vision)},
        {"vision": torch.full_like(ids, 4)},
        {"text": text[:, :1]},
        {"rows": torch.zeros(7, HIDDEN)},
        {"cp_group": subset},
    ):
        given: dict[str, Any] = {"text": text, "rows": rows, "vision": vision, "deal": deal, "groups": groups, **change}
        try:
            join_tokens(**given)
            said.append("accepted")
        except ValueError as error:
            said.append(str(error).split(" ")[0])
    groups.destroy()
    return said
