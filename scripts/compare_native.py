r"""Train the same model on the same data with loong and with native context parallelism, and say whether they agree.

    python scripts/compare_native.py --ranks 4 --loong "--loong-head-parallel-size 2" --junit out.xml \
        -- pretrain_gpt.py <Megatron's arguments, --context-parallel-size among them>

For CI: the exit code is 0 when losses, gradient norms, step time and memory stay inside the thresholds, 1 when not, 2
when a run failed. Native runs once per --cp-comm-type. On a CPU (--cpu) native context parallelism cannot run, for it
needs TransformerEngine: there the comparison is with the same model on one context-parallel rank, and the report says
so. Gradient norms have three decimals in Megatron's log, so their threshold is absolute as well.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compare_runs import Run, Thresholds, compare, junit, markdown, parse_run


def command(args: argparse.Namespace, ranks: int, extra: list[str]) -> list[str]:
    """torchrun, the launcher, the script and its arguments."""
    cpu = ["--cpu", "--cpu"] if args.cpu else []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, "-m", "megatron_loong", *cpu, *args.script, *extra]


def train(args: argparse.Namespace, name: str, ranks: int, extra: list[str]) -> Run:
    """One run; its log in --logs. A run that fails ends the program with 2."""
    print(f"{name}: {ranks} ranks", flush=True)
    ended = subprocess.run(command(args, ranks, extra), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    args.logs.mkdir(parents=True, exist_ok=True)
    log = args.logs / f"{name.replace('+', '_')}.log"
    log.write_text(ended.stdout)
    if ended.returncode:
        print("\n".join(ended.stdout.splitlines()[-30:]), f"\n{name} failed with {ended.returncode}; see {log}")
        raise SystemExit(2)
    return parse_run(name, ended.stdout.splitlines())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, required=True, help="processes of each run on this machine")
    add("--cpu", action="store_true", help="no GPU: compare with one context-parallel rank")
    add("--loong", default="", help="flags of the loong run alone, as one word")
    add("--cp-comm-type", nargs="*", default=["p2p", "a2a", "all_gather"], help="native ways to compare with")
    add("--loss", type=float, default=1e-4, help="largest relative difference of a step's loss")
    add("--grad-norm", type=float, default=1e-2, help="largest relative difference of a step's gradient norm")
    add(
        "--step-time",
        type=float,
        default=None,
        help="largest ratio of step times, loong to native; not judged if absent",
    )
    add("--memory", type=float, default=None, help="largest ratio of peak memory; not judged if absent")
    add("--skip-steps", type=int, default=2, help="steps at the start that do not count for time")
    add("--logs", type=Path, default=Path("runs/compare_native"))
    add("--junit", type=Path)
    add("--markdown", type=Path)
    add("script", nargs=argparse.REMAINDER, help="-- SCRIPT and Megatron's arguments, without --context-parallel-impl")
    args = parser.parse_args()
    args.script = args.script[1:] if args.script[:1] == ["--"] else args.script
    if "--context-parallel-size" not in args.script:
        parser.error("Megatron's arguments need a --context-parallel-size")
    return args


def without_context_parallelism(script: list[str], ranks: int) -> tuple[list[str], int]:
    """The same arguments with one context-parallel rank, and the ranks that then remain."""
    at = script.index("--context-parallel-size")
    return [*script[:at], *script[at + 2 :]], ranks // int(script[at + 1])


def main() -> int:
    args = parse_arguments()
    ours = train(args, "loong", args.ranks, ["--context-parallel-impl", "loong", *args.loong.split()])
    if args.cpu:
        args.script, ranks = without_context_parallelism(args.script, args.ranks)
        natives = [train(args, "one-rank", ranks, [])]
        note = "Native context parallelism needs a GPU; compared with one context-parallel rank, times not judged."
        args.step_time = args.memory = None
    else:
        natives = [train(args, f"native-{kind}", args.ranks, ["--cp-comm-type", kind]) for kind in args.cp_comm_type]
        note = ""
    thresholds = Thresholds(args.loss, args.grad_norm, args.step_time, args.memory, args.skip_steps)
    rows = [row for native in natives for row in compare(ours, native, thresholds)]
    report = markdown(rows, note)
    print(report)
    if args.markdown:
        args.markdown.write_text(report)
    if args.junit:
        args.junit.write_text(junit(rows))
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
