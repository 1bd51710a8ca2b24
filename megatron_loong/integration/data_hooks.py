"""Hooks where Megatron reads the layout of tokens: batch, MTP, Mamba, loss, pipeline buffers; `rotary` has more.

Each takes the original and returns what stands in its place. The original runs wherever attention is native.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

import megatron_loong.integration.lengths as lengths
import megatron_loong.integration.loss as loss
import megatron_loong.integration.packed as packed
import megatron_loong.integration.reset_mask as reset_mask
from megatron_loong.config import LoongConfig
from megatron_loong.integration.refusals import refuse_first
from megatron_loong.integration.runtime import Runtime, active
from megatron_loong.layout.sharding import documents_of

Hook = Callable[[Runtime, Callable[..., Any]], Callable[..., Any]]


def slice_packed_batch(batch: dict[str, Any], cp_group: Any = None) -> dict[str, Any]:
    """This rank's tokens of a packed batch, for programs that do not call Megatron's `get_batch_on_this_cp_rank`.

    `batch`: tensors [1, T, ...] and `cu_seqlens` (or `cu_seqlens_padded`) for all T tokens; `cp_group`: Megatron's, if
    not given. Padded at its end where the ranks cannot share out T tokens. Call it once the model has been built.
    Raises `ValueError` without boundaries, and for those that do not end at T.
    """
    state = active()
    cp_group = _cp_group(state, cp_group)
    cu_seqlens = _boundaries(batch)
    if cu_seqlens is None:
        raise ValueError(f"a packed batch needs cu_seqlens; this one has {sorted(batch)}")
    if packed.layout_config(state, cp_group.size()) is None:
        raise ValueError("--context-parallel-impl loong is not in use here, so there is no layout to cut a batch by")
    return slice_batch(state, batch, cp_group, cu_seqlens)


def slice_batch(state: Runtime, batch: dict[str, Any], cp_group: Any, cu_seqlens: torch.Tensor) -> dict[str, Any]:
    """This rank's tokens of a packed batch (tensors [1, T, ...]), padded at its end where the ranks need it."""
    config = packed.layout_config(state, cp_group.size())
    assert config is not None  # the hooks ask first
    refuse_first("packs", state.args(), pack_layout=config.pack_layout)
    documents = packed.boundaries_of(cu_seqlens)
    tokens = next((x.shape[1] for key, x in batch.items() if key in lengths.LENGTH_KEYS and x is not None), None)
    if tokens is not None:
        documents_of(documents, tokens)
    batch = lengths.pad_batch(state, batch, cp_group.size())
    state.sliced_packs = True
    return lengths.without_padding_mask(state, _cut(batch, config, cp_group, documents))


def _cut(batch: dict[str, Any], config: LoongConfig, cp_group: Any, documents: tuple[int, ...] | None) -> Any:
    """`batch`, with this rank's tokens of every tensor that has some; `documents` as for `packed.local_places`."""
    for key, x in batch.items():
        if key in lengths.METADATA or x is None or (key == "attention_mask" and documents):
            continue
        dim = 2 if key == "attention_mask" else 1  # [b, 1, S, S]: the rows of this rank's queries
        places = packed.local_places(config, cp_group.rank(), x.shape[dim], documents, x.device)
        batch[key] = x.index_select(dim, places.in_pack)
    return batch


def _hook_slice_sequence(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def slice_sequence(batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        cp_group = _cp_group(state, args[0] if args else kwargs.get("cp_group"))
        if state.hybrid and batch.get("local_cp_size") is not None:
            # Masking between documents (0.19) keeps Megatron from looking at the size: it hands the static group.
            size = int(batch["local_cp_size"])
            if size == 1:
                return batch
            cp_group = state.megatron.parallel_state.get_hybrid_data_context_parallel_groups(group_size=size)
            batch["hybrid_cp_group"] = cp_group
        if packed.layout_config(state, cp_group.size()) is None:
            return original(batch, *args, **kwargs)
        cu_seqlens = _boundaries(batch)
        if cu_seqlens is None and reset_mask.asked(state):
            batch, cu_seqlens = reset_mask.as_one_pack(batch)
            batch = slice_batch(state, batch, cp_group, cu_seqlens)
            state.documents_of[batch["tokens"]] = cu_seqlens
            return batch
        # Masking between documents keeps cu_seqlens per document but cuts the whole sequence in zigzag (upstream
        # issue 6156); here a batch with documents is always cut by them.
        if cu_seqlens is not None:
            return slice_batch(state, batch, cp_group, cu_seqlens)
        batch = lengths.pad_batch(state, batch, cp_group.size())
        if contiguous := packed.contiguous_config(state, cp_group.size()):
            batch = _cut(batch, contiguous, cp_group, None)
        else:
            batch = original(batch, *args, **kwargs)
        return lengths.without_padding_mask(state, batch)

    return slice_sequence


def _hook_slice_packed(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def slice_packed(batch: dict[str, Any], cp_group: Any, **kwargs: Any) -> Any:
        cu_seqlens = _boundaries(batch)
        if packed.layout_config(state, cp_group.size()) is None or cu_seqlens is None:
            return original(batch, cp_group, **kwargs)
        return slice_batch(state, batch, cp_group, cu_seqlens)

    return slice_packed


def _hook_slice_thd(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    """Before 0.18 one function made the slice and the `PackedSeqParams`."""

    @functools.wraps(original)
    def slice_thd(batch: Any, cu_seqlens: Any, cu_seqlens_padded: Any, max_seqlen: Any, *args: Any, **kw: Any) -> Any:
        cp_group = _cp_group(state, None)
        if args or kw or packed.layout_config(state, cp_group.size()) is None:
            return original(batch, cu_seqlens, cu_seqlens_padded, max_seqlen, *args, **kw)
        whole, params = original(batch, cu_seqlens, cu_seqlens_padded, max_seqlen, cp_size=1, cp_rank=0)
        boundaries = cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded
        return slice_batch(state, whole, cp_group, boundaries), params

    return slice_thd


def _boundaries(batch: dict[str, Any]) -> torch.Tensor | None:
    padded = batch.get("cu_seqlens_padded")
    return batch.get("cu_seqlens") if padded is None else padded


def _cp_group(state: Runtime, given: Any) -> Any:
    return state.megatron.parallel_state.get_context_parallel_group() if given is None else given


def _hook_roll_packed(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _roll_tensor_packed_seq(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        cp_group, tensor, shifts, dims = (given[name] for name in ("cp_group", "tensor", "shifts", "dims"))
        config = None if cp_group is None else packed.layout_config(state, cp_group.size())
        if config is None:
            return original(*args, **kwargs)
        _check_roll("a packed tensor", tensor, shifts, dims)
        documents = packed.boundaries_of(_padded_boundaries(given["packed_seq_params"]))
        result, total = packed.rolled(tensor, documents, config, cp_group)
        return result, total if given.get("return_sum", True) else None  # the flag: after 0.19

    return _roll_tensor_packed_seq


def _check_roll(what: str, tensor: torch.Tensor, shifts: int, dims: int) -> None:
    if shifts != -1 or dims not in (-1, tensor.dim() - 1):
        raise NotImplementedError(
            f"rolling {what} by {shifts} along dimension {dims} does not work with --context-parallel-impl loong; "
            "supported: by -1 along the last"
        )


def _hook_roll(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    """MTP divides its loss by the sum of the rolled mask: make that the mean of the ranks, see `integration.loss`.

    Of one sequence in contiguous pieces the roll itself is ours, for Megatron's exchanges the ends of zigzag's chunks.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def roll_tensor(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        tensor, cp_group = given["tensor"], given["cp_group"]
        if tensor is None or cp_group is None or given["packed_seq_params"] is not None:
            return original(*args, **kwargs)
        if contiguous := packed.contiguous_config(state, cp_group.size()):
            _check_roll("a tensor of contiguous pieces", tensor, given["shifts"], given["dims"])
            result, total = packed.rolled(tensor, None, contiguous, cp_group)
            return result, total if given.get("return_sum", True) else None
        result, total = original(*args, **kwargs)
        if (
            total is not None
            and tensor.is_floating_point()
            and packed.layout_config(state, cp_group.size()) is not None
        ):
            total = loss.sum_over(total, cp_group) / cp_group.size()
        return result, total

    return roll_tensor


def _hook_mtp_loss(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    """`process_mtp_loss` (0.17 on) that counts the tokens of all ranks where Megatron counts this rank's.

    Each token with a loss is given the weight cp: then the sum of a rolled mask, which our rolls make the mean of the
    ranks, is the number of all tokens, and Megatron's `clamp(min=1)` of it as on one rank. What Megatron then averages
    over the ranks (gradients, logged losses) is one rank's.
    """
    signature = inspect.signature(original)
    mtp = importlib.import_module(original.__module__)

    @functools.wraps(original)
    def process_mtp_loss(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        cp_group, labels, mask = given.get("cp_group"), given["labels"], given.get("loss_mask")
        if cp_group is None or packed.layout_config(state, cp_group.size()) is None:
            return original(*args, **kwargs)
        roll = functools.partial(mtp.roll_tensor, cp_group=cp_group, packed_seq_params=given.get("packed_seq_params"))
        tokens = given.get("input_ids") if labels is None else labels
        if tokens is None:
            return original(*args, **kwargs)
        mask = torch.ones_like(tokens, dtype=torch.float32) if mask is None else mask.float()
        if labels is None:  # as Megatron derives them from input_ids
            labels, mask = roll(tokens)[0], roll(mask)[0]
        given.update(labels=labels, loss_mask=mask * cp_group.size())
        if given["config"].calculate_per_token_loss:
            # Here gradients are summed over the ranks and divided by the tokens of the main loss. Megatron makes up for
            # that by this rank's number of them; by all of them, it is the average times that number.
            config = given["config"] = copy.copy(given["config"])
            config.calculate_per_token_loss = False
            config.mtp_loss_scaling_factor *= loss.sum_over(mask.sum(), cp_group) / cp_group.size()
        return original(*bound.args, **bound.kwargs)

    return process_mtp_loss


def _hook_calc_loss(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward_step_calc_loss(*args: Any, **kwargs: Any) -> Any:
        if not state.groups.configs():
            return original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        cp_group = _cp_group(state, None)
        loss_func = given["loss_func"]
        if (
            loss_func is not None
            and not given["collect_non_loss_data"]
            and not given["config"].calculate_per_token_loss
            and packed.layout_config(state, cp_group.size()) is not None
        ):
            given["loss_func"] = loss.weighed_by_tokens(loss_func, cp_group)
        return original(**given)

    return forward_step_calc_loss


def _padded_boundaries(packed_seq_params: Any) -> torch.Tensor:
    padded = packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q if padded is None else padded


def _hook_mamba_order(reorder: Callable[..., torch.Tensor]) -> Hook:
    def hook(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def attention_load_balancing(
            input_: torch.Tensor, cp_size: int, packed_seq_params: Any = None, **kwargs: Any
        ) -> Any:
            if packed_seq_params is None and packed.contiguous_config(state, cp_size):
                return input_  # one rank behind the other is the order of the sequence
            config = None if packed_seq_params is None else packed.layout_config(state, cp_size)
            if config is None:
                return original(input_, cp_size, packed_seq_params, **kwargs)
            # Megatron numbers the tokens' documents for Mamba before the batch is cut, and so without our padding.
            numbered = getattr(packed_seq_params, "seq_idx", None)
            if numbered is not None and numbered.shape[-1] != input_.shape[0]:
                raise NotImplementedError(
                    f"a pack of {numbered.shape[-1]} tokens was padded to {input_.shape[0]}, which does not work with "
                    "Mamba layers and --context-parallel-impl loong; supported: packs of a multiple of 2 x "
                    "--context-parallel-size tokens"
                )
            return reorder(input_, _padded_boundaries(packed_seq_params), config)

        return attention_load_balancing

    return hook


def _hook_pipeline(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    """Pipeline stages exchange buffers of the padded length."""

    @functools.wraps(original)
    def forward_backward(*args: Any, **kwargs: Any) -> Any:
        # Without groups of ours there is no 2D-Attention here, and perhaps no model parallelism at all.
        if state.groups.configs() and packed.layout_config(state, _cp_group(state, None).size()) is not None:
            for name in ("seq_length", "decoder_seq_length"):
                if kwargs.get(name) is not None:
                    kwargs[name] = lengths.length_for_megatron(state, kwargs[name])
        return original(*args, **kwargs)

    return forward_backward


HOOKS: dict[str, Hook] = {
    "slice_sequence": _hook_slice_sequence,
    "slice_packed": _hook_slice_packed,
    "slice_thd": _hook_slice_thd,
    "roll": _hook_roll,
    "mtp_loss": _hook_mtp_loss,
    "roll_packed": _hook_roll_packed,
    "calc_loss": _hook_calc_loss,
    "mamba_undo": _hook_mamba_order(packed.in_order_of_the_pack),
    "mamba_redo": _hook_mamba_order(packed.in_order_of_ranks),
    "pipeline": _hook_pipeline,
    "pipeline_interleaved": _hook_pipeline,
}
