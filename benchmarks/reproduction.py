"""The cost model beside published measurements: docs/reproduction.md. Nothing here is fitted to a row."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from typing import NamedTuple

from benchmarks.published import ShortRun, rows
from benchmarks.published_row import HARDWARE, SECONDS, Row
from megatron_loong.config import LoongConfig
from megatron_loong.planner.candidate import Candidate, Workload, ZeroSizes
from megatron_loong.planner.links import Site
from megatron_loong.planner.methods import LOONGTRAIN
from megatron_loong.planner.simulate import simulate_pass
from megatron_loong.planner.step import step_cost
from megatron_loong.planner.traffic import AttentionShape

#: Two published numbers closer than this are a tie: nobody's ordering.
TIE = 0.03


class Compared(NamedTuple):
    """A published row and what the cost model gives for it."""

    row: Row
    modelled: float

    @property
    def error(self) -> float:
        """Relative: 0.1 is 10% too fast."""
        return self.row.speed(self.modelled) / self.row.speed(self.row.published) - 1


def modelled(row: Row) -> float:
    """The cost model's figure for a row, in the row's unit."""
    hardware = HARDWARE[row.hardware]
    if row.model is None:
        shape = AttentionShape(row.seq_len, *row.heads, head_dim=128)
        site = Site(hardware, min(hardware.gpus_per_node, row.config.context_parallel_size))
        passes = [simulate_pass(row.config, shape, site, backward=b, method=row.implementation) for b in row.passes]
        # As all three studies count: causal, forward 2 S^2 h d, backward 2.5 times that.
        flops = row.documents * 2.0 * row.seq_len**2 * shape.heads * shape.head_dim / row.config.context_parallel_size
        flops *= sum(2.5 if backward else 1.0 for backward in row.passes)
        return flops / sum(one.seconds for one in passes) / 1e12
    seconds, useful = _step(row, row.config, row.data)
    if row.unit == "of CP 1":
        return _step(row, LoongConfig(1), row.data * row.config.context_parallel_size)[0] / seconds
    gpus = row.tensor * row.pipeline[0] * row.data * row.config.context_parallel_size
    tokens = row.global_batch_size * row.seq_len
    return {
        SECONDS: seconds,
        "tokens/s": tokens / gpus / seconds,
        "TFLOP/s": useful * tokens / gpus / seconds / 1e12,
        "MFU": useful * tokens / gpus / seconds / hardware.peak_flops_per_s,
    }[row.unit]


def _step(row: Row, config: LoongConfig, data: int) -> tuple[float, float]:
    """(seconds of a step, FLOPs of a token as the study counts them)."""
    assert row.model is not None
    stages, chunks = row.pipeline
    hardware, ranks = HARDWARE[row.hardware], data * config.context_parallel_size
    work = Workload(row.model, ranks * row.tensor * stages, row.seq_len, row.global_batch_size)
    zero = ZeroSizes(ranks, ranks, ranks) if row.sharded else ZeroSizes(1, 1, ranks)
    candidate = Candidate(row.tensor, stages, data, config, row.recompute, zero, row.expert)
    shape, site = candidate.attention_shape(work), candidate.site(hardware)
    forward, backward = (
        simulate_pass(config, shape, site, backward=b, method=row.implementation) for b in (False, True)
    )
    cost = step_cost(candidate, work, hardware, (forward, backward))
    seconds = cost.seconds - cost.terms_s["pipeline bubble"] * (1 - 1 / chunks)
    attention = 6.0 * row.model.num_layers * row.model.attention_width * row.seq_len
    return seconds, row.model.flops_per_token(row.seq_len) + (0 if row.counts_mask else attention)


def compare() -> list[Compared]:
    """Every published row with its modelled figure."""
    return [Compared(row, modelled(row)) for row in rows()]


def orderings(compared: list[Compared]) -> tuple[int, int, list[str]]:
    """(pairs of methods that are ordered as published, pairs, the others in words); ties are not counted."""
    right, pairs, wrong = 0, 0, []
    for (study, case), group in itertools.groupby(compared_by_case(compared), key=_case):
        for a, b in itertools.combinations(group, 2):
            if a.row.model != b.row.model:
                continue
            slow, fast = sorted((a, b), key=lambda one: one.row.speed(one.row.published))
            if fast.row.speed(fast.row.published) <= (1 + TIE) * slow.row.speed(slow.row.published):
                continue
            pairs += 1
            if fast.row.speed(fast.modelled) > slow.row.speed(slow.modelled):
                right += 1
            else:
                wrong.append(f"{study}, {case}: {fast.row.method} over {slow.row.method}")
    return right, pairs, wrong


def compared_by_case(compared: list[Compared]) -> list[Compared]:
    """Sorted so that rows of one case stand together."""
    return sorted(compared, key=_case)


def _case(one: Compared) -> tuple[str, str]:
    return one.row.study, one.row.case


HEAD = """\
# The cost model beside published measurements

Written by `python scripts/reproduce.py`; a test holds it equal to what the code computes. Published figures are others'
measurements; every other figure is *modelled*. No GPU was used.

Nothing is fitted to a row. A row is given its hardware profile, the layout, the method and the kernel that its study
ran.

- Hardware profiles (`megatron_loong/planner/profiles.py`) are data sheets and published benchmarks of single kernels:
  attention on A100 from FlashAttention-2's own benchmark, on H100 and B200 from MagiAttention's benchmark of single
  kernels, matrix products from stas00/ml-engineering. A causal tile longer than was measured is two of half its length
  and the square between them.
- By how much a training step is slower than its kernels outside of attention (`training_efficiency`) is measured apart,
  on training runs of 2K and 4K tokens that InternEvo and MosaicML's llm-foundry have published (`SHORT_RUNS` in
  `benchmarks/published.py`): 0.77 on A100, 0.68 on H100, which B200 takes over.
- A method (`methods.py`) is the order of its hops and what it reads and writes between them, from its source.
- Recomputation and sharding are the study's. BurstEngine's public scripts run LoongTrain with `sele_ckpt=0`: full
  recomputation. LoongTrain's text does not say whether its own rows had Selective Checkpoint++, and its public code
  leaves it off by default: full recomputation here, too.
- The networks of the A800 and H100 clusters are not known in full: four 200 Gb/s NICs a node are assumed for the first,
  as LoongTrain's had, and a DGX's eight of 400 Gb/s for the second and for B200.
"""

MISSING = """\
## What is missing

- **LoongTrain's rows at 128K tokens are 15% to 31% fast.** With every method, 4K tokens a GPU take 20 to 40 ms a layer
  more than the model has. The text has no timeline. With Selective Checkpoint++ the two LoongTrain rows would come out
  {with_selective}.
- **All-to-all between nodes.** Ulysses' forward on 16 to 64 B200 is 15% to 24% fast, its backward, with the same bytes,
  2% to 4% slow; BurstEngine's Ulysses row is 15% fast. A NIC is taken to give 90% of its line rate, whatever the
  pattern.
- **The double ring at 1M tokens.** BurstEngine's attention falls off (141 TFLOP/s at 1M after 160 at 512K) where
  computing hides every hop; its own repetitions of 512K in its repository differ by 3%.
- **TransformerEngine's ring (MagiAttention).** Its steps take longer than kernel and memory traffic: 0.6 ms on H100, a
  third of a step at 8K tokens a GPU; on B200 its backward is 9% fast, so that it overtakes Ulysses and 2D.
- **Documents.** The simulation of rings knows no packs: only the all-to-all of MagiAttention's varlen table is here,
  its kernel at the rate for 32K tokens, whatever the documents. Its Ring All-Gather is not modelled either.
- **NeMo's kernel** is not named beside its table. With the cuDNN of MagiAttention's benchmark the rows would be 39% to
  52% fast.
- **MoE Parallel Folding.** Layout and batch are assumed, tensor-parallel collectives that overlap are not modelled.
- **Not modelled at all**: clocks under load beyond what single-kernel benchmarks have, data loading, checkpoints, slow
  nodes. Megatron-CP out of memory at 1M: the planner's memory model describes this plugin.
"""


def render(compared: list[Compared]) -> str:
    """The whole of docs/reproduction.md."""
    errors = [abs(one.error) for one in compared]
    right, pairs, wrong = orderings(compared)
    parts = [
        HEAD,
        f"**Median error {100 * statistics.median(errors):.1f}%** over {len(compared)} rows, largest "
        f"{100 * max(errors):.0f}%.\n**{right} of {pairs}** pairs of methods are ordered as published; pairs that are\n"
        f"published within {100 * TIE:.0f}% of each other are ties and not counted.\n",
    ]
    if wrong:
        parts.append("Ordered otherwise:\n\n" + "\n".join(f"- {line}" for line in wrong) + "\n")
    for study, group in itertools.groupby(compared, key=lambda one: one.row.study):
        parts.append(_table(study, list(group)))
    return "\n".join([*parts, MISSING.format(with_selective=" and ".join(_with_selective()))])


def _with_selective() -> list[str]:
    """Errors of LoongTrain's own rows, if Selective Checkpoint++ was on."""
    ours = [row for row in rows() if row.study.startswith("LoongTrain") and row.implementation is LOONGTRAIN]
    return [f"{100 * (modelled(dataclasses.replace(r, recompute='selective')) / r.published - 1):+.0f}%" for r in ours]


def short_run_efficiency(run: ShortRun) -> float:
    """What share of the model's speed outside of attention a published run of short sequences has."""
    hardware = dataclasses.replace(HARDWARE[run.hardware], training_efficiency=1.0)
    ranks = hardware.gpus_per_node
    work = Workload(run.model, ranks, run.seq_len, run.global_batch_size, run.micro_batch_size)
    zero = ZeroSizes(ranks, ranks, ranks) if run.sharded else ZeroSizes(1, 1, ranks)
    candidate = Candidate(1, 1, ranks, LoongConfig(1), run.recompute, zero)
    shape, site = candidate.attention_shape(work), candidate.site(hardware)
    forward, backward = (simulate_pass(LoongConfig(1), shape, site, backward=b) for b in (False, True))
    cost = step_cost(candidate, work, hardware, (forward, backward))
    measured_s = run.global_batch_size * run.seq_len / ranks / run.tokens_per_gpu_s
    return (cost.seconds - cost.attention_s) / (measured_s - cost.attention_s)


def error_band(compared: list[Compared]) -> dict[str, tuple[int, float, float]]:
    """GPU -> training rows on it, the median and the largest of their errors in percent, rounded up."""
    training = sorted((one for one in compared if one.row.model is not None), key=_gpu)
    found = {}
    for gpu, group in itertools.groupby(training, key=_gpu):
        errors = [abs(100 * one.error) for one in group]
        found[gpu] = (len(errors), math.ceil(statistics.median(errors)), math.ceil(max(errors)))
    return found


def band_module(compared: list[Compared]) -> str:
    """megatron_loong/planner/error_band.py: what the wheel carries of the published figures."""
    band = "".join(f'    "{gpu}": {numbers},\n' for gpu, numbers in error_band(compared).items())
    return (
        '"""How far the model is from published training runs; written by scripts/reproduce.py."""\n\n'
        "#: GPU -> training rows on it, the median and the largest of their errors, in percent.\n"
        f"ERROR_BAND = {{\n{band}}}\n"
    )


def _gpu(one: Compared) -> str:
    return one.row.hardware.partition(",")[0]


def _table(study: str, compared: list[Compared]) -> str:
    median = statistics.median(abs(one.error) for one in compared)
    lines = [
        f"## {study}\n",
        f"Median error {100 * median:.1f}%.\n",
        "| case | method | layout | unit | published | modelled | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in compared:
        row, value = one
        layout = row.config
        is_double = layout.outer_ring_size > 1
        ring = f"{layout.outer_ring_size} x {layout.inner_ring_size}" if is_double else layout.ring_size
        digits = 3 if row.published < 2 else 1
        lines.append(
            f"| {row.case} | {row.method} | head {layout.head_parallel_size}, ring {ring} | {row.unit} | "
            f"{row.published:g} | {value:.{digits}f} | {100 * one.error:+.0f}% |"
        )
    return "\n".join(lines) + "\n"
