"""All ways to run a job, ranked by simulated step time.

Three steps. For each (TP, CP) the layouts of the attention are ordered by a lower bound and simulated, best first,
until no bound can beat what was found. The (TP, CP) are taken in the order of the bound of their best plan, with the
same stop. What remains - PP, DP, EP, recomputation, ZeRO, tiling - is closed form, and filtered by memory.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_loong.config import AXES, LoongConfig, divisors
from megatron_loong.layout.placement import fitting_head_parallel_sizes
from megatron_loong.planner import fit
from megatron_loong.planner.bound import computing_bound, pass_bound
from megatron_loong.planner.candidate import RECOMPUTE, Candidate, Limits, Workload, ZeroSizes
from megatron_loong.planner.hardware import Hardware
from megatron_loong.planner.links import Site
from megatron_loong.planner.nearest import why_not
from megatron_loong.planner.simulate import PassTime, simulate_pass
from megatron_loong.planner.step import StepCost, step_cost
from megatron_loong.planner.traffic import AttentionShape

Passes = tuple[PassTime, PassTime]
_Shards = Literal["optimizer", "gradients", "parameters"]
_SHARDS: tuple[_Shards, ...] = ("optimizer", "gradients", "parameters")

#: What cannot win by more than this share of the time is not simulated, and counts as equally fast.
_WORTHWHILE = 0.002
#: Copies to host memory are chosen where they gain more than this.
_WORTH_A_COPY = 0.03


@dataclass(frozen=True)
class Plan:
    """A candidate with what it is expected to cost."""

    candidate: Candidate
    cost: StepCost
    memory: fit.MemoryTerms
    passes: Passes
    """Forward and backward of the attention of one layer and micro-batch."""


@dataclass
class Effort:
    """What the search did: tests count this instead of the time, which depends on the machine."""

    layouts: int = 0
    """Attention layouts bounded."""
    simulations: int = 0
    """Passes simulated."""
    candidates: int = 0
    """Whole plans costed."""
    too_large: int = 0
    """Of those, plans that do not fit the memory."""


@dataclass
class Outcome:
    """Plans, the fastest first, no two of which differ in the layout of the attention alone."""

    plans: list[Plan]
    effort: Effort
    smallest_bytes: int = 0
    """Peak memory of the leanest plan seen; tells by how much nothing fits."""
    too_large: Plan | None = None
    """The fastest plan that would fit twice the memory."""


def axis_orders(head: int, outer: int, inner: int) -> list[str]:
    """Placements that differ for these sizes, by name; an axis of size 1 stands anywhere.

    >>> axis_orders(2, 1, 4)
    ['head_first', 'context_first']
    """
    sizes = {"head": head, "outer": outer, "inner": inner}
    names = {"head-inner-outer": "head_first", "inner-outer-head": "context_first"}
    orders = ["-".join(order) for order in itertools.permutations(AXES)]
    found: dict[tuple[str, ...], str] = {}
    for order in sorted(orders, key=lambda order: order not in names):  # the names first
        found.setdefault(tuple(a for a in order.split("-") if sizes[a] > 1), names.get(order, order))
    return list(found.values())


def layouts(context: int, heads: int, head_parallel: int | None = None) -> Iterator[LoongConfig]:
    """Every layout of the attention of a context-parallel group with `heads` query heads a rank."""
    for hp in fitting_head_parallel_sizes(context, heads):
        if head_parallel not in (None, hp):
            continue
        ring = context // hp
        for inner in sorted(divisors(ring), reverse=True):  # the single ring first: it is taken when nothing is gained
            if inner == 1 and ring > 1:
                continue  # rings of one rank inside, a ring of all outside: a single ring by another name
            for placement in axis_orders(hp, ring // inner, inner):
                yield LoongConfig(context, hp, inner, placement)


class Simulator:
    """Simulated and bounded passes of one hardware, each computed once."""

    def __init__(self, effort: Effort) -> None:
        self.effort = effort
        self.passes = functools.lru_cache(maxsize=None)(self._passes)
        self.bounds = functools.lru_cache(maxsize=None)(self._bounds)

    def _passes(self, config: LoongConfig, shape: AttentionShape, site: Site) -> Passes:
        self.effort.simulations += 2
        forward, backward = (simulate_pass(config, shape, site, backward=b) for b in (False, True))
        return forward, backward

    def _bounds(self, config: LoongConfig, shape: AttentionShape, site: Site) -> Passes:
        self.effort.layouts += 1
        forward, backward = (pass_bound(config, shape, site, backward=b) for b in (False, True))
        return forward, backward

    def best_layouts(
        self, configs: list[LoongConfig], shape: AttentionShape, site: Site, keep: int
    ) -> list[LoongConfig]:
        """The `keep` fastest by forward plus backward, the earlier of equals.

        Simulates until no bound can still get in.
        """
        bounded = sorted(((_total(self.bounds(c, shape, site)), i) for i, c in enumerate(configs)))
        best: list[tuple[float, int]] = []  # negative times, the slowest of the kept first
        for bound, index in bounded:
            if len(best) == keep and bound * (1 + _WORTHWHILE) >= -best[0][0]:
                break
            seconds = float(f"{_total(self.passes(configs[index], shape, site)):.6g}")  # sums in any order are equal
            heapq.heappush(best, (-seconds, -index))
            if len(best) > keep:
                heapq.heappop(best)
        return [configs[-index] for _, index in sorted(best, reverse=True)]


def _total(passes: Passes) -> float:
    return passes[0].seconds + passes[1].seconds


def search(
    work: Workload,
    hardware: Hardware,
    *,
    limits: Limits | None = None,
    keep: int = 8,
    memory_model: fit.MemoryModel = fit.peak_bytes,
) -> Outcome:
    """The `keep` fastest plans that fit; none in `plans` when nothing fits.

    Sharded gradients, and then parameters (Megatron-FSDP), are looked at only when nothing fits without them.
    `ValueError` when no combination of sizes is possible at all.
    """
    limits, effort = limits or Limits(), Effort()
    simulator, outcome = Simulator(effort), Outcome([], effort)
    for shards in _SHARDS:
        families = list(_bounded_families(work, hardware, limits, shards))
        if not families:
            raise ValueError(why_not(work, limits, lambda w, x: is_possible(w, hardware, x)))
        for bound, _, _, configs, variants in sorted(families, key=lambda family: family[:3]):
            if len(outcome.plans) == keep and bound * (1 + _WORTHWHILE) >= outcome.plans[-1].cost.seconds:
                break
            _add_family(outcome, simulator, configs, variants, work, hardware, keep, memory_model)
        if outcome.plans:
            break
    return outcome


def any_fits(work: Workload, hardware: Hardware, limits: Limits) -> bool:
    """Whether the leanest plans fit the memory: everything sharded, in tiles and on the host."""
    for tensor, context in _families(work, hardware, limits):
        for config in layouts(context, work.model.num_attention_heads // tensor, limits.head_parallel):
            for variant in _variants(tensor, context, work, hardware, limits, "parameters"):
                leanest = list(dataclasses.replace(variant, attention=config).leaner(work))[-1]
                host = fit.host_bytes(work.model, fit.memory_plan(leanest, work))
                if fit.fits(fit.peak_bytes(leanest, work), hardware, host):
                    return True
    return False


def _computing(config: LoongConfig, shape: AttentionShape, site: Site) -> Passes:
    forward, backward = (computing_bound(config, shape, site, backward=b) for b in (False, True))
    return forward, backward


_Family = tuple[float, int, int, list[LoongConfig], list[Candidate]]


def _bounded_families(work: Workload, hardware: Hardware, limits: Limits, shards: _Shards) -> Iterator[_Family]:
    """(bound of the step time, TP, CP, layouts of the attention, everything beside them)."""
    for tensor, context in _families(work, hardware, limits):
        configs = list(layouts(context, work.model.num_attention_heads // tensor, limits.head_parallel))
        variants = list(_variants(tensor, context, work, hardware, limits, shards))
        if not configs or not variants:
            continue
        shape, site = variants[0].attention_shape(work), variants[0].site(hardware)
        by_size = {c.head_parallel_size: c for c in configs}.values()
        bounds = [_computing(c, shape, site) for c in by_size]
        least = min(bounds, key=_total)
        bound = min(step_cost(v, work, hardware, least).seconds for v in variants)
        yield bound, tensor, context, configs, variants


def is_possible(work: Workload, hardware: Hardware, limits: Limits) -> bool:
    """Whether any sizes go together, whatever they take and need."""
    return any(
        next(layouts(context, work.model.num_attention_heads // tensor, limits.head_parallel), None)
        and next(_variants(tensor, context, work, hardware, limits, "optimizer"), None)
        for tensor, context in _families(work, hardware, limits)
    )


def _families(work: Workload, hardware: Hardware, limits: Limits) -> Iterator[tuple[int, int]]:
    """(TP, CP): TP inside a node and dividing the heads; CP dividing the rest and the sequence."""
    for tensor in divisors(hardware.gpus_per_node):
        if limits.tensor not in (None, tensor) or work.gpus % tensor or work.model.num_attention_heads % tensor:
            continue
        for context in divisors(work.gpus // tensor):
            if limits.context not in (None, context) or work.seq_len % (2 * context):
                continue
            yield tensor, context


def _variants(
    tensor: int, context: int, work: Workload, hardware: Hardware, limits: Limits, shards: _Shards
) -> Iterator[Candidate]:
    """PP, DP, EP, recomputation and ZeRO sizes beside one (TP, CP); the layout of the attention comes later."""
    placeholder = LoongConfig(context)
    for pipeline in divisors(work.gpus // (tensor * context)):
        data = work.gpus // (tensor * context * pipeline)
        if limits.pipeline not in (None, pipeline) or work.model.num_layers % pipeline:
            continue
        if work.global_batch_size % (data * work.micro_batch_size):
            continue
        ranks = data * context
        experts = [e for e in divisors(tensor * ranks) if (work.model.num_experts or 1) % e == 0]
        for expert in experts:
            if limits.expert not in (None, expert):
                continue
            for recompute in RECOMPUTE:
                if limits.recompute not in (None, recompute):
                    continue
                if recompute == "selective" and context == 1:
                    continue  # it keeps what 2D-Attention computed, which one rank has no use for
                for zero in zero_sizes(ranks, max(1, hardware.gpus_per_node // tensor), shards):
                    if tensor * zero.optimizer % expert == 0:  # an expert's states are spread over its copies
                        yield Candidate(tensor, pipeline, data, placeholder, recompute, zero, expert)


def zero_sizes(ranks: int, in_node: int, shards: _Shards) -> list[ZeroSizes]:
    """Sizes worth a look for `ranks` data x context ranks, `in_node` of which share a node.

    The optimizer's states over all ranks, or over those of a node: then only gradients cross nodes, one share each. Any
    size between takes more of the network and more memory than one of the two (hybrid ZeRO, LoongTrain section 4.6).

    >>> [sizes.optimizer for sizes in zero_sizes(64, 8, "optimizer")]
    [64, 8]
    """
    if shards != "optimizer":
        return [ZeroSizes(ranks if shards == "parameters" else 1, ranks, ranks)]
    inside = max(k for k in divisors(ranks) if k <= in_node)
    return [ZeroSizes(1, 1, k) for k in dict.fromkeys((ranks, inside)) if k > 1 or ranks == 1]


def _add_family(
    outcome: Outcome,
    simulator: Simulator,
    configs: list[LoongConfig],
    variants: list[Candidate],
    work: Workload,
    hardware: Hardware,
    keep: int,
    memory_model: fit.MemoryModel,
) -> None:
    """Cost every variant of a (TP, CP) with its best layouts, and keep the fastest that fit."""
    shape, site = variants[0].attention_shape(work), variants[0].site(hardware)
    best = simulator.best_layouts(configs, shape, site, keep=3)
    for variant, config in itertools.product(variants, best):
        plan = _leanest_needed(variant, config, work, hardware, simulator, memory_model, outcome)
        if plan is not None:
            _keep(outcome.plans, plan, keep)


def _leanest_needed(
    variant: Candidate,
    config: LoongConfig,
    work: Workload,
    hardware: Hardware,
    simulator: Simulator,
    memory_model: fit.MemoryModel,
    outcome: Outcome,
) -> Plan | None:
    """The plan with the fewest switches that fits; None when none does."""
    for candidate in dataclasses.replace(variant, attention=config).leaner(work):
        memory = memory_model(candidate, work)
        outcome.effort.candidates += 1
        total = sum(memory.values())
        outcome.smallest_bytes = min(outcome.smallest_bytes or total, total)
        passes = simulator.passes(config, candidate.attention_shape(work), candidate.site(hardware))
        plan = Plan(candidate, step_cost(candidate, work, hardware, passes), memory, passes)
        host = fit.host_bytes(work.model, fit.memory_plan(candidate, work)) if candidate.offload else 0
        if fit.fits(memory, hardware, host):
            return plan
        outcome.effort.too_large += 1
        faster = outcome.too_large is None or plan.cost.seconds < outcome.too_large.cost.seconds
        if faster and total <= 2 * hardware.memory_bytes:
            outcome.too_large = plan
    return None


def _keep(plans: list[Plan], plan: Plan, keep: int) -> None:
    """Insert by step time; of plans that differ in the layout of the attention alone only the faster stays."""

    def but_layout(x: Plan) -> Candidate:
        return dataclasses.replace(x.candidate, attention=LoongConfig(x.candidate.context))

    same = [i for i, other in enumerate(plans) if but_layout(other) == but_layout(plan)]
    if same and plans[same[0]].cost.seconds <= plan.cost.seconds:
        return
    for i in same:
        del plans[i]
    plans.append(plan)
    plans.sort(key=_order)
    del plans[keep:]


def _order(plan: Plan) -> tuple[int, int, float]:
    """Faster first; what is as fast goes by fewer switches."""
    c = plan.candidate
    switches = (
        c.tiled_mlp + c.tiled_logits + c.offload + c.offload_attention + (c.pipeline > 1) + RECOMPUTE.index(c.recompute)
    )
    seconds = plan.cost.seconds * (1 + _WORTH_A_COPY * c.offload)
    return (round(math.log(seconds) / _WORTHWHILE), switches, plan.cost.seconds)
