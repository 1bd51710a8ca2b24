"""Sequence lengths that the ranks cannot share out evenly: each batch is padded at its end, and nothing else changes.

A padding token is token 0 with loss mask 0. Causally no real token attends to it, so losses and gradients are those of
the unpadded batch. Megatron refuses such a length before it looks at anything else, and gives its pipeline
buffers of `seq_length // cp` tokens; both are told here. Under fp8 and fp4 matrix products want multiples of 16 or 32
tokens on a rank, which is one more condition on the length.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_loong.integration.low_precision import asked, rows_multiple
from megatron_loong.integration.runtime import Runtime

#: Of a batch: what describes it and has no sequence dimension.
METADATA = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")

#: What does not work with padding: an attribute of Megatron's args, whether it is on, and why.
_BESIDE_PADDING = (
    ("qk_clip", bool, "--qk-clip: padding would count in the greatest logit"),
    ("log_max_attention_logit", bool, "--log-max-attention-logit: padding would count in it"),
    ("tp_comm_overlap", bool, "--tp-comm-overlap: its buffers have the unpadded length"),
    ("cuda_graph_impl", lambda x: x not in (None, "none"), "--cuda-graph-impl: graphs have the unpadded length"),
    ("enable_cuda_graph", bool, "--enable-cuda-graph: graphs have the unpadded length"),
    ("external_cuda_graph", bool, "--external-cuda-graph: graphs have the unpadded length"),
)


#: The same where there are experts. They are told which tokens are padding, for the router's load-balancing losses.
_BESIDE_PADDED_EXPERTS = (
    (
        "pipeline_model_parallel_size",
        lambda n: (n or 1) > 1,
        "--pipeline-model-parallel-size: later stages get no tokens",
    ),
    ("sequence_parallel", bool, "--sequence-parallel: not tried"),
    ("mtp_num_layers", bool, "--mtp-num-layers: its experts would count the last token in or out"),
    ("moe_z_loss_coeff", bool, "--moe-z-loss-coeff: it averages on each rank, whatever the ranks hold"),
    ("moe_router_enable_expert_bias", bool, "--moe-router-enable-expert-bias: padding would count in it"),
    ("moe_expert_capacity_factor", lambda x: x is not None, "--moe-expert-capacity-factor: padding would take places"),
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
    for attribute, is_on, why in (*_BESIDE_PADDING, *_of_experts(args)):
        if is_on(getattr(args, attribute, None)):
            below = seq_len // multiple * multiple
            raise NotImplementedError(
                f"--seq-length {seq_len} is not a multiple of {multiple} ({why_multiple}), so batches "
                f"would be padded, which does not work with {why}; the nearest that need none are "
                f"{f'{below} and ' if below else ''}{below + multiple}"
            )
    if seq_len % (2 * cp):
        args.encoder_seq_length, args.seq_length = seq_len, None


def _of_experts(args: Any) -> Iterable[tuple[str, Callable[[Any], bool], str]]:
    """What does not work with padding beside the experts of `args`."""
    if not getattr(args, "num_experts", None):
        return ()
    kinds, coefficients = (
        x if isinstance(x, (list, tuple)) else [x]
        for x in (getattr(args, f"moe_{name}", None) for name in ("router_load_balancing_type", "aux_loss_coeff"))
    )
    odd = next((x for x in kinds if x not in (None, "none", "aux_loss", "seq_aux_loss", "global_aux_loss")), None)
    why_odd = f"--moe-router-load-balancing-type {odd}: it would balance padding too"
    per_token = "--calculate-per-token-loss and --moe-aux-loss-coeff: each rank weighs that loss by its own tokens"
    return (
        *_BESIDE_PADDED_EXPERTS,
        ("moe_router_load_balancing_type", lambda _: odd is not None, why_odd),
        ("calculate_per_token_loss", lambda on: bool(on and any(coefficients)), per_token),
    )


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
    padded = {key: x if key in METADATA or x is None else _padded(key, x, missing) for key, x in batch.items()}
    some = next(x for key, x in padded.items() if x is not None and key in LENGTH_KEYS)
    is_padding = torch.arange(some.shape[1], device=some.device) >= seq_len
    return {**padded, PADDING_MASK: is_padding.expand(some.shape[0], -1).contiguous()}


#: Of a padded batch until it has been cut: which tokens are padding, bool [b, S].
PADDING_MASK = "loong_padding_mask"


def without_padding_mask(state: Runtime, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch that has been cut, as the program knows it; which tokens are padding is kept for `model_forward`."""
    is_padding, tokens = batch.pop(PADDING_MASK, None), batch.get("tokens")
    if is_padding is not None and tokens is not None:
        state.padding_of[tokens] = is_padding
    return batch


def model_forward(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    """`GPTModel.forward` whose experts are told which of the tokens are padding of `pad_batch`."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        tokens = given.arguments.get("input_ids")
        if tokens is None or not getattr(self.config, "num_moe_experts", None):
            return original(self, *args, **kwargs)
        is_padding = state.padding_of.get(tokens)
        length = getattr(state.args(), "seq_length", None)
        if is_padding is not None:
            given.arguments["padding_mask"] = is_padding
        elif state.padded and length is not None and length_for_megatron(state, length) != length:
            raise NotImplementedError(
                f"sequences of {length} tokens are padded, and the experts are not told where; supported: batches cut "
                "by megatron.core.utils.get_batch_on_this_cp_rank whose tokens go to GPTModel as they are, or a "
                f"--seq-length of {length_for_megatron(state, length)}"
            )
        return original(*given.args, **given.kwargs)

    return forward


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
