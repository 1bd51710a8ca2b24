#!/usr/bin/env python3
"""Draw docs/images/plan_*.png: the planner's answer for one job. Needs matplotlib; neither torch nor a GPU.

python scripts/planner_pictures.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from megatron_loong.planner.candidate import Limits, Workload
from megatron_loong.planner.model import MODELS
from megatron_loong.planner.pictures import draw_plan
from megatron_loong.planner.profiles import PROFILES
from megatron_loong.planner.search import search


def main() -> int:
    work, hardware = Workload(MODELS["llama2-7b-gqa"], 32, 1 << 17, 32), PROFILES["a100"]
    plan = search(work, hardware, limits=Limits(context=32)).plans[0]
    images = Path(__file__).resolve().parents[1] / "docs" / "images"
    with tempfile.TemporaryDirectory() as folder:
        for path in draw_plan(plan, work, hardware, Path(folder)):
            target = images / f"plan_{path.name}"
            target.write_bytes(path.read_bytes())
            print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
