"""The layout of the attention when everything around it is given: what `auto` means where the hardware is known."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megatron_loong.config import LoongConfig, divisors
from megatron_loong.planner.hardware import Hardware
from megatron_loong.planner.links import Site
from megatron_loong.planner.profiles import PROFILES
from megatron_loong.planner.search import Effort, Simulator, layouts
from megatron_loong.planner.traffic import AttentionShape


def best_layout(
    context_parallel_size: int,
    shape: AttentionShape,
    site: Site,
    *,
    head_parallel_size: int | None = None,
    inner_ring_size: int | None = None,
    placement: str | None = None,
) -> LoongConfig:
    """The layout with the fastest simulated forward and backward; sizes that are given stay.

    `ValueError` when nothing fits what is given.

    >>> from megatron_loong.planner.profiles import PROFILES
    >>> shape = AttentionShape(131072, heads=32, kv_heads=8, head_dim=128)
    >>> best_layout(8, shape, Site(PROFILES["a100"], 8), head_parallel_size=4).describe()
    'cp 8 = head 4 x ring 2 (outer 1 x inner 2), placement head_first, zigzag'
    """
    configs = [
        config
        for config in layouts(context_parallel_size, shape.heads, head_parallel_size)
        if inner_ring_size in (None, config.inner_ring_size) and _same_placement(config, placement)
    ]
    if not configs:
        raise ValueError(
            f"no layout of --context-parallel-size {context_parallel_size} with {shape.heads} query heads a rank has "
            f"head-parallel size {head_parallel_size or 'auto'}, inner ring {inner_ring_size or 'auto'} and placement "
            f"{placement or 'auto'}"
        )
    return Simulator(Effort()).best_layouts(configs, shape, site, keep=1)[0]


@dataclass(frozen=True)
class Job:
    """What `auto` knows besides the context-parallel group: enough to simulate its attention."""

    hardware: Hardware
    seq_len: int
    kv_heads: int
    """Of one TP rank."""
    head_dim: int
    tensor_parallel_size: int = 1
    micro_batch_size: int = 1


@functools.lru_cache(maxsize=64)  # asked once per attention layer
def choose_layout(
    context_parallel_size: int,
    heads: int,
    cp_ranks_in_node: int,
    job: Job,
    *,
    head_parallel_size: int | None = None,
    inner_ring_size: int | None = None,
    placement: str | None = None,
) -> LoongConfig:
    """The planner's layout for a group of `heads` query heads a TP rank, `cp_ranks_in_node` ranks of it in each node.

    Nodes that are not filled evenly are taken for nodes of as many ranks as do fill them. `ValueError`: see
    `best_layout`.

    >>> from megatron_loong.planner.profiles import PROFILES
    >>> choose_layout(32, 32, 8, Job(PROFILES["h100"], 65536, kv_heads=8, head_dim=128)).describe()
    'cp 32 = head 8 x ring 4 (outer 1 x inner 4), placement head_first, zigzag'
    """
    in_node = max(n for n in divisors(context_parallel_size) if n <= cp_ranks_in_node)
    shape = AttentionShape(job.seq_len, heads, job.kv_heads, job.head_dim, batch=job.micro_batch_size)
    return best_layout(
        context_parallel_size,
        shape,
        Site(job.hardware, in_node, job.tensor_parallel_size),
        head_parallel_size=head_parallel_size,
        inner_ring_size=inner_ring_size,
        placement=placement,
    )


def hardware_of_gpu(device_name: str) -> Hardware | None:
    """The profile for a GPU as its driver names it; None for one that has no profile.

    >>> hardware_of_gpu("NVIDIA H100 80GB HBM3").name, hardware_of_gpu("NVIDIA A100-SXM4-80GB").name
    ('h100', 'a100')
    >>> hardware_of_gpu("NVIDIA GeForce RTX 4090")
    """
    words = device_name.lower().replace("-", " ").split()
    return next((profile for name, profile in PROFILES.items() if name in words), None)


def _same_placement(config: LoongConfig, placement: str | None) -> bool:
    """Whether `placement` comes to the order of ranks that `config` has; an axis of size 1 stands anywhere."""
    if placement is None:
        return True
    sizes = {"head": config.head_parallel_size, "outer": config.outer_ring_size, "inner": config.inner_ring_size}
    wanted = LoongConfig(config.context_parallel_size, config.head_parallel_size, config.inner_ring_size, placement)
    orders = [[axis for axis in c.axis_order if sizes[axis] != 1] for c in (config, wanted)]
    return orders[0] == orders[1]
