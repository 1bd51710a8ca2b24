"""How near the memory-bound passes of attention come to the card's copy bandwidth.

    python -m benchmarks.copy_rate --json copy_rate.json        # on a GPU; seconds
    python -m benchmarks.copy_rate --device cpu --tokens 64     # whether it runs at all

A pass moves a known number of bytes: what it must read and write, each once. Its rate is set against that of PyTorch's
copy of one large dense tensor, and beside it that of the same pass made of PyTorch's operators. Aim: 85% of the copy.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.outcome import write_json
from megatron_loong.kernels import row_ops

AIM = 0.85


class Pass(NamedTuple):
    """One pass over memory, ready to run again and again."""

    run: Callable[[], object]
    bytes_moved: int
    """Read plus written."""
    results: tuple[torch.Tensor, ...]
    """What it writes."""


def passes(tokens: int, heads: int, kv_heads: int, width: int, peers: int, device: torch.device) -> dict[str, Pass]:
    """The passes of one rank: `tokens` rows, bfloat16 blocks, float32 sums, a head group of `peers`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    # As in a ring of eight: a float32 sum and four parts that wait, of which the last pass makes a bfloat16 result.
    waiting = [
        (draw(1, heads, tokens, dtype=torch.float32).permute(2, 0, 1), draw(1, tokens, heads, width).transpose(0, 1))
        for _ in range(4)
    ]
    lse, out = (x.clone() for x in waiting[0])
    merging = [(lse.clone(), out.float()), *waiting]
    adding = [(x,) for _, x in merging]

    # A hop: what came and what a tile gave become a message.
    hop, came = (tuple(draw(tokens, 1, kv_heads, width) for _ in range(2)) for _ in range(2))
    of_tile = tuple(draw(1, tokens, kv_heads, width).transpose(0, 1) for _ in range(2))

    counts = (heads, kv_heads, kv_heads)
    mine = [draw(tokens, 1, n, width) for n in counts]
    message = torch.zeros(peers, tokens, sum(counts) // peers * width, dtype=torch.bfloat16, device=device)
    columns = message.split([n // peers * width for n in counts], 2)
    sent = [x.unflatten(2, (1, -1, width)).permute(1, 2, 0, 3, 4) for x in columns]
    packing = [(view, x.unflatten(2, (peers, -1))) for view, x in zip(sent, mine, strict=True)]
    # As in zigzag: the second halves of all peers come behind the first ones, in opposite order.
    halves = torch.arange(peers * tokens // 2 * 2, device=device).view(peers, 2, -1)
    order = torch.cat([halves[:, 0].flatten(), halves[:, 1].flip(0).flatten()])
    rows = [x.flatten(0, 1) for x in columns]
    ordered = [x.new_zeros(len(order), x.shape[1]) for x in rows]
    arriving = list(zip(ordered, rows, strict=True))

    return {
        "merge": Pass(
            lambda: row_ops.merge_rows((lse, out), merging), _moved(lse, out, *itertools.chain(*merging)), (lse, out)
        ),
        "add dk, dv": Pass(lambda: row_ops.add_rows(hop, [came, of_tile]), _moved(*hop, *came, *of_tile), hop),
        "add dq": Pass(lambda: row_ops.add_rows((out,), adding), _moved(out, *itertools.chain(*adding)), (out,)),
        "pack q, k, v": Pass(lambda: row_ops.copy_rows_(packing), _moved(*mine, *mine), (message,)),
        "order q, k, v": Pass(
            lambda: row_ops.copy_rows_(arriving, source_rows=order), _moved(order, *ordered, *ordered), tuple(ordered)
        ),
    }


def _moved(*tensors: torch.Tensor) -> int:
    return sum(x.nbytes for x in tensors)


def copy_bytes_per_s(size_bytes: int, device: torch.device, repeats: int) -> float:
    """Read plus written, of PyTorch's copy between two dense buffers."""
    source, target = (torch.zeros(size_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size_bytes / seconds_of(lambda: target.copy_(source), device, repeats)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median over five rounds of the mean of `repeats` calls; by the GPU's own clock where there is one."""
    for _ in range(3):
        call()
    return statistics.median(_round(call, device, repeats) for _ in range(5))


def _round(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def check(name: str, one: Pass) -> None:
    """Raise `RuntimeError` unless the pass and its twin in PyTorch write the same to rounding."""
    start = [x.clone() for x in one.results]
    one.run()
    got = [x.clone() for x in one.results]
    for x, before in zip(one.results, start, strict=True):
        x.copy_(before)
    with row_ops.without_triton():
        one.run()
    for x, want in zip(got, one.results, strict=True):
        errors = (x.float() - want.float()).abs()
        error = errors.max().item()
        if not (errors <= 1e-5 + torch.finfo(x.dtype).eps * want.float().abs()).all():
            raise RuntimeError(f"{name}: differs by {error:.1e} from PyTorch's own operators")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The record, written after each pass: the copy's rate and, by pass, its own and its share of the copy's.

    A pass that is wrong or raises is not timed, and leaves its traceback in `failed`.
    """
    device = torch.device(args.device)
    copy = copy_bytes_per_s(args.copy_bytes, device, args.repeats)
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": row_ops.triton_fault() or "used",
        "shape": {x: getattr(args, x) for x in ("tokens", "heads", "kv_heads", "width", "peers")},
        "aim": AIM,
        "copy_bytes_per_s": copy,
    }
    measured, failed = record["passes"], record["failed"] = {}, {}
    print(f"{record['device']}, copy {copy / 1e9:.0f} GB/s, Triton: {record['triton']}", flush=True)
    for name, one in passes(args.tokens, args.heads, args.kv_heads, args.width, args.peers, device).items():
        try:
            check(name, one)
            seconds = seconds_of(one.run, device, args.repeats)
            with row_ops.without_triton():
                torch_seconds = seconds_of(one.run, device, args.repeats)
        except Exception:  # the other passes are measured all the same
            failed[name] = traceback.format_exc()
            print(failed[name], flush=True)
        else:
            rate = one.bytes_moved / seconds
            x = measured[name] = {
                "bytes": one.bytes_moved,
                "seconds": seconds,
                "bytes_per_s": rate,
                "of_copy": rate / copy,
                "torch_of_copy": one.bytes_moved / torch_seconds / copy,
            }
            met = "" if x["of_copy"] >= AIM else f"  below {AIM:.0%}"
            print(f"{name:>14}  {x['of_copy']:6.1%} of the copy, PyTorch's {x['torch_of_copy']:6.1%}{met}", flush=True)
        if args.json is not None:
            write_json(args.json, record)
    return record


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write the record. 1: a pass is wrong; 2: no GPU here, and none was renounced."""
    parser = argparse.ArgumentParser(prog="copy_rate", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="where the record goes")
    add("--device", default="cuda")
    add("--tokens", type=int, default=32768, help="even; large enough that no cache holds the tensors (default 32768)")
    add("--heads", type=int, default=32)
    add("--kv-heads", type=int, default=8)
    add("--width", type=int, default=128, help="of a head")
    add("--peers", type=int, default=8, help="ranks of the head group; divides both numbers of heads")
    add("--copy-bytes", type=int, default=1 << 30, help="of the copy that is the measure (default 1 GiB)")
    add("--repeats", type=int, default=20)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("copy_rate: no CUDA device here; --device cpu --tokens 64 --copy-bytes 65536 tries it", file=sys.stderr)
        return 2
    if args.tokens % 2 or args.heads % args.peers or args.kv_heads % args.peers:
        parser.error(
            f"--tokens {args.tokens} must be even, and --peers {args.peers} divide --heads {args.heads} and "
            f"--kv-heads {args.kv_heads}"
        )
    return 1 if measure(args)["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
