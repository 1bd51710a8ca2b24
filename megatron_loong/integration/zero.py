"""Hybrid ZeRO: over how many ranks parameters, gradients and optimizer states are spread, in Megatron's own means.

LoongTrain (arXiv 2406.18485, section 4.6) gives each of the three a subgroup of DP x CP of its own. Megatron's
distributed optimizer, its instances and Megatron-FSDP express some of these choices; the others are refused with the
nearest that exists. Megatron's subgroups are contiguous in DP x CP with CP fastest, so they fill a node first.
Free of torch and Megatron.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron_loong.config import divisors
from megatron_loong.integration.options import LoongOptions

FIELDS = ("loong_zero_param_size", "loong_zero_grad_size", "loong_zero_optimizer_size")
FLAGS = ("--loong-zero-param-size", "--loong-zero-grad-size", "--loong-zero-optimizer-size")


#: What Megatron's parser gives where the user said nothing.
_MEGATRON_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "use_distributed_optimizer": (False,),
    "num_distributed_optimizer_instances": (1,),
    "use_megatron_fsdp": (False,),
    "data_parallel_sharding_strategy": ("optim_grads_params",),
    "outer_dp_sharding_strategy": ("no_shard",),
    "ckpt_format": ("torch_dist", "torch"),
}


class Sizes(NamedTuple):
    """Ranks over which one copy is spread; 1: every rank has its own."""

    param: int
    grad: int
    optimizer: int

    def __str__(self) -> str:
        return " ".join(f"{flag} {size}" for flag, size in zip(FLAGS, self, strict=True))


def asked(options: LoongOptions) -> bool:
    """Whether any of the three flags is set."""
    return any(getattr(options, field) != 1 for field in FIELDS)


def sizes_of(options: LoongOptions, dp_cp: int) -> Sizes:
    """The three sizes as numbers; `all` is `dp_cp`, the ranks of DP x CP. `ValueError` when one does not divide it."""
    sizes = Sizes(*(dp_cp if (n := getattr(options, field)) == "all" else n for field in FIELDS))
    for flag, size in zip(FLAGS, sizes, strict=True):
        if dp_cp % size:
            raise ValueError(
                f"{flag} {size} does not divide the {dp_cp} ranks of data x context parallel; "
                f"try one of {divisors(dp_cp)}, or all"
            )
    return sizes


def expressible(dp_cp: int) -> dict[Sizes, dict[str, Any]]:
    """Every choice that Megatron can carry out, and the arguments that do it.

    >>> expressible(4)[Sizes(1, 1, 2)]
    {'use_distributed_optimizer': True, 'num_distributed_optimizer_instances': 2}
    """
    found: dict[Sizes, dict[str, Any]] = {Sizes(1, 1, 1): {}}
    for k in divisors(dp_cp)[1:]:
        instances = {"num_distributed_optimizer_instances": dp_cp // k}
        fsdp = {"use_megatron_fsdp": True, "ckpt_format": "fsdp_dtensor", **instances}
        found[Sizes(1, 1, k)] = {"use_distributed_optimizer": True, **instances}
        found[Sizes(1, k, k)] = {**fsdp, "data_parallel_sharding_strategy": "optim_grads"}
        whole = {**fsdp, "data_parallel_sharding_strategy": "optim_grads_params"}
        found[Sizes(k, k, k)] = whole
        if k < dp_cp:
            found[Sizes(k, k, dp_cp)] = {**whole, "outer_dp_sharding_strategy": "optim"}
    return found


def translate(sizes: Sizes, dp_cp: int) -> dict[str, Any]:
    """Megatron's arguments for a choice; `NotImplementedError` names the nearest choices that there are.

    Nearest: those that spread nothing less than asked for, with the least messages; and those that spread no more.
    """
    known = expressible(dp_cp)
    if sizes in known:
        return known[sizes]
    more = [s for s in known if all(a >= b for a, b in zip(s, sizes, strict=True))]
    less = [s for s in known if all(a <= b for a, b in zip(s, sizes, strict=True))]
    leanest, quietest = min(more), max(less, key=lambda s: (s.optimizer, s.grad, s.param))
    raise NotImplementedError(
        f"{sizes} cannot be expressed in Megatron's distributed optimizer or Megatron-FSDP; nearest with no more "
        f"memory per rank: {leanest}; nearest with no more communication: {quietest}"
    )


def apply(options: LoongOptions, args: Any, world_size: int) -> str | None:
    """Set Megatron's arguments as the flags ask, before Megatron validates them; returns a line for the log.

    Raises `ValueError` where the user's own flags say otherwise, `NotImplementedError` where this Megatron lacks one.
    """
    if not asked(options):
        return None
    dp_cp = world_size // (args.tensor_model_parallel_size * args.pipeline_model_parallel_size)
    sizes = sizes_of(options, dp_cp)
    wanted = translate(sizes, dp_cp)
    for name, value in wanted.items():
        if not hasattr(args, name):
            raise NotImplementedError(
                f"{sizes} needs --{name.replace('_', '-')}, which this Megatron does not have; supported: "
                "--loong-zero-optimizer-size alone"
            )
        if getattr(args, name) not in (value, *_MEGATRON_DEFAULTS[name]):
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(args, name)} contradicts {sizes}, which sets it to {value}; "
                "remove one of them"
            )
        setattr(args, name, value)
    return f"ZeRO over {dp_cp} data x context ranks: {sizes}; " + ", ".join(f"{k}={v}" for k, v in wanted.items())
