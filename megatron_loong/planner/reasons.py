"""Why a plan wins, in words that name numbers; and what would make another one win."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_loong.planner.candidate import Candidate, Workload
from megatron_loong.planner.choose import best_layout
from megatron_loong.planner.hardware import Hardware
from megatron_loong.planner.links import next_on
from megatron_loong.planner.search import Outcome, Plan
from megatron_loong.planner.simulate import simulate_pass
from megatron_loong.planner.step import EXPOSED_TERMS
from megatron_loong.planner.units import duration

_GIB = 1 << 30
_WORTH_SAYING = 0.98
#: (words, bandwidth of a NIC, length of the sequence), both relative to the job's.
_CASES = (
    ("NICs of a quarter of the bandwidth", 0.25, 1.0),
    ("NICs of half the bandwidth", 0.5, 1.0),
    ("NICs of twice the bandwidth", 2.0, 1.0),
    ("sequences of a quarter of the length", 1.0, 0.25),
    ("sequences four times as long", 1.0, 4.0),
)


def crossing_axes(candidate: Candidate, hardware: Hardware) -> dict[str, int]:
    """Axis of the attention -> ranks of a node that send to another node on it; axes inside a node are left out."""
    config, per_node = candidate.attention, candidate.site(hardware).cp_ranks_in_node
    sizes = {"head": config.head_parallel_size, "inner": config.inner_ring_size, "outer": config.outer_ring_size}
    found = {}
    for axis, size in sizes.items():
        ranks = range(per_node) if (size or 1) > 1 else ()
        crossing = sum(next_on(config, rank, axis) // per_node != rank // per_node for rank in ranks)
        if crossing:
            found[axis] = crossing
    return found


def reasons(plan: Plan, hardware: Hardware) -> list[str]:
    """Sentences on the winner: what crosses nodes, what hides it, where the time goes that nothing hides."""
    candidate, (forward, backward) = plan.candidate, plan.passes
    lines = []
    if candidate.context > 1:
        lines.append(_on_the_network(candidate, plan, hardware))
        total, waiting = forward.seconds + backward.seconds, forward.exposed_s + backward.exposed_s
        lines.append(
            f"in a layer's attention ({duration(forward.seconds)} forward, {duration(backward.seconds)} backward) "
            f"ranks compute for {100 * (1 - waiting / total):.0f}% of the time and wait for {duration(waiting)}"
        )
    lost = {name: plan.cost.terms_s[name] for name in EXPOSED_TERMS if plan.cost.terms_s[name] > 0}
    if lost:
        most = max(lost, key=lost.__getitem__)
        share = 100 * plan.cost.exposed_s / plan.cost.seconds
        lines.append(f"nothing hides {share:.1f}% of the step; the largest part of that is: {most}")
    used, there = sum(plan.memory.values()) / _GIB, hardware.memory_bytes / _GIB
    lines.append(f"{used:.1f} of {there:.0f} GiB are taken at the peak, by {_recompute_words(candidate)}")
    if plan.cost.mfu > 1:
        lines.append(
            "an MFU above 100% cannot be: the profile's rates of matrix products and attention are above its "
            "peak_flops_per_s, or that is not the data sheet's; correct the profile before trusting any of this"
        )
    return lines


def _on_the_network(candidate: Candidate, plan: Plan, hardware: Hardware) -> str:
    crossing = crossing_axes(candidate, hardware)
    if not crossing:
        return "all-to-all and rings stay inside a node: no context-parallel byte meets a NIC"
    forward = plan.passes[0]
    names = {"head": "the all-to-all", "inner": "the inner ring", "outer": "the outer ring"}
    *most, last = (names[axis] for axis in crossing)
    who = f"{', '.join(most)} and {last}" if most else last
    verb = "cross" if len(crossing) > 1 else "crosses"
    nics = {link: sent for link, sent in forward.link_bytes.items() if link[0] == "nic"}
    busiest_s = max(nics.values()) / hardware.nic_bytes_per_s
    overlapped = "" if set(crossing) == {"head"} else ", beside "
    behind = f"{overlapped}{duration(forward.compute_s)} of computing" if overlapped else ", which nothing hides"
    inside = [names[a] for a, n in _active_axes(candidate).items() if n > 1 and a not in crossing]
    stays = f"; {' and '.join(inside)} {'stay' if len(inside) > 1 else 'stays'} inside a node" if inside else ""
    # One TP rank is simulated; its neighbours send as much, on NICs of their own or on the same one.
    used = min(hardware.nics_per_node, len(nics) * candidate.tensor // candidate.site(hardware).nic_sharers)
    return (
        f"{who} {verb} nodes on {used} of {hardware.nics_per_node} NICs at once, {duration(busiest_s)} of traffic on "
        f"the busiest per layer and forward{behind}{stays}"
    )


def _active_axes(candidate: Candidate) -> dict[str, int]:
    config = candidate.attention
    return {"head": config.head_parallel_size, "inner": config.inner_ring_size or 1, "outer": config.outer_ring_size}


def _recompute_words(candidate: Candidate) -> str:
    words = {
        "none": "keeping every activation",
        "selective": "recomputing all but the attention (Selective Checkpoint++)",
        "full": "recomputing every layer",
    }[candidate.recompute]
    return words + _tiled_words(candidate)


def against(plan: Plan, winner: Plan) -> str:
    """A runner-up in one sentence: how much slower, and in which term."""
    slower = 100 * (plan.cost.seconds / winner.cost.seconds - 1)
    grown = {name: plan.cost.terms_s[name] - winner.cost.terms_s[name] for name in plan.cost.terms_s}
    most = max(grown, key=grown.__getitem__)
    if slower < 0.2 or grown[most] <= 0:
        return "as fast"
    return f"{slower:.1f}% slower; {most} takes {duration(grown[most])} more"


def changes(outcome: Outcome, work: Workload, hardware: Hardware) -> Iterator[str]:
    """What would change the choice: other networks and lengths for the same TP and CP, and more memory."""
    winner = outcome.plans[0]
    candidate, config = winner.candidate, winner.candidate.attention
    for what, bandwidth, length in _CASES if candidate.context > 1 else ():
        other = dataclasses.replace(hardware, nic_bytes_per_s=hardware.nic_bytes_per_s * bandwidth)
        seq_len = int(work.seq_len * length)
        if seq_len % (2 * candidate.context):
            continue
        shape = dataclasses.replace(candidate.attention_shape(work), seq_len=seq_len)
        site = candidate.site(other)
        best = best_layout(candidate.context, shape, site)
        present_s, best_s = (
            sum(simulate_pass(x, shape, site, backward=b).seconds for b in (False, True)) for x in (config, best)
        )
        if best_s < _WORTH_SAYING * present_s:
            gain = 100 * (1 - best_s / present_s)
            yield f"with {what}: {best.describe()}, whose attention then takes {gain:.0f}% less time"
    large = outcome.too_large
    if large is not None and large.cost.seconds < 0.99 * winner.cost.seconds:
        need = sum(large.memory.values()) / _GIB
        yield (
            f"with {need:.0f} GiB a GPU: {describe(large.candidate)}, "
            f"{100 * (1 - large.cost.seconds / winner.cost.seconds):.0f}% less time"
        )


def describe(candidate: Candidate) -> str:
    """One line with every size and switch."""
    c, a = candidate, candidate.attention
    parts = [f"TP {c.tensor}", f"PP {c.pipeline}", f"DP {c.data}", f"CP {c.context}"]
    if c.expert > 1:
        parts.append(f"EP {c.expert}")
    if c.context > 1:
        ring = f"{a.outer_ring_size} x {a.inner_ring_size}" if a.outer_ring_size > 1 else f"{a.ring_size}"
        parts.append(f"(head {a.head_parallel_size} x ring {ring}, {a.placement})")
    recompute = {"none": "no recomputation", "selective": "selective recomputation", "full": "full recomputation"}
    offload = f", layer inputs{' and attention' if c.offload_attention else ''} in host memory" if c.offload else ""
    parts.append(f"{recompute[c.recompute]}{_tiled_words(c)}{offload}{_zero_words(c)}")
    return " ".join(parts)


def _zero_words(candidate: Candidate) -> str:
    sizes, ranks = candidate.zero, candidate.data * candidate.context
    if sizes.params > 1:
        return ", FSDP"
    if sizes.grads > 1:
        return ", FSDP of gradients"
    return f", optimizer over {sizes.optimizer} of {ranks} ranks" if 1 < sizes.optimizer < ranks else ""


def _tiled_words(candidate: Candidate) -> str:
    return ", MLP and loss in tiles" if candidate.tiled_mlp else ", loss in tiles" if candidate.tiled_logits else ""
