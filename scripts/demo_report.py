"""Show a training run while it goes on, and two runs side by side afterwards.

torchrun ... 2>&1 | python scripts/demo_report.py watch --log runs/demo/loong.log
python scripts/demo_report.py compare runs/demo/loong.log runs/demo/native.log --picture runs/demo/loss.png
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.record import StepRecord, parse_log, parse_step, relative_differences

BAR_WIDTH = 40
EXPECT_AT = 4
"""The step after which a run says how long it will take."""


def watch(log_path: Path) -> int:
    """Copy stdin to `log_path`, print a line per step; 1, and the end of the log, if the run stopped early."""
    last: StepRecord | None = None
    first_loss = 0.0
    tail: deque[str] = deque(maxlen=60)
    with log_path.open("w") as log:
        for line in sys.stdin:
            log.write(line)
            log.flush()
            tail.append(line)
            record = parse_step(line)
            if record is None:
                if line.startswith(("megatron_loong:", "megatron_loong CPU mode:")):
                    print(line.rstrip(), flush=True)
                continue
            last = record
            first_loss = first_loss or record.loss
            if record.step == EXPECT_AT and (minutes := record.step_time_s * (record.steps - record.step) / 60) > 2:
                # The first steps are slower than the rest, so the answer comes after a few of them.
                print(
                    f"about {minutes:.0f} minutes more for this run here; scripts/demo.sh 20 takes 20 steps", flush=True
                )
            bar = "#" * round(BAR_WIDTH * min(record.loss / first_loss, 1.0))
            print(
                f"step {record.step:3d}/{record.steps}  {record.step_time_s:5.2f} s  loss {record.loss:.6f}  {bar}",
                flush=True,
            )
    if last is None or last.step != last.steps:
        print(f"The run stopped early; the end of {log_path}:\n{''.join(tail)}", file=sys.stderr)
        return 1
    return 0


def compare(ours: list[StepRecord], reference: list[StepRecord], tolerance: float, picture: Path | None) -> int:
    """Print both losses step by step, draw them, and say whether every step agrees; 1 if one does not."""
    differences = relative_differences(ours, reference)
    print("step   4 ranks, loong   1 rank, native   relative difference")
    for a, b, difference in zip(ours, reference, differences, strict=True):
        print(f"{a.step:4d}   {a.loss:14.6f}   {b.loss:14.6f}   {difference:.1e}")
    if picture is not None:
        draw(ours, reference, differences, tolerance, picture)
        print(f"picture: {picture}")
    worst = max(differences)
    verdict = "agree" if worst <= tolerance else "DIFFER"
    print(
        f"{len(ours)} steps, loss {ours[0].loss:.3f} -> {ours[-1].loss:.3f}: the runs {verdict}; "
        f"largest relative difference {worst:.1e}, allowed {tolerance:.0e}"
    )
    return 0 if worst <= tolerance else 1


def draw(
    ours: list[StepRecord], reference: list[StepRecord], differences: list[float], tolerance: float, picture: Path
) -> None:
    """Both loss curves above, their relative difference below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [record.step for record in ours]
    figure, (top, bottom) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 5.4), height_ratios=[3, 1], layout="constrained"
    )
    top.plot(steps, [r.loss for r in reference], color="#f2a154", linewidth=6, label="1 rank, Megatron's attention")
    label = "4 ranks, megatron_loong (head parallel 2 x ring 2)"
    top.plot(steps, [r.loss for r in ours], color="#1f4e79", linewidth=1.6, label=label)
    top.set_ylabel("training loss (nats per byte)")
    top.set_title("Byte-level GPT on Python's language reference, float32, CPU")
    top.legend(frameon=False)
    smallest = 1e-8  # where the two print the same seven digits
    bottom.plot(steps, [max(difference, smallest) for difference in differences], ".", color="#1f4e79")
    bottom.axhline(tolerance, color="#b03a2e", linestyle="--", linewidth=1)
    bottom.text(steps[0], tolerance * 1.6, "allowed", color="#b03a2e", fontsize=8)
    bottom.set(yscale="log", ylim=(smallest / 2, tolerance * 10), xlabel="step", ylabel="relative\ndifference")
    bottom.set_yticks([smallest, tolerance / 10, tolerance], ["none", f"{tolerance / 10:.0e}", f"{tolerance:.0e}"])
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    watching = commands.add_parser("watch", help="show the run whose output comes in on stdin")
    watching.add_argument("--log", type=Path, required=True, help="where to keep the whole output")
    comparing = commands.add_parser("compare", help="two logs, step by step")
    comparing.add_argument("ours", type=Path)
    comparing.add_argument("reference", type=Path)
    comparing.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference of any step")
    comparing.add_argument("--picture", type=Path, help="PNG to write")
    args = parser.parse_args()
    if args.command == "watch":
        return watch(args.log)
    logs = [parse_log(path.read_text().splitlines()) for path in (args.ours, args.reference)]
    return compare(logs[0], logs[1], args.tolerance, args.picture)


if __name__ == "__main__":
    sys.exit(main())
