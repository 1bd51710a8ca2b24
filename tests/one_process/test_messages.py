"""Who sends how many bytes to whom in which step: what runs is what the schedule says, on every rank."""

from __future__ import annotations

import functools
import threading
from collections import defaultdict

import pytest
import torch

from benchmarks.simulate import simulate
from megatron_loong import LoongConfig, LoongGroups, attention_2d, token_positions
from megatron_loong.comm.ring import Ring
from megatron_loong.comm.transport import Message, Pending
from megatron_loong.layout.sharding import layout_of
from megatron_loong.schedule.steps import Hop, ring_schedule
from megatron_loong.schedule.tiles import Mask

HEADS, KV_HEADS, WIDTH = 4, 1, 8
Sent = list[tuple[str, bool, int, int]]
"""(ring, whether sent, peer, bytes) of the messages posted together."""

CASES = {
    "single ring": (LoongConfig(4), None, None),
    "double ring": (LoongConfig(8, 1, 4), None, None),
    "inner rings of two": (LoongConfig(4, 1, 2), None, None),
    "2d": (LoongConfig(8, 2, 2), None, None),
    "window": (LoongConfig(8, 1, 4), 9, None),
    "documents": (LoongConfig(8, 1, 2), None, [0, 5, 31, 32, 64]),
    "contiguous": (LoongConfig(6, 1, 3, sequence_layout="contiguous"), None, None),
}


def messages_of(config: LoongConfig, window: int | None, documents: list[int] | None) -> list[list[Sent]]:
    """By cp_rank: what a forward and a backward pass post, call by call."""
    posted: dict[int, list[Sent]] = defaultdict(list)
    honest = Ring.post

    def post(ring: Ring, messages: list[Message]) -> list[Pending[None]]:
        posted[threading.get_ident()].append(
            sorted((ring.handle.name, x.send, x.peer, x.block.numel()) for x in messages)
        )
        return honest(ring, messages)

    def run(groups: LoongGroups) -> list[Sent]:
        posted.pop(threading.get_ident(), None)
        tokens = len(token_positions(config, groups.cp_rank, 64, cu_seqlens=documents))
        q, k, v = (torch.randn(1, tokens, n, WIDTH, requires_grad=True) for n in (HEADS, KV_HEADS, KV_HEADS))
        reach = None if window is None else (window, 0)
        out = attention_2d(q, k, v, groups, seq_len=64, window_size=reach, cu_seqlens=documents, kernel="reference")
        out.sum().backward()
        return posted[threading.get_ident()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ring, "post", post)
        return simulate(config, run)


@pytest.mark.parametrize("case", CASES)
def test_every_message_is_one_of_the_schedule(case: str) -> None:
    config, window, documents = CASES[case]
    heads, kv_heads = HEADS // config.head_parallel_size, 1
    # float32: k and v there and home, or (lse, out) of queries that move forward; backward q, dout, lse and delta.
    bytes_of = {
        ("sends", "kv", False): 4 * kv_heads * 2 * WIDTH,
        ("sends", "q", False): 4 * heads * WIDTH,
        ("return_sends", "q", False): 4 * heads * (WIDTH + 1),
        ("sends", "kv", True): 4 * kv_heads * 2 * WIDTH,
        ("return_sends", "kv", True): 4 * kv_heads * 2 * WIDTH,
        ("sends", "q", True): 4 * heads * (2 * WIDTH + 2),
        ("return_sends", "q", True): 4 * heads * WIDTH,
    }
    layout = layout_of(config, 64, documents)
    mask = Mask(window, 0)
    scheduled = functools.partial(ring_schedule, layout, layout, mask, config.inner_ring_size or 1)
    for cp_rank, posted in enumerate(messages_of(config, window, documents)):
        expected: list[Sent] = []
        for backward in (False, True):
            for step in scheduled().steps(cp_rank // config.head_parallel_size, backward):
                for kind, suffix in (("", ""), ("return_", "_dkv")):
                    for ring in ("inner", "outer"):
                        ends = [
                            (f"{ring}{suffix}", end == "sends", hop.peer, _bytes(hop, kind, backward, bytes_of))
                            for end in ("sends", "receives")
                            for hop in getattr(step, kind + end)
                            if hop.ring == ring
                        ]
                        expected += [sorted(ends)] if ends else []
        assert posted == expected, f"rank {cp_rank}"
        assert posted or config.ring_size == 1


def _bytes(hop: Hop, kind: str, backward: bool, bytes_of: dict[tuple[str, str, bool], int]) -> int:
    return hop.row_count * bytes_of[f"{kind}sends", hop.moving, backward]
