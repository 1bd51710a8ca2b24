"""Pictures of a plan; everything in them is modelled. matplotlib is an optional dependency: pip install '.[plot]'."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_loong.config import divisors
from megatron_loong.planner import fit
from megatron_loong.planner.candidate import Candidate, Workload
from megatron_loong.planner.hardware import Hardware
from megatron_loong.planner.reasons import describe
from megatron_loong.planner.search import Plan, layouts
from megatron_loong.planner.simulate import Span, simulate_pass
from megatron_loong.planner.step import step_cost
from megatron_loong.planner.units import length

_STREAMS = {
    "compute": "computes",
    "head": "all-to-all",
    "inner": "inner ring",
    "outer": "outer ring",
    "inner_dkv": "gradients, inner ring",
    "outer_dkv": "gradients, outer ring",
}
#: Colour in the timeline -> what is computed in it.
_KINDS = {"#4c72b0": "attention", "#8fa8d0": "merging and summing", "#c9c9c9": "packing"}
_COLOURS = {"tile": "#4c72b0", **dict.fromkeys(("merge", "add", "sums", "round"), "#8fa8d0")}
_COLOURS |= dict.fromkeys(("pack", "unpack", "move"), "#c9c9c9")
_HOPS = {"head": "#937860", "inner": "#55a868", "outer": "#c44e52", "inner_dkv": "#8fcf9f", "outer_dkv": "#e59a9d"}


def draw_plan(plan: Plan, work: Workload, hardware: Hardware, folder: Path) -> list[Path]:
    """timeline.png, layouts.png and longest_sequence.png in `folder`, made if need be; `ValueError`: no matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in (
        ("timeline", lambda axes: draw_timeline(axes, plan.candidate, work, hardware)),
        ("layouts", lambda axes: draw_layouts(axes, plan.candidate, work, hardware)),
        ("longest_sequence", lambda axes: draw_longest_sequence(axes, plan.candidate, work, hardware)),
    ):
        figure, axes = _figure(10, 4.5 if name == "timeline" else 4)
        draw(axes)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        drawn.append(path)
    return drawn


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--pictures needs matplotlib: pip install 'megatron-loong[plot]'") from None
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def draw_timeline(axes: Any, candidate: Candidate, work: Workload, hardware: Hardware) -> None:
    """The attention of one layer, forward then backward, of the first and the last rank of a node: who computes, what
    travels, and by its gaps who waits."""
    config, shape, site = candidate.attention, candidate.attention_shape(work), candidate.site(hardware)
    spans: list[Span] = []
    ends = []
    for backward in (False, True):
        result = simulate_pass(config, shape, site, backward=backward, trace=True)
        shift = ends[-1] if ends else 0.0
        spans += [s._replace(start_s=s.start_s + shift, end_s=s.end_s + shift) for s in result.spans]
        ends.append(shift + result.seconds)
    shown = sorted({span.rank for span in spans})
    rows = [
        (rank, stream)
        for rank in dict.fromkeys((shown[0], shown[-1]))
        for stream in _STREAMS
        if any(s.rank == rank and s.stream == stream for s in spans)
    ]
    for span in spans:
        if (span.rank, span.stream) not in rows:
            continue
        colour = _COLOURS[span.what.split()[0]] if span.stream == "compute" else _HOPS[span.stream]
        row = rows.index((span.rank, span.stream))
        width = 1e3 * (span.end_s - span.start_s)
        axes.barh(row, width, left=1e3 * span.start_s, color=colour, edgecolor="white", linewidth=0.3)
    axes.axvline(1e3 * ends[0], color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"rank {rank}: {_STREAMS[stream]}" for rank, stream in rows])
    for colour, kind in _KINDS.items():
        axes.barh(0, 0, color=colour, label=kind)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=len(_KINDS))
    axes.invert_yaxis()
    axes.set_xlabel("ms; forward | backward of one layer's attention (modelled)")
    axes.set_title(f"{describe(candidate)}\n{length(work.seq_len)} tokens on {hardware.name}", fontsize=9)


def draw_layouts(axes: Any, candidate: Candidate, work: Workload, hardware: Hardware) -> None:
    """Step time over head-parallel size and inner ring, each with its best placement; the rest as in the plan."""
    best: dict[tuple[int, int], float] = {}
    shape, site = candidate.attention_shape(work), candidate.site(hardware)
    for config in layouts(candidate.context, shape.heads):
        passes = tuple(simulate_pass(config, shape, site, backward=b) for b in (False, True))
        other = dataclasses.replace(candidate, attention=config)
        seconds = step_cost(other, work, hardware, passes).seconds  # type: ignore[arg-type]
        key = (config.head_parallel_size, config.inner_ring_size or 1)
        best[key] = min(seconds, best.get(key, seconds))
    for hp in sorted({hp for hp, _ in best}):
        points = sorted((w, s) for (size, w), s in best.items() if size == hp)
        axes.plot(*zip(*points, strict=True), marker="o", label=f"head parallel {hp}")
    _label_powers(axes, "x", sorted({w for _, w in best}))
    axes.set_ylim(0, 1.1 * max(best.values()))
    axes.set_xlabel("ranks of an inner ring; the right end of each line is a single ring of all its ranks")
    axes.set_ylabel("s a step (modelled)")
    axes.legend(fontsize=8, loc="lower left", ncol=2)
    axes.set_title(
        f"CP {candidate.context} on {hardware.name}, {length(work.seq_len)} tokens; best placement of each", fontsize=9
    )


def draw_longest_sequence(axes: Any, candidate: Candidate, work: Workload, hardware: Hardware) -> None:
    """The longest sequence that fits as the context-parallel group grows, by recomputation mode."""
    contexts = divisors(1024 // candidate.tensor)
    lengths: set[int] = set()
    for recompute in ("none", "full", "selective"):
        points = [
            (context * candidate.tensor, longest)
            for context in contexts
            if (longest := longest_sequence(candidate, context, recompute, work, hardware))
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=f"recomputation: {recompute}")
        lengths.update(longest for _, longest in points)
    _label_powers(axes, "x", [context * candidate.tensor for context in contexts])
    _label_powers(axes, "y", sorted(lengths))
    axes.set_xlabel(f"GPUs of one sequence (TP {candidate.tensor} x CP)")
    axes.set_ylabel("tokens, the largest power of two that fits (modelled)", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(f"Longest sequence that fits {hardware.name}, MLP and loss in tiles", fontsize=9)


def _label_powers(axes: Any, axis: str, values: list[int]) -> None:
    """A logarithmic axis that says 64K where it means 65536."""
    getattr(axes, f"set_{axis}scale")("log", base=2)
    getattr(axes, f"set_{axis}ticks")(values, [length(value) if value >= 2048 else str(value) for value in values])


def longest_sequence(
    candidate: Candidate, context: int, recompute: str, work: Workload, hardware: Hardware
) -> int | None:
    """The longest power of two of tokens that fits `context` ranks; None when not even 1K tokens a rank do."""
    heads = work.model.num_attention_heads // candidate.tensor
    head_parallel = max(h for h in divisors(context) if heads % h == 0 and h <= hardware.gpus_per_node)
    zero = candidate.zero._replace(optimizer=context)
    longest = None
    seq_len = 1024 * context
    while seq_len <= 1 << 30:
        config = dataclasses.replace(
            candidate.attention,
            context_parallel_size=context,
            head_parallel_size=head_parallel,
            inner_ring_size=None,
            placement="head_first",
        )
        tried = dataclasses.replace(
            candidate,
            attention=config,
            pipeline=1,
            data=1,
            recompute=recompute,
            zero=zero,
            tiled_mlp=True,
            tiled_logits=True,
        )
        one = dataclasses.replace(work, gpus=context * candidate.tensor, seq_len=seq_len, global_batch_size=1)
        if not fit.fits(fit.peak_bytes(tried, dataclasses.replace(one, micro_batch_size=1)), hardware):
            break
        longest, seq_len = seq_len, 2 * seq_len
    return longest
