"""Packed sequences (`thd`) inside Megatron: one layout for the batch, the rotary embedding, MTP, Mamba and attention.

Megatron tells each of them the documents of a micro-batch by a `cu_seqlens` tensor, the padded one where there are two.
All read the layout from those boundaries here, and so agree:

    batch slice | rotary embedding | MTP's roll | Mamba's order | attention   <- local_places / packed_arguments
                                       layout_of(config, tokens, boundaries)  <- boundaries_of(cu_seqlens)

Padding behind a document's real tokens belongs to that document for all but attention, which passes over it where
`PackedSeqParams` tells both boundaries. What the plugin pads at the end of a batch (`integration.lengths`) is a
document of its own (`to_the_end`).
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

import megatron_loong.integration.lengths as lengths
from megatron_loong.config import LoongConfig
from megatron_loong.integration.refusals import refuse_first
from megatron_loong.integration.runtime import Runtime
from megatron_loong.layout.packing import checked_boundaries, without_empty
from megatron_loong.layout.sharding import documents_of, token_positions

#: Base tensor -> its version, and (offset, length) of a view of it -> boundaries. Megatron hands views around.
_read: Any = WeakTensorKeyDictionary()


def boundaries_of(cu_seqlens: torch.Tensor) -> tuple[int, ...]:
    """`cu_seqlens` ([documents + 1] or [1, documents + 1]) as numbers, without empty documents.

    Waits for the device at the first call for a tensor or a view of it, and not again until it is written to.
    Raises `ValueError` unless the boundaries ascend from 0.
    """
    return _boundaries_of(cu_seqlens)[1]


def _boundaries_of(cu_seqlens: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(boundaries with empty documents, the same without them)."""
    base = cu_seqlens if cu_seqlens._base is None else cu_seqlens._base
    # Tensors of inference mode do not say when they are written to: nothing is remembered of them.
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    known, views = _read.get(base, (None, {}))
    if version is None or known != version:
        views = {}
        _read[base] = version, views
    view = (cu_seqlens.storage_offset(), cu_seqlens.numel())
    if view not in views:
        if cu_seqlens.numel() != cu_seqlens.shape[-1]:
            raise ValueError(
                f"cu_seqlens has shape {list(cu_seqlens.shape)}: a packed micro-batch is one row; use "
                "--micro-batch-size 1, or join the rows first"
            )
        documents = checked_boundaries(cu_seqlens.flatten())
        views[view] = documents, without_empty(documents)
    return views[view]


def to_the_end(documents: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """Boundaries of a pack of `tokens`, behind whose documents the plugin has padded."""
    return documents if documents[-1] >= tokens else (*documents, tokens)


class LocalPlaces(NamedTuple):
    """Where a rank's tokens stand. All int64, [t]."""

    in_pack: torch.Tensor
    """In the whole pack, or sequence."""
    in_document: torch.Tensor
    next_in_pack: torch.Tensor
    """The token after it in its document; -1 for a document's last."""


@functools.lru_cache(maxsize=32)
def local_places(
    config: LoongConfig, cp_rank: int, tokens: int, documents: tuple[int, ...] | None, device: torch.device
) -> LocalPlaces:
    """Places of the tokens of `cp_rank` in a pack of `tokens` with boundaries `documents`, on `device`.

    None: in one sequence of so many tokens, which is laid out in another way than a pack of one document.
    """
    documents = documents and to_the_end(documents, tokens)
    in_pack = token_positions(config, cp_rank, tokens, cu_seqlens=documents)
    bounds = torch.tensor(documents or (0, tokens))
    document = torch.searchsorted(bounds, in_pack, right=True) - 1
    is_last = in_pack + 1 == bounds[document + 1]
    next_in_pack = torch.where(is_last, -1, in_pack + 1)
    return LocalPlaces(*(x.to(device) for x in (in_pack, in_pack - bounds[document], next_in_pack)))


@functools.lru_cache(maxsize=16)
def gathered_order(
    config: LoongConfig, tokens: int, documents: tuple[int, ...] | None, device: torch.device
) -> torch.Tensor:
    """Places in the pack, or sequence, of the tokens of all ranks, one rank behind the other: int64 [tokens]."""
    ranks, documents = range(config.context_parallel_size), documents and to_the_end(documents, tokens)
    return torch.cat([token_positions(config, rank, tokens, cu_seqlens=documents) for rank in ranks]).to(device)


def layout_config(state: Runtime, cp_size: int) -> LoongConfig | None:
    """The layout of 2D-Attention over `cp_size` ranks in this process; None where attention over them is native.

    Raises `ValueError` when layers share the ranks out in different ways: a batch can be cut in one way only.
    """
    if cp_size == 1:
        return None
    configs = [config for config in state.groups.configs() if config.context_parallel_size == cp_size]
    if not configs and state.options().loong:
        raise RuntimeError("2D-Attention was asked for, but no attention layer has been built yet: its layout is open")
    sizes = sorted({config.head_parallel_size for config in configs})
    if len(sizes) > 1:
        raise ValueError(
            f"packed sequences need one layout for all layers, but head-parallel sizes {sizes} are in use; give "
            "--loong-head-parallel-size as a number"
        )
    return configs[0] if configs else None


def contiguous_config(state: Runtime, cp_size: int) -> LoongConfig | None:
    """The layout over `cp_size` ranks where sequences lie in contiguous pieces; None where Megatron's zigzag holds."""
    configs = state.groups.configs() if cp_size > 1 else []
    of_size = (config for config in configs if config.context_parallel_size == cp_size)
    return next((config for config in of_size if config.sequence_layout == "contiguous"), None)


def packed_arguments(
    packed_seq_params: Any,
    local_tokens: int,
    cp_size: int,
    *,
    causal: bool = True,
    config: Any = None,
    state: Runtime | None = None,
    pack_layout: str = "dealt",
) -> dict[str, Any]:
    """What `attention_2d` is given for Megatron's `PackedSeqParams`: cu_seqlens, seq_len, cu_seqlens_kv if it differs.

    Where documents are padded, cu_seqlens is both boundaries, so that attention passes over the padding.

    `local_tokens`: query tokens of this rank; `config`: the layer's TransformerConfig; `state`: the installed plugin,
    if it cuts the batches; `pack_layout`: that of the groups, where there is no plugin. Waits for the device at the
    first layer of a micro-batch only. Raises
    `NotImplementedError` for another format than `thd`, for padded documents in cross-attention without causal
    masking, and for what else in the model would misread the layout; `RuntimeError` when our layout is asked for and
    the plugin has cut no packed batch, so that the tokens are not where they should be; `ValueError` for boundaries
    that end before the tokens do, but for padding of the plugin's own.
    """
    if packed_seq_params.qkv_format != "thd":
        raise NotImplementedError(
            f"packed_seq_params.qkv_format={packed_seq_params.qkv_format!r} does not work with --context-parallel-impl "
            "loong; supported: 'thd'"
        )
    layout = layout_config(state, cp_size) if state is not None else None
    if state is not None and layout is not None:
        _require_slices(state, layout)
        mode = getattr(packed_seq_params, "cp_partition_mode", "zigzag")  # after 0.19, zigzag by default
        if mode not in ("zigzag", layout.pack_layout):
            raise ValueError(
                f"packed_seq_params.cp_partition_mode={mode!r}, but --loong-pack-layout {layout.pack_layout}: the "
                f"batch was cut in another way; give --loong-pack-layout {mode}"
            )
    refuse_first("packs", config, pack_layout=pack_layout if layout is None else layout.pack_layout)
    (real, documents, compact), (kv_real, kv_documents, _) = (_side(packed_seq_params, side) for side in ("q", "kv"))
    alike, padded = (real, documents) == (kv_real, kv_documents), (real, kv_real) != (documents, kv_documents)
    if padded and not alike and not causal:
        raise NotImplementedError(
            "cross-attention that is not causal would see the padding of documents (cu_seqlens_*_padded differs from "
            "cu_seqlens_*) with --context-parallel-impl loong; supported: documents without padding (leave "
            "cu_seqlens_*_padded out; 2D-Attention needs none), self-attention, or causal attention"
        )
    tokens = local_tokens * cp_size
    if documents[-1] != tokens:
        if state is None or lengths.length_for_megatron(state, documents[-1], cp_size) != tokens:
            documents_of(documents, tokens, "packed_seq_params.cu_seqlens_q")
        # The plugin's padding is one document more, and documents stay pairs of queries and keys.
        documents, compact = to_the_end(documents, tokens), to_the_end(compact, tokens)
        real, kv_documents = (*real, real[-1]), (*kv_documents, kv_documents[-1])
    if alike:
        return {"cu_seqlens": (real, documents) if padded else compact, "seq_len": tokens}
    arguments: dict[str, Any] = {"cu_seqlens": documents, "seq_len": tokens}
    if kv_documents != documents:
        arguments.update(cu_seqlens_kv=kv_documents, kv_seq_len=kv_documents[-1])
    return arguments


def _side(packed_seq_params: Any, side: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of queries or keys: running sums of the documents' lengths, where they begin, and that without empty ones."""
    real = getattr(packed_seq_params, f"cu_seqlens_{side}")
    padded = getattr(packed_seq_params, f"cu_seqlens_{side}_padded", None)
    padded = real if padded is None else padded
    documents, compact = _boundaries_of(padded)
    return documents if real is padded else _boundaries_of(real)[0], documents, compact


def _require_slices(state: Runtime, layout: LoongConfig) -> None:
    """Raise `RuntimeError` where our layout of packs is asked for, and no batch was cut by it.

    The other layouts are those of programs that cut by themselves. Whether they cut as the flag says cannot be seen
    from tokens: only their number on this rank, and what lengths a layout can have.
    """
    if layout.pack_layout != "dealt":
        return
    parallel_state = state.megatron.parallel_state
    if state.sliced_packs or not parallel_state.model_parallel_is_initialized():
        return
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if parallel_state.get_pipeline_model_parallel_rank() in (0, stages - 1):  # the others read no batch
        raise RuntimeError(
            "packed sequences reached attention, but the batch was not cut by the layout of --context-parallel-impl "
            "loong: this program cuts it itself. If it cuts each document in zigzag (as verl, slime, NeMo-RL and "
            "TransformerEngine do), give --loong-pack-layout per_document; else let it call "
            "megatron.core.utils.get_batch_on_this_cp_rank (with cu_seqlens in the batch), or "
            "megatron_loong.integration.slice_packed_batch"
        )


# ---- what the hooks put in the place of Megatron's own ---------------------------------------------------------


def rotary_freqs(
    config: LoongConfig, cp_rank: int, tokens: int, cu_seqlens: torch.Tensor, freqs: torch.Tensor
) -> torch.Tensor:
    """Rows of `freqs` ([positions, 1, 1, d]) for this rank's packed tokens: [t, 1, 1, d].

    By the place in the document; by the place in the pack where `freqs` has a row for each token of it, as
    Megatron's own `thd` embedding does. Padding behind the last document takes the last row. Raises `ValueError` when
    `freqs` is shorter than a document: max_seqlen was too small.
    """
    documents = boundaries_of(cu_seqlens)
    places = local_places(config, cp_rank, tokens, documents, freqs.device)
    if freqs.shape[0] == documents[-1]:
        return freqs[places.in_pack.clamp(max=documents[-1] - 1)]
    longest = max(b - a for a, b in itertools.pairwise(documents))
    if freqs.shape[0] < longest:
        raise ValueError(
            f"the rotary embedding has {freqs.shape[0]} positions (packed_seq_params.max_seqlen_q), but a document has "
            f"{longest} tokens"
        )
    return freqs[places.in_document.clamp(max=freqs.shape[0] - 1)]


def rolled(
    tensor: torch.Tensor, documents: tuple[int, ...] | None, config: LoongConfig, cp_group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's successor in its document, 0 for a document's last; [..., t]. And its sum, the mean of the ranks.

    `documents`: boundaries of a pack, None for one sequence. For MTP, which divides by that sum (see
    `integration.loss`). Collective over `cp_group`: gathers token ids or masks, a few bytes per token.
    """
    cp_size, cp_rank = cp_group.size(), cp_group.rank()
    tokens = tensor.shape[-1] * cp_size
    sent = (tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor).contiguous()  # gloo knows no bool
    parts = [torch.empty_like(sent) for _ in range(cp_size)]
    dist.all_gather(parts, sent, group=cp_group)
    whole = torch.empty(*tensor.shape[:-1], tokens, dtype=tensor.dtype, device=tensor.device)
    whole[..., gathered_order(config, tokens, documents, tensor.device)] = torch.cat(parts, -1).to(tensor.dtype)
    successor = local_places(config, cp_rank, tokens, documents, tensor.device).next_in_pack
    result = whole[..., successor].masked_fill(successor < 0, 0)
    starts = without_empty(to_the_end(documents, tokens))[:-1] if documents else (0,)
    starts = torch.tensor(starts, device=tensor.device)
    return result, (whole.sum() - whole[..., starts].sum()) / cp_size


def in_order_of_the_pack(x: torch.Tensor, cu_seqlens: torch.Tensor, config: LoongConfig) -> torch.Tensor:
    """[tokens, ...], all ranks' one behind the other, put in the order of the pack: for Mamba's scan."""
    order = gathered_order(config, x.shape[0], boundaries_of(cu_seqlens), x.device)
    return torch.empty_like(x).index_copy(0, order, x)


def in_order_of_ranks(x: torch.Tensor, cu_seqlens: torch.Tensor, config: LoongConfig) -> torch.Tensor:
    """The inverse of `in_order_of_the_pack`."""
    return x.index_select(0, gathered_order(config, x.shape[0], boundaries_of(cu_seqlens), x.device))
