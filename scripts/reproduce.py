#!/usr/bin/env python3
"""Write docs/reproduction.md, the planner's figures beside published ones, and the error band that `plan` prints.

python scripts/reproduce.py            # writes both files; needs neither torch nor a GPU
python scripts/reproduce.py --print    # the document, to stdout
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.reproduction import band_module, compare, render


def main() -> int:
    compared = compare()
    if sys.argv[1:] == ["--print"]:
        print(render(compared), end="")
        return 0
    if sys.argv[1:]:
        print(__doc__, file=sys.stderr)
        return 2
    root = Path(__file__).resolve().parents[1]
    files = {"docs/reproduction.md": render(compared), "megatron_loong/planner/error_band.py": band_module(compared)}
    for name, text in files.items():
        (root / name).write_text(text, encoding="utf-8")
        print(f"wrote {root / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
