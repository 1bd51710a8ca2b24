"""Sequence lengths that the ranks cannot share out evenly: each batch is padded at its end, and nothing else changes.

A padding token is token 0 with loss mask 0. Causally no real token attends to it, so losses and gradients are those of
the unpadded batch. Megatron refuses such a length before it looks at anything else, and gives its pipeline
buffers of `seq_length // cp` tokens; both are told here. Under fp8 and fp4 matrix products want multiples of 16 or 32
tokens on a rank, which is one more condition on the length.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from megatron_loong.integration.low_precision import asked, rows_multiple

if TYPE_CHECKING:
    from megatron_loong.integration.runtime import Runtime

#: Of a batch: what describes it and has no sequence dimension.
METADATA = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")

#: What does not work with padding: an attribute of Megatron's args, whether it is on, and why.
_BESIDE_PADDING = (
    ("num_experts", bool, "--num-experts: padding would be routed, and count in the router's losses"),
    ("qk_clip", bool, "--qk-clip: padding would count in the greatest logit"),
    ("log_max_attention_logit", bool, "--log-max-attention-logit: padding would count in it"),
    ("tp_comm_overlap", bool, "--tp-comm-overlap: its buffers have the unpadded length"),
    ("cuda_graph_impl", lambda x: x not in (None, "none"), "--cuda-graph-impl: graphs have the unpadded length"),
    ("enable_cuda_graph", bool, "--enable-cuda-graph: graphs have the unpadded length"),
    ("external_cuda_graph", bool, "--external-cuda-graph: graphs have the unpadded length"),
)


def length_multiple(cp: int, tp: int = 1, rows: int = 1) -> int:
    """What a length must be a multiple of, for Megatron's zigzag over `cp` ranks.

    `tp`: ranks of sequence parallelism; `rows`: what the tokens of a rank must be a multiple of.
    """
    return cp * math.lcm(2, tp * rows)


def padded_length(seq_len: int, cp: int, tp: int = 1, rows: int = 1) -> int:
    """The next length that the ranks can share out; arguments as for `length_multiple`.

    >>> padded_length(30, cp=4)
    32
    >>> padded_length(30, cp=4, tp=8)
    32
    >>> padded_length(34, cp=4, tp=8)
    64
    """
    multiple = length_multiple(cp, tp, rows)
    return -(-seq_len // multiple) * multiple


def length_for_megatron(state: Runtime, seq_len: int, cp: int | None = None) -> int:
    """`padded_length` for the ranks of this process; `cp`: those that share a micro-batch, if not all of CP."""
    parallel_state = state.megatron.parallel_state
    args = state.args()
    tp = parallel_state.get_tensor_model_parallel_world_size()
    if args is not None and not getattr(args, "sequence_parallel", False):
        tp = 1
    return padded_length(seq_len, cp or parallel_state.get_context_parallel_world_size(), tp, rows_multiple(args))


def let_megatron_accept(args: Any) -> None:
    """Move a `--seq-length` that 2 x CP does not divide to `--encoder-seq-length`, which Megatron takes for the same.

    `validate_args` asserts the multiple of the first alone, and then sets the first from the second. Raises
    `NotImplementedError` for what cannot be padded.
    """
    seq_len, cp = getattr(args, "seq_length", None), getattr(args, "context_parallel_size", 1)
    if seq_len is None or getattr(args, "encoder_seq_length", None) is not None:
        return
    multiple, why_multiple = length_multiple(cp, rows=rows_multiple(args)), f"2 x --context-parallel-size {cp}"
    if multiple > 2 * cp:
        why_multiple = f"{multiple // cp} tokens a rank for {asked(args)} x --context-parallel-size {cp}"
    if seq_len % multiple == 0:
        return
    for attribute, is_on, why in _BESIDE_PADDING:
        if is_on(getattr(args, attribute, None)):
            below = seq_len // multiple * multiple
            raise NotImplementedError(
                f"--seq-length {seq_len} is not a multiple of {multiple} ({why_multiple}), so batches "
                f"would be padded, which does not work with {why}; the nearest that need none are "
                f"{f'{below} and ' if below else ''}{below + multiple}"
            )
    if seq_len % (2 * cp):
        args.encoder_seq_length, args.seq_length = seq_len, None


def _what_is_padded(state: Runtime, seq_len: int, missing: int) -> str:
    """For the log, which says a thing once: with sequences of every length no numbers."""
    if state.hybrid:
        return "sequences are padded at their end to a length"
    return f"sequences of {seq_len} tokens are padded at their end to {seq_len + missing}"


def pad_batch(state: Runtime, batch: dict[str, Any], cp: int | None = None) -> dict[str, Any]:
    """`batch` (tensors [b, S, ...]; attention_mask [b, 1, S, S]) with S padded to what `cp` ranks can share out.

    Padding: token 0, label 0, loss mask 0, the last position id once more (learned position embeddings may have no row
    behind it), masked in the attention mask. The same dictionary when nothing is to be padded.
    """
    seq_len = next((x.shape[1] for key, x in batch.items() if x is not None and key in LENGTH_KEYS), None)
    if seq_len is None:
        return batch
    missing = length_for_megatron(state, seq_len, cp) - seq_len
    if not missing:
        return batch
    if batch.get("labels") is not None and batch.get("loss_mask") is None:
        raise ValueError(
            f"a batch of {seq_len} tokens must be padded by {missing}, which needs a loss_mask in it; add one, or use "
            f"sequences of {seq_len + missing} tokens"
        )
    state.padded = True
    state.say(
        f"{_what_is_padded(state, seq_len, missing)}, which the context-parallel ranks can share out; padding takes no "
        "part in attention or loss"
    )
    return {key: x if key in METADATA or x is None else _padded(key, x, missing) for key, x in batch.items()}


#: Of a batch: what has a token in each place.
LENGTH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def _padded(key: str, x: torch.Tensor, missing: int) -> torch.Tensor:
    if key == "attention_mask":
        return torch.nn.functional.pad(x, (0, missing, 0, missing), value=1)
    shape = [x.shape[0], missing, *x.shape[2:]]
    padding = x[:, -1:].expand(shape) if key == "position_ids" else x.new_zeros(shape)
    return torch.cat([x, padding], 1)


def refuse_seen_padding(state: Runtime, causal: bool) -> None:
    """Raise `NotImplementedError` when attention that is not causal would see the padding of `pad_batch`."""
    if causal:
        return
    args = state.args()
    seq_len = getattr(args, "seq_length", None)
    # A pipeline stage in the middle pads no batch itself, but knows the length.
    if state.padded or (seq_len is not None and length_for_megatron(state, seq_len) != seq_len):
        raise NotImplementedError(
            "attention that is not causal would see the padding of a sequence that the context-parallel ranks cannot "
            "share out evenly; supported: a --seq-length that is a multiple of 2 x --context-parallel-size"
        )
