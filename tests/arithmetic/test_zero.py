"""Hybrid ZeRO: three subgroup sizes become Megatron's arguments, or an error that names the nearest choice."""

from __future__ import annotations

import types
from typing import Any

import pytest

from megatron_loong.integration import zero
from megatron_loong.integration.options import LoongOptions
from megatron_loong.integration.zero import Sizes


def megatron_args(**changes: Any) -> Any:
    defaults = {name: values[0] for name, values in zero._MEGATRON_DEFAULTS.items()}
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1}
    return types.SimpleNamespace(**{**defaults, **sizes, **changes})


def options(param: Any = 1, grad: Any = 1, optimizer: Any = 1) -> LoongOptions:
    return LoongOptions(loong_zero_param_size=param, loong_zero_grad_size=grad, loong_zero_optimizer_size=optimizer)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (Sizes(1, 1, 1), {}),
        (Sizes(1, 1, 8), {"use_distributed_optimizer": True, "num_distributed_optimizer_instances": 1}),
        (Sizes(1, 1, 4), {"use_distributed_optimizer": True, "num_distributed_optimizer_instances": 2}),
    ],
)
def test_what_the_distributed_optimizer_can_do(sizes: Sizes, expected: dict[str, Any]) -> None:
    assert zero.translate(sizes, 8) == expected


@pytest.mark.parametrize(
    ("sizes", "strategy", "outer", "instances"),
    [
        (Sizes(1, 8, 8), "optim_grads", None, 1),
        (Sizes(8, 8, 8), "optim_grads_params", None, 1),
        (Sizes(4, 4, 4), "optim_grads_params", None, 2),
        (Sizes(4, 4, 8), "optim_grads_params", "optim", 2),  # LoongTrain's: parameters in a node, optimizer beyond
    ],
)
def test_what_megatron_fsdp_can_do(sizes: Sizes, strategy: str, outer: str | None, instances: int) -> None:
    found = zero.translate(sizes, 8)
    assert found["use_megatron_fsdp"] and found["data_parallel_sharding_strategy"] == strategy
    assert found.get("outer_dp_sharding_strategy") == outer
    assert found["num_distributed_optimizer_instances"] == instances


def test_what_cannot_be_expressed_names_the_nearest() -> None:
    with pytest.raises(NotImplementedError) as error:
        zero.translate(Sizes(2, 4, 8), 8)
    text = str(error.value)
    assert "--loong-zero-param-size 2 --loong-zero-grad-size 4 --loong-zero-optimizer-size 8 cannot be" in text
    assert "no more memory per rank: --loong-zero-param-size 4 --loong-zero-grad-size 4 --loong-zero-opt" in text
    assert (
        "no more communication: --loong-zero-param-size 2 --loong-zero-grad-size 2 --loong-zero-optimizer-size 8"
        in text
    )


def test_every_size_divides_the_ranks() -> None:
    with pytest.raises(ValueError, match=r"--loong-zero-grad-size 3 does not divide the 8 ranks .*\[1, 2, 4, 8\]"):
        zero.sizes_of(options(grad=3), 8)
    assert zero.sizes_of(options("all", "all", "all"), 8) == Sizes(8, 8, 8)
    with pytest.raises(ValueError, match="--loong-zero-optimizer-size 'most' must be"):
        options(optimizer="most")


def test_the_arguments_are_set_before_megatron_reads_them() -> None:
    args = megatron_args()
    said = zero.apply(options(optimizer=4), args, world_size=16)
    assert args.use_distributed_optimizer is True and args.num_distributed_optimizer_instances == 2
    assert said is not None and "over 8 data x context ranks" in said
    untouched = megatron_args()
    assert zero.apply(options(), untouched, world_size=16) is None
    assert untouched == megatron_args()


def test_flags_that_say_otherwise_are_an_error() -> None:
    with pytest.raises(ValueError, match="--num-distributed-optimizer-instances 4 contradicts"):
        zero.apply(options(optimizer=4), megatron_args(num_distributed_optimizer_instances=4), world_size=16)


def test_a_megatron_without_fsdp_says_so() -> None:
    args = megatron_args()
    del args.use_megatron_fsdp
    with pytest.raises(NotImplementedError, match="needs --use-megatron-fsdp, which this Megatron does not have"):
        zero.apply(options(4, 4, 4), args, world_size=16)
