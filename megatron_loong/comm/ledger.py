"""Counts the bytes that this process sends. Without an open `count_bytes` a message costs one look at an empty list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """What this process sent to others, by communicator (`head`, `inner`, `outer`, `inner_dkv`, `outer_dkv`)."""

    sent_bytes: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)

    @property
    def total_bytes(self) -> int:
        """Bytes over all communicators."""
        return sum(self.sent_bytes.values())


_open_ledgers: list[Ledger] = []


@contextmanager
def count_bytes() -> Iterator[Ledger]:
    """Count what this process sends inside the block, forward and backward alike."""
    ledger = Ledger()
    _open_ledgers.append(ledger)
    try:
        yield ledger
    finally:
        _open_ledgers.remove(ledger)


def record(communicator: str, sent_bytes: int) -> None:
    """Count one message of `sent_bytes` to others on `communicator`."""
    for ledger in _open_ledgers:
        ledger.sent_bytes[communicator] += sent_bytes
        ledger.messages[communicator] += 1
