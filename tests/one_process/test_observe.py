"""What the observer counts: operations, bytes to peers, live bytes; and what it refuses to overlook."""

from __future__ import annotations

import pytest
import torch

from benchmarks.compare import relative_error
from benchmarks.flops import attention_flops
from benchmarks.observe import Observer

MIB = 2**20


@pytest.mark.parametrize("causal", [True, False])
def test_operations_of_forward_and_backward(causal: bool) -> None:
    q = torch.randn(2, 4, 64, 16, requires_grad=True)
    k, v = (torch.randn(2, 2, 64, 16, requires_grad=True) for _ in range(2))
    with Observer() as seen:
        out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        out.sum().backward()
    expected = [attention_flops(2, 4, 16, 64, 64, causal=causal, backward=backward) for backward in (False, True)]
    assert seen.flops == sum(expected)
    assert seen.attention_calls == 2
    assert expected[1] == 2.5 * expected[0]


def test_live_bytes_are_those_alive_at_the_same_time() -> None:
    before = torch.zeros(MIB)
    with Observer() as seen:
        first = torch.zeros(MIB)  # 4 MiB
        del first
        second = torch.zeros(MIB) + before  # 4 MiB and, for a moment, 4 MiB of zeros
        view = second[10:]
        second.add_(1)
    assert seen.peak_live_bytes == 8 * MIB
    assert view.numel()


def test_an_operator_that_might_send_is_not_overlooked() -> None:
    @torch.library.custom_op("loong_test::secret_exchange", mutates_args=())
    def secret_exchange(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    with pytest.raises(NotImplementedError, match="secret_exchange"), Observer():
        secret_exchange(torch.zeros(1))


def test_a_result_that_is_not_finite_is_infinitely_wrong() -> None:
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
