from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _environment_is_put_back() -> Iterator[None]:
    """Placement and CPU mode set environment variables; a later test's processes must not inherit them."""
    saved = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(saved)


#: A script that needs megatron.training as soon as it is imported; nothing in it is a test.
collect_ignore = ["packed_gpt.py"]
