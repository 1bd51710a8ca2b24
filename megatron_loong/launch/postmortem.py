"""`megatron-loong postmortem FOLDER`: which rank was gone or late, read off the files of the flight recorder.

On a `CommunicationError` each rank writes its last operations (`comm/flight.py`). No torch is needed to read them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Operation = dict[str, Any]
"""The fields of `comm.flight.Operation`, and a text; `peers`: the ranks that are waited for, itself perhaps too."""


@dataclass(frozen=True)
class Record:
    """What one rank wrote."""

    rank: int
    started: float
    failed: float
    error: str
    operations: list[Operation]

    def waiting(self, at: float) -> list[Operation]:
        """What it waited for at that time. After its error it waits for that for ever."""
        at = min(at, self.failed)
        return [x for x in self.operations if x["waited"] and x["waited"] <= at < (x["done"] or math.inf)]


def parsed(text: str) -> Record:
    """A file's text. Raises many an error if it is damaged (see `read`)."""
    found = json.loads(text)
    for x in found["operations"]:
        x.update({key: None if x[key] is None else float(x[key]) for key in ("posted", "waited", "done")})
        ends = {"send": f" to rank {x['peer']}", "receive": f" from rank {x['peer']}"}.get(x["operation"], "")
        size = f", {int(x['bytes']):,} bytes" if x["bytes"] else ""
        where = f"{x['operation']}{ends} in the {x['group']} {x['ranks']}"
        x.update(text=f"{where}: {x['what']}{size}, its operation {x['number']}")
        x.update(peers=[int(peer) for peer in (x["ranks"] if x["peer"] is None else [x["peer"]])])
    times = float(found["started"]), float(found["failed"])
    return Record(int(found["rank"]), *times, " ".join(found["error"].split())[:160], found["operations"])


def read(folder: Path) -> dict[int, Record]:
    """By rank, the records of the last run in a folder and those below it. A damaged file is named and left out."""
    records: dict[int, Record] = {}
    for path in folder.rglob("loong_flight.rank*.json"):
        try:
            record = parsed(path.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"megatron_loong: {path} is damaged ({type(error).__name__}: {error})", file=sys.stderr)
            continue
        if record.rank not in records or records[record.rank].failed < record.failed:
            records[record.rank] = record
    # A restarted run may write into the same folder. What was written before some rank began is of the run before it.
    begun = max((x.started for x in records.values()), default=0.0)
    return {rank: record for rank, record in sorted(records.items()) if record.failed >= begun}


def culprits(records: Mapping[int, Record]) -> dict[int, tuple[int, Operation]]:
    """Ranks that were gone or late -> a rank that waited for each, and in what. Empty: all waited for each other.

    From the rank that failed first, along whom each waited for at that time, up to ranks that waited for nobody: a rank
    that only waits for a lost one looks lost itself from the next.
    """
    first = min(records.values(), key=lambda record: record.failed)
    seen, level = {first.rank}, [first]
    while level:
        waited_for: dict[int, tuple[int, Operation]] = {}
        for record in level:
            for x in record.waiting(first.failed):
                for peer in x["peers"]:
                    waited_for.setdefault(peer, (record.rank, x))
        gone = {peer: how for peer, how in waited_for.items() if peer not in records}
        found = gone or {peer: how for peer, how in waited_for.items() if not records[peer].waiting(first.failed)}
        if found:
            return found
        level = [records[peer] for peer in waited_for if peer not in seen]
        seen.update(waited_for)
    return {}


def clock(at: float) -> str:
    """Time of day, UTC."""
    return time.strftime("%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03d}"


def explain(records: Mapping[int, Record]) -> list[str]:
    """The lines that are printed."""
    lines, in_order = [], sorted(records.values(), key=lambda record: record.failed)
    at = in_order[0].failed
    for rank, (witness, x) in sorted(culprits(records).items()):
        if rank not in records:
            lines.append(f"rank {rank} is gone: it left no record (it died, or was ended before it could write one)")
        else:
            lines.append(f"rank {rank} was late: it waited for nobody at {clock(at)}, the first error")
            before = [x for x in records[rank].operations if x["posted"] <= at]
            for name, some in (("before", before[-1:]), ("after", records[rank].operations[len(before) :][:1])):
                lines += [f"  {name}, posted {clock(x['posted'])}: {x['text']}" for x in some]
        lines.append(f"  rank {witness} waited for it since {clock(x['waited'])}: {x['text']}")
    lines = lines or ["no rank was gone or late: those with a record waited for each other (a broken link?)"]
    lines.append("errors, first to last (UTC):")
    for record in in_order:
        when = f"rank {record.rank}, {clock(record.failed)}"
        lines += [f"  {when}, after {record.failed - x['waited']:.1f} s: {x['text']}" for x in record.waiting(math.inf)]
        lines.append(f"    {record.error}")
    return lines


def main(argv: list[str]) -> int:
    """Print who was gone or late. 2: no records."""
    parser = argparse.ArgumentParser(prog="megatron-loong postmortem", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="with loong_flight.rank*.json in it or below: the logs' folder")
    folder = parser.parse_args(argv).folder
    records = read(folder)
    if not records:
        print(f"megatron_loong: no loong_flight.rank*.json in {folder} or below it", file=sys.stderr)
        return 2
    print("\n".join(explain(records)))
    return 0
