"""Draw the pictures of docs/: python scripts/docs_pictures.py [FOLDER, default docs/images].

Where a rank stands and which chunks it holds is asked of the package, so a picture cannot disagree with the code.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from megatron_loong import LoongConfig, deal_images, token_positions
from megatron_loong.layout.ranks import coordinates_of, ring_rank_of

HEAD, RING, PALE, INK = "#f2a154", "#1f4e79", "#dfe8f1", "#222222"


def figure(width: float, height: float, title: str) -> tuple[Any, Any]:
    """An empty canvas with equal units in both directions."""
    canvas, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.set_title(title, fontsize=11)
    axes.set_aspect("equal")
    axes.axis("off")
    return canvas, axes


def box(axes: Any, x: float, y: float, text: str, color: str = PALE, width: float = 0.8, height: float = 0.6) -> None:
    """A labelled box around (x, y)."""
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(pyplot.Rectangle(corner, width, height, facecolor=color, edgecolor=INK, linewidth=0.8))
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color=INK)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], color: str, bend: float, both: bool) -> None:
    """An arrow between two points; `bend` is the curvature, `both` gives it two heads."""
    style = {"arrowstyle": "<->" if both else "->", "color": color, "linewidth": 1.6}
    style["connectionstyle"] = f"arc3,rad={bend}"
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def draw_grid(path: Path) -> None:
    """cp 8 = head 2 x ring 4: one row per ring rank, one column per head rank."""
    config = LoongConfig(8, 2)
    canvas, axes = figure(5.2, 4.6, "8 ranks = head parallel 2 x ring 4")
    for rank in range(8):
        place = coordinates_of(config, rank)
        ring = ring_rank_of(config, place)
        box(axes, 2.2 * place.head, -1.3 * ring, f"rank {rank}", width=1.0)
        if place.head == 0:
            arrow(axes, (0.5, -1.3 * ring), (1.7, -1.3 * ring), HEAD, 0, both=True)
        if ring < 3:
            arrow(
                axes, (2.2 * place.head, -1.3 * ring - 0.3), (2.2 * place.head, -1.3 * ring - 1.0), RING, 0, both=False
            )
        else:
            side = -0.5 if place.head == 0 else 0.5
            start = (2.2 * place.head + side, -3.9)
            arrow(axes, start, (start[0], 0.0), RING, 0.35 * (-1 if side < 0 else 1), both=False)
    axes.text(1.1, 0.75, "all-to-all: heads", color=HEAD, ha="center", fontsize=9)
    axes.text(1.1, -4.75, "ring: keys and values", color=RING, ha="center", fontsize=9)
    axes.set_xlim(-1.6, 3.8)
    axes.set_ylim(-5.0, 1.1)
    canvas.savefig(path, dpi=110)


def draw_zigzag(path: Path) -> None:
    """Which rank holds which chunk, contiguous and zigzag, and the causal work of each rank."""
    canvas, axes = figure(7.2, 2.9, "4 ranks: who holds which part of the sequence, and its share of the causal work")
    colors = ["#c6dbef", "#9ecae1", "#fdd0a2", "#fdae6b"]
    for row, layout in enumerate(("contiguous", "zigzag")):
        config = LoongConfig(4, 1, sequence_layout=layout)
        work = []
        for rank in range(4):
            positions = token_positions(config, rank, 8).tolist()
            work.append(sum(position + 1 for position in positions) / 36)
            for position in positions:
                box(axes, position * 0.8, -1.2 * row, f"rank {rank}", colors[rank])
        axes.text(-0.6, -1.2 * row, layout, ha="right", va="center", fontsize=9)
        shares = "  ".join(f"{share:.0%}" for share in work)
        axes.text(6.3, -1.2 * row, f"work: {shares}", ha="left", va="center", fontsize=9)
    axes.set_xlim(-2.2, 9.6)
    axes.set_ylim(-1.8, 0.6)
    canvas.savefig(path, dpi=110)


def draw_double_ring(path: Path) -> None:
    """ring 8 = outer 2 x inner 4: hops of the inner rings, and the hop of all ranks to the other node."""
    config = LoongConfig(8, 1, 4)
    canvas, axes = figure(
        6.6, 3.6, "ring 8 = outer 2 x inner 4: one inner ring per node, every NIC busy at the outer hop"
    )
    for rank in range(8):
        place = coordinates_of(config, rank)
        x, y = 1.6 * place.inner, -1.7 * place.outer
        box(axes, x, y, f"rank {rank}", width=1.0)
        if place.inner < 3:
            arrow(axes, (x + 0.5, y), (x + 1.1, y), RING, 0, both=False)
        else:
            arrow(axes, (x, y + 0.32), (0, y + 0.32), RING, 0.18, both=False)
        if place.outer == 0:
            arrow(axes, (x, y - 0.3), (x, y - 1.4), HEAD, 0, both=True)
    axes.text(-0.75, 0, "node 0", ha="right", va="center", fontsize=9)
    axes.text(-0.75, -1.7, "node 1", ha="right", va="center", fontsize=9)
    axes.text(2.4, 1.15, "inner hops: every step", color=RING, ha="center", fontsize=9)
    axes.text(
        2.4, -2.4, "outer hop: once per round, hidden behind the inner steps", color=HEAD, ha="center", fontsize=9
    )
    axes.set_xlim(-2.0, 6.0)
    axes.set_ylim(-2.7, 1.4)
    canvas.savefig(path, dpi=110)


def draw_placement(path: Path) -> None:
    """Who stands where under three placements: two nodes of four GPUs, head 2 x outer 2 x inner 2."""
    placements = ("head_first", "context_first", "inner-head-outer")
    canvas, axes = figure(7.6, 3.4, "cp 8 = head 2 x ring 4 (outer 2 x inner 2) on two nodes of four GPUs")
    for row, placement in enumerate(placements):
        config = LoongConfig(8, 2, 2, placement)
        for gpu in range(8):
            place = coordinates_of(config, gpu)
            x = gpu * 0.95 + (0.5 if gpu >= 4 else 0)
            color = "#fde3c8" if place.head else PALE
            box(
                axes,
                x,
                -1.0 * row,
                f"head {place.head}\nring {ring_rank_of(config, place)}",
                color,
                width=0.85,
                height=0.75,
            )
        axes.text(-0.7, -1.0 * row, placement, ha="right", va="center", fontsize=9)
    axes.text(1.4, 0.6, "node 0", ha="center", fontsize=9)
    axes.text(5.7, 0.6, "node 1", ha="center", fontsize=9)
    axes.set_xlim(-3.0, 7.8)
    axes.set_ylim(-2.6, 0.9)
    canvas.savefig(path, dpi=110)


def draw_images(path: Path) -> None:
    """Images of three sizes dealt to four ranks, and their rows on the way to the ranks that hold their tokens."""
    config, colors = LoongConfig(4, 2), ["#c6dbef", "#9ecae1", "#fdd0a2", "#fdae6b"]
    sample = (2, -6, 1, -2, 3, -2, 2, -4, 3, -2, -2, 3)  # text, and images by their rows
    images = [-n for n in sample if n < 0]
    deal = deal_images(images, 4)
    canvas, axes = figure(8.4, 3.4, "stage 1: images encoded by four ranks; stage 2: text and images in zigzag")
    holder = {p: rank for rank in range(4) for p in token_positions(config, rank, sum(map(abs, sample))).tolist()}
    left = [2.0 + 8.6 * rank for rank in range(4)]
    for rank in range(4):
        x = left[rank]
        axes.text(x, 11.2, f"rank {rank}", ha="left", va="center", fontsize=9)
        for image in deal.images_of(rank):
            width = images[image] * 1.1
            box(axes, x + width / 2, 9.2, f"image\n{image}", colors[rank], width, 2.0)
            x += width + 0.3
    place, image = 0, 0
    for piece in sample:
        for row in range(abs(piece)):
            box(axes, place + 0.5, 0, str(image) if piece < 0 else "", colors[holder[place]], 1.0, 1.6)
            if piece < 0:
                encoder = deal.encoders[image]
                before = sum(images[i] * 1.1 + 0.3 for i in deal.images_of(encoder) if i < image)
                start = left[encoder] + before + 1.1 * (row + 0.5)
                stays = encoder == holder[place]
                axes.plot(
                    [start, place + 0.5], [8.2, 0.8], color=INK if stays else RING, lw=0.8, ls=":" if stays else "-"
                )
            place += 1
        image += piece < 0
    axes.text(
        16,
        -2.0,
        "color: the rank that holds a token; number: its image; dotted: stays where it is",
        ha="center",
        fontsize=9,
    )
    axes.text(32.5, 4.6, "one all-to-all", color=RING, ha="left", fontsize=9)
    axes.set_xlim(-1, 38)
    axes.set_ylim(-3, 12)
    canvas.savefig(path, dpi=110)


PICTURES = {
    "multimodal_stages.png": draw_images,
    "idea_grid.png": draw_grid,
    "idea_zigzag.png": draw_zigzag,
    "idea_double_ring.png": draw_double_ring,
    "layouts_placement.png": draw_placement,
}


def main() -> int:
    folder = Path(sys.argv[1] if sys.argv[1:] else "docs/images")
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw(folder / name)
        print(folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
