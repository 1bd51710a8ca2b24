#!/usr/bin/env python3
"""Write docs/reproduction.md: the planner's figures beside published ones. Needs neither torch nor a GPU.

python scripts/reproduce.py            # writes the file
python scripts/reproduce.py --print    # to stdout
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.reproduction import render


def main() -> int:
    if sys.argv[1:] == ["--print"]:
        print(render(), end="")
        return 0
    if sys.argv[1:]:
        print(__doc__, file=sys.stderr)
        return 2
    path = Path(__file__).resolve().parents[1] / "docs" / "reproduction.md"
    path.write_text(render(), encoding="utf-8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
