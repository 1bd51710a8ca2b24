r"""Images dealt to ranks beside every rank encoding all of them: work, time and bytes, forward and backward.

usage: torchrun --nproc-per-node 4 scripts/bench_vision.py [--images 48] [--rounds 5] [--json FILE]

Three ways, one after another in each round: `all` encodes all images on every rank, as Megatron's context parallelism
does; `gather` deals them by number and gathers all embeddings on every rank (backward: reduce-scatter), as
Megatron-Bridge does for Qwen3-VL; `dealt` is `deal_images` and `join_tokens`. Their gradients are compared. FLOPs are
counted by torch; a rank's time is processor time, which other jobs on the machine lengthen less than they do the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from megatron_loong import LoongConfig, build_groups, deal_images, join_tokens, shard_sequence
from megatron_loong.comm.ledger import count_bytes
from megatron_loong.multimodal.images import encoder_cost

HIDDEN, WIDTH, LAYERS, HEADS, PIXELS = 256, 128, 2, 4, 588
#: Patches that a merger joins to one row.
MERGED = 4


class Tower(torch.nn.Module):
    """A small vision transformer and a projector; one image at a time, each of its own size."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = torch.nn.Linear(PIXELS, WIDTH)
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0, batch_first=True)
            for _ in range(LAYERS)
        )
        self.projector = torch.nn.Linear(MERGED * WIDTH, HIDDEN)

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        """[patches, PIXELS] each, to the rows of all of them."""
        encoded = [torch.zeros(0, HIDDEN)]
        for image in images:
            x = self.patches(image)[None]
            for layer in self.layers:
                x = layer(x)
            encoded.append(self.projector(x.reshape(-1, MERGED * WIDTH)))
        return torch.cat(encoded)


class Gathered(torch.autograd.Function):
    """All ranks' rows on every rank, padded to the most that a rank has; the backward sums and cuts."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.counts, ctx.most = counts, max(counts)
        padded = torch.nn.functional.pad(rows, (0, 0, 0, ctx.most - len(rows)))
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole, rank = gradients[0].clone(), dist.get_rank()
        dist.all_reduce(whole)  # gloo has no reduce-scatter; its bytes are counted as one
        return whole.split(ctx.counts)[rank], None


def draw_batch(images: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Images of 16 to 576 patches, and where their rows stand: bool [1, S] with as much text between."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    sizes = [MERGED * round(4 * 36 ** draw.random()) for _ in range(images)]
    pieces = itertools.chain.from_iterable((draw.randint(0, n // 2), -(n // MERGED)) for n in sizes)
    vision = torch.cat([torch.full((abs(n),), n < 0) for n in pieces])
    missing = -len(vision) % (2 * dist.get_world_size())
    pictures = [torch.randn(n, PIXELS, generator=generator) for n in sizes]
    return pictures, torch.nn.functional.pad(vision, (0, missing))[None]


def ways(groups: Any, pictures: list[torch.Tensor], vision: torch.Tensor) -> dict[str, Callable[[Tower], torch.Tensor]]:
    """By name, what makes this rank's tokens [1, s, h] of the pictures."""
    cp, rank = groups.config.context_parallel_size, groups.cp_rank
    rows = [len(x) // MERGED for x in pictures]
    deal = deal_images(rows, cp, [encoder_cost(len(x), WIDTH) for x in pictures])
    bounds = [i * len(pictures) // cp for i in range(cp + 1)]
    text = torch.zeros(*vision.shape, HIDDEN)

    def merged(all_rows: torch.Tensor) -> torch.Tensor:
        return shard_sequence(text.masked_scatter(vision[..., None], all_rows), groups)

    def gather(tower: Tower) -> torch.Tensor:
        counts = [sum(rows[a:b]) for a, b in itertools.pairwise(bounds)]
        return merged(Gathered.apply(tower(pictures[bounds[rank] : bounds[rank + 1]]), counts))  # type: ignore[arg-type]

    def dealt(tower: Tower) -> torch.Tensor:
        own = tower([pictures[i] for i in deal.images_of(rank)])
        return join_tokens(shard_sequence(text, groups), own, vision, deal, groups)

    return {"all": lambda tower: merged(tower(pictures)), "gather": gather, "dealt": dealt}


def one_pass(way: Callable[[Tower], torch.Tensor], tower: Tower) -> None:
    """Forward and backward."""
    tower.zero_grad()
    x = way(tower)
    (x * torch.sin(x.detach() + 1)).sum().backward()


def maxima(values: list[float]) -> list[float]:
    """Over the ranks."""
    most = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.tolist()


def gradient_of_all(tower: Tower) -> torch.Tensor:
    """Summed over the ranks, as data parallelism does."""
    flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in tower.parameters()])
    dist.all_reduce(flat)
    return flat


def print_table(rows: list[dict[str, Any]]) -> None:
    """In Markdown."""
    print("| way | FLOPs of the busiest rank, of `all` | processor time, of `all` | sent, all ranks, MiB | gradient |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| `{row['way']}` | {row['flops_of_all']:.3f} | {row['time_of_all']:.2f} | {row['mib']:.2f} "
            f"| {row['gradient_error']:.0e} |"
        )


def main() -> None:
    """Run all ways once a round, and print the table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cp = dist.get_world_size()
    groups = build_groups(LoongConfig(cp, 2 if cp % 2 == 0 else 1), range(cp))
    pictures, vision = draw_batch(args.images, seed=3)
    torch.manual_seed(0)
    tower = Tower()
    each = ways(groups, pictures, vision)
    flops, error, sent = {}, {}, {}
    expected = None
    for name, way in each.items():
        with FlopCounterMode(display=False) as counter, count_bytes() as ledger:
            one_pass(way, tower)
        flops[name] = float(counter.get_total_flops())
        sent[name] = ledger.total_bytes
        gradient = gradient_of_all(tower)
        expected = gradient if expected is None else expected
        error[name] = float((gradient - expected).abs().max() / expected.abs().max())
    seconds: dict[str, list[float]] = {name: [] for name in each}
    for _ in range(args.rounds):
        for name, way in each.items():
            dist.barrier()
            start = time.process_time()
            one_pass(way, tower)
            seconds[name] += maxima([time.process_time() - start])
    total_rows = int(vision.sum())
    most_flops = dict(zip(flops, maxima(list(flops.values())), strict=True))
    exchanged = torch.tensor(sent["dealt"], dtype=torch.int64)
    dist.all_reduce(exchanged)
    whole = 2 * (cp - 1) * total_rows * HIDDEN * 4  # to all others, forward and backward
    volume = {"all": 0, "gather": whole, "dealt": int(exchanged)}
    rows = [
        {
            "way": name,
            "flops_of_all": most_flops[name] / most_flops["all"],
            "time_of_all": statistics.median(a / b for a, b in zip(seconds[name], seconds["all"], strict=True)),
            "mib": volume[name] / 2**20,
            "gradient_error": error[name],
        }
        for name in each
    ]
    if dist.get_rank() == 0:
        print(f"{args.images} images of {sum(map(len, pictures))} patches in all, {total_rows} rows, {cp} ranks")
        print_table(rows)
        if args.json:
            args.json.write_text(json.dumps({"ranks": cp, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    groups.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
