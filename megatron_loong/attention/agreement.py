"""Whether the ranks of a context-parallel group call attention with the same arguments.

Every rank works out the schedule from its own arguments. Where these differ, ranks wait for messages that nobody sends,
or compute with different masks. So the arguments are compared before anything else is sent, once for each kind of call;
later calls of a kind cost one look into a set. `LOONG_CHECK=1` compares at every call.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from megatron_loong.attention.options import AttentionOptions, CallArguments
from megatron_loong.comm.groups import LoongGroups
from megatron_loong.comm.sequence import gathered
from megatron_loong.layout.ranks import coordinates_of, logical_rank_of

#: After this many kinds of call new ones are not compared: an argument seems to change from step to step.
MOST_KINDS = 64

_DIGEST, _TEXT = 16, 64
_WHAT = "the arguments of attention_2d (ranks that made such a call before do not take part)"

Kind = tuple[Any, ...]


def kind_of(tensors: tuple[object, ...], options: AttentionOptions, arguments: CallArguments) -> Kind | None:
    """The key of a kind of call, None for arguments that no call can have.

    It has the options, which other arguments are given, and dtypes and shapes without lengths and batch size.
    """
    try:
        kind = (
            *options.said().values(),
            *[x is None for x in arguments],
            *[y for x in tensors for y in (x.dtype, x.shape[-2:])],  # type: ignore[attr-defined]
        )
        hash(kind)
    except (AttributeError, TypeError):
        return None
    return kind


def is_known(groups: LoongGroups, kind: Kind | None) -> bool:
    """Whether a kind of call was compared before and is not compared again."""
    return kind is not None and kind in getattr(groups, "known_kinds", ()) and not groups.always_compare


def can_be_told(groups: object, tensors: tuple[object, ...]) -> bool:
    """Whether all ranks are about to compare, so that one whose arguments are wrong can tell the others.

    They are in the first call, when no kind is known, and with `LOONG_CHECK=1`. Later a wrong argument makes a kind
    that is new on this rank only, and the others would not answer.
    """
    if not isinstance(groups, LoongGroups) or not all(isinstance(x, torch.Tensor) and x.dim() for x in tensors):
        return False
    return groups.cp_rank is not None and (groups.always_compare or not groups.known_kinds)


def compare(
    groups: LoongGroups,
    kind: Kind | None,
    tensors: tuple[torch.Tensor, ...],
    options: AttentionOptions,
    arguments: CallArguments,
    fault: ValueError | None = None,
) -> list[list[int]] | None:
    """Raise one `ValueError` on every rank when they disagree; else, where they were compared, the lengths they hold.

    tensors: q, k, v, sequence first. fault: what is wrong with this rank's arguments; raised here, on every rank.
    Collective where it compares; the lengths are those of q and k by logical rank.
    """
    # Inside a graph that is recorded no collective may run, and its replays could not raise. With too many kinds the
    # comparison would cost every step a collective that makes the host wait.
    skipped = (len(groups.known_kinds) >= MOST_KINDS and not groups.always_compare) or _is_recorded(tensors[0])
    handles = [groups.handle(name) for name in ("head", "inner", "outer")]
    alone = not any(isinstance(handle.process_group, dist.ProcessGroup) for handle in handles)
    if skipped or alone:
        if fault:
            raise fault
        if not skipped:
            groups.known_kinds.add(kind)  # one rank, or others that are played
        return None
    said = options.said() | arguments.said() | {"the fault found": fault or "none"}
    said |= {f"{name}.dtype": x.dtype for name, x in zip("qkv", tensors, strict=True)}
    said |= {f"shape of {name} but its length": list(x.shape[1:]) for name, x in zip("qkv", tensors, strict=True)}
    # One row of bytes for each argument: a hash to compare and the beginning of its text to show. The last row has the
    # lengths, which may differ.
    rows = [_digest(_shown(x)) for x in said.values()]
    lengths = torch.tensor([x.shape[0] for x in tensors[:2]]).view(torch.uint8)
    mine = torch.zeros(len(rows) + 1, _DIGEST + _TEXT, dtype=torch.uint8)
    mine[:-1] = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), -1)
    mine[-1, : len(lengths)] = lengths
    everyone = gathered(mine, groups, _WHAT, tensors[0].device).cpu()
    differing = [i for i in range(len(rows)) if (everyone[:, i] != everyone[0, i]).any()]
    if differing:
        told = "; ".join(_told(name, everyone[:, i], groups) for i, name in enumerate(said) if i in differing)
        raise ValueError(
            f"the ranks of the context-parallel group {list(groups.cp_global_ranks)} disagree in the arguments of "
            f"attention_2d, which must be the same on all of them: {told}"
        )
    if fault:
        raise fault  # alike on every rank
    groups.known_kinds.add(kind)
    return everyone[:, -1, : len(lengths)].contiguous().view(torch.int64).tolist()


def _is_recorded(q: torch.Tensor) -> bool:
    """Whether this is a trace with fake tensors or the capture of a CUDA graph, where no collective may run."""
    return isinstance(q, FakeTensor) or q.is_meta or (q.is_cuda and torch.cuda.is_current_stream_capturing())


def _shown(value: Any) -> str:
    return str(_plain(value))


def _plain(value: Any) -> Any:
    """Boundaries and windows may come as tuples, lists, arrays or rows of tensors: they are compared as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(x) for x in value] if isinstance(value, (tuple, list)) else value


def _digest(text: str) -> bytes:
    raw = text.encode()
    return hashlib.blake2b(raw, digest_size=_DIGEST).digest() + raw[:_TEXT].ljust(_TEXT, b"\0")


def _told(name: str, rows: torch.Tensor, groups: LoongGroups) -> str:
    """An argument, and which ranks gave what."""
    config, by_value = groups.config, {}
    for cp_rank, global_rank in enumerate(groups.cp_global_ranks):
        row = bytes(rows[logical_rank_of(config, coordinates_of(config, cp_rank))].tolist())
        by_value.setdefault(row, []).append(global_rank)
    values = []
    for row, ranks in by_value.items():
        text = row[_DIGEST:].rstrip(b"\0")
        shown = text.decode(errors="replace") + ("..." if len(text) == _TEXT else "")
        values.append(f"{shown} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}")
    return f"{name} is {' and '.join(values)}"
