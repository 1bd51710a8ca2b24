"""docs/packing.md: packed documents under our assignment beside plain zigzag with padding. Counted, so it never varies.

usage: python scripts/packing_table.py > docs/packing.md
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.packing import Mix, draw_mixes
from megatron_loong.config import LoongConfig

MIXES, TOKENS_PER_RANK = 50, 4096
CONFIGS = (LoongConfig(8), LoongConfig(8, 2, 2), LoongConfig(16, 1, 4), LoongConfig(64, 8))
MIB_PER_ROW = 2 * 8 * 128 * 2 / 2**20

HEAD = f"""# Packed documents: balance and bytes

{MIXES} packs drawn from a long-tailed corpus (log-normal lengths, median 490 tokens; one document in thirty is 20 to
100% of the pack), {TOKENS_PER_RANK:,} tokens per rank, causal attention inside each document. *Counted* from the
schedule that the attention runs, not timed: `python scripts/packing_table.py > docs/packing.md`.

- **balance**: (query, key) pairs of the most loaded ring rank over the mean.
- **pairs**: those of the most loaded rank, ours over padded zigzag's. Padded zigzag, as TransformerEngine's `thd` has
  it, pads every document to a multiple of 2 x CP and cuts each in zigzag; it is balanced by construction and attends
  to its padding.
- **padding**: tokens that padded zigzag adds; every layer of the model computes them. Ours adds none.
- **KV sent**: by the rank that sends most, forward, one layer, 8 KV heads of width 128 in bfloat16, MiB; ours over
  padded zigzag's, which hands every block round the whole ring. Ours sends the rows that somebody further along sees.

Every rank holds equally many tokens in all of them. Ours is `--loong-pack-layout dealt`, padded zigzag `per_document`
([layouts](layouts.md)); with real boundaries beside the padded ones, the latter does not attend to its padding either.
"""


def numbers(mix: Mix, config: LoongConfig) -> tuple[float, ...]:
    """balance, pairs ratio, padding, MiB of ours, MiB of padded, their ratio."""
    sent = [max(x.kv_rows_sent) * MIB_PER_ROW / config.head_parallel_size for x in (mix.ours, mix.padded)]
    pairs = max(mix.ours.pairs) / max(mix.padded.pairs)
    return mix.ours.balance, pairs, mix.padded.tokens / mix.ours.tokens - 1, *sent, sent[0] / sent[1]


def document() -> str:
    """The page."""
    summary = [
        "| layout | balance, median (worst) | pairs, median (worst) | KV sent, median (worst) |",
        "|---|---|---|---|",
    ]
    pages = []
    for config in CONFIGS:
        mixes = draw_mixes(config, MIXES, TOKENS_PER_RANK)
        rows = [numbers(mix, config) for mix in mixes]
        ranges = [(statistics.median(x), max(x)) for x in ([row[i] for row in rows] for i in (0, 1, 5))]
        cells = " | ".join(f"{median:.3f} ({worst:.3f})" for median, worst in ranges)
        summary.append(f"| {config.describe()} | {cells} |")
        pages += [f"\n## {config.describe()}\n", "| documents | longest | balance | pairs | padding | KV sent, MiB |"]
        pages.append("|---|---|---|---|---|---|")
        pages += [
            f"| {mix.documents} | {mix.longest} | {row[0]:.3f} | {row[1]:.3f} | {row[2]:.1%} "
            f"| {row[3]:.1f} / {row[4]:.1f} = {row[5]:.2f} |"
            for mix, row in zip(mixes, rows, strict=True)
        ]
    return "\n".join([HEAD, *summary, *pages])


if __name__ == "__main__":
    print(document())
