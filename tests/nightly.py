"""Cases that run by night alone: `pytest -m ""` runs all tests, `pytest -m nightly` only these (scripts/test.sh)."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def mostly_nightly(cases: Iterable[Any], always: Container[Any]) -> list[Any]:
    """Parameters of a test: cases that are not among `always` get the marker `nightly`.

    A tuple is the values of several arguments.
    """
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=[] if case in always else pytest.mark.nightly))
    return found
