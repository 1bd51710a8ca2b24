"""Parts of a result that wait: how many passes they cost, how much memory they hold, and rows for which none came."""

from __future__ import annotations

import pytest
import torch

from benchmarks.live_bytes import LiveBytes
from megatron_loong.attention.merge import OnlineSoftmax, PartialSum
from megatron_loong.kernels import row_ops

CPU = torch.device("cpu")


@pytest.mark.parametrize(("dtype", "parts", "passes"), [(torch.bfloat16, 8, [4, 5]), (torch.float32, 8, [2, 3, 3, 3])])
def test_eight_parts_are_a_few_passes(
    dtype: torch.dtype, parts: int, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 four at a time, the sum among those of the second pass; and no more memory than they and two sums."""
    seen: list[int] = []
    add_rows = row_ops.add_rows
    monkeypatch.setattr(row_ops, "add_rows", lambda into, x: (seen.append(len(x)), add_rows(into, x)))
    with LiveBytes() as live:
        total = PartialSum(1000, [(1, 2, 8)], dtype, CPU)
        for _ in range(parts):
            total.add(slice(0, 1000), (torch.ones(1000, 1, 2, 8, dtype=dtype),))
        (result,) = total.result(dtype)
    assert seen == passes and result.dtype == dtype and (result == parts).all()
    of_sum = 1000 * 2 * 8 * 4
    waiting = 5 if dtype == torch.bfloat16 else 3  # the last finds the others full
    assert live.peak_bytes <= waiting * result.nbytes + 2 * of_sum


@pytest.mark.parametrize("flushes", [False, True], ids=["one pass", "several"])
def test_rows_for_which_nothing_came(flushes: bool) -> None:
    """Parts of the rows 2 to 6 and 4 to 8 of ten; memory is not zero to begin with."""
    result = OnlineSoftmax(torch.empty(10, 1, 2, 8, dtype=torch.float64), 8)
    grads = PartialSum(10, [(1, 2, 8)], torch.float64, CPU)
    drawn = torch.Generator().manual_seed(0)
    lse = torch.full((12, 10, 1, 2), -torch.inf, dtype=torch.float64)
    out = torch.zeros(12, 10, 1, 2, 8, dtype=torch.float64)
    for i in range(12 if flushes else 2):
        rows = slice(2, 6) if i % 2 else slice(4, 8)
        lse[i, rows], out[i, rows] = (torch.randn(x[i, rows].shape, generator=drawn, dtype=x.dtype) for x in (lse, out))
        result.add(rows, (lse[i, rows], out[i, rows]))
        grads.add(rows, (out[i, rows],))
    found, found_lse = result.finish(sink=None)
    total = lse.logsumexp(0)
    weights = (lse - total.clamp_min(-1e300)).exp().unsqueeze(-1)
    torch.testing.assert_close(found, (weights * out).sum(0), atol=1e-14, rtol=0)
    torch.testing.assert_close(found_lse, total, atol=1e-14, rtol=0)
    torch.testing.assert_close(grads.result(torch.float64)[0], out.sum(0), atol=1e-14, rtol=0)
    assert (found_lse[:2] == -torch.inf).all() and not found[8:].any()


def test_a_sink_alone_is_a_result_with_memory_of_its_own() -> None:
    out, lse = OnlineSoftmax(torch.empty(4, 1, 2, 8), 8).finish(sink=torch.zeros(2))
    out += 1  # an expanded part cannot be written to
    assert out.shape == (4, 1, 2, 8) and (out == 1).all() and not lse.any()
