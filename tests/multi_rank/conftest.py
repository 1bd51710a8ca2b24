from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.multi_rank.pool import WorkerPool

_pool: WorkerPool | None = None


@pytest.fixture
def pool() -> WorkerPool:
    """The session's workers."""
    global _pool
    if _pool is None:
        _pool = WorkerPool()
    return _pool


@pytest.fixture(scope="session", autouse=True)
def _stop_pool() -> Iterator[None]:
    yield
    if _pool is not None:
        _pool.stop()
