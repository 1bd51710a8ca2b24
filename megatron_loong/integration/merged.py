"""This rank's tokens of a micro-batch that Megatron has merged of text and images. See `integration.multimodal`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import megatron_loong.integration.lengths as lengths
import megatron_loong.integration.packed as packed
from megatron_loong.config import LoongConfig
from megatron_loong.integration.core_attention import LoongCoreAttention
from megatron_loong.integration.refusals import refuse_first
from megatron_loong.integration.runtime import Runtime
from megatron_loong.layout.sharding import documents_of, token_positions
from megatron_loong.multimodal.images import ImageDeal
from megatron_loong.multimodal.join import join_tokens

#: Megatron's label of a token without a loss.
NO_LABEL = -100


class Parts(NamedTuple):
    """What a merge of numbers stands for; it travels as an attribute of the merged tensor."""

    text: torch.Tensor
    """[n, h]: row t is -(1 + t) in the merge."""
    rows: torch.Tensor
    """[own rows, h] of the images that this rank has encoded; row r of all images' is 1 + r in the merge."""
    deal: ImageDeal
    frozen: bool


def numbers_from_one(count: int, device: torch.device) -> torch.Tensor:
    """1, 2, ...: float64, which holds them exactly, and in which Megatron's merges take them for embeddings."""
    return torch.arange(1, count + 1, dtype=torch.float64, device=device)


class Cut:
    """This rank's tokens of one merged micro-batch: where they stand, and what is cut by it."""

    def __init__(self, state: Runtime, config: LoongConfig, cp_group: Any, packed_seq_params: Any) -> None:
        self.state, self.config, self.cp_group = state, config, cp_group
        self.documents: tuple[int, ...] | None = None
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            refuse_first("packs", state.args(), pack_layout=config.pack_layout)
            padded = packed_seq_params.cu_seqlens_q_padded
            self.documents = packed.boundaries_of(packed_seq_params.cu_seqlens_q if padded is None else padded)
            state.sliced_packs = True

    def _whole(self, x: torch.Tensor, value: float) -> torch.Tensor:
        """`x` [b, S, ...], padded at its end to a length that the ranks can share out."""
        if self.documents is not None:
            documents_of(self.documents, x.shape[1], "packed_seq_params.cu_seqlens_q")
        missing = lengths.length_for_megatron(self.state, x.shape[1]) - x.shape[1]
        if not missing:
            return x
        self.state.padded = True
        return torch.nn.functional.pad(x, (*(0, 0) * (x.dim() - 2), 0, missing), value=value)

    def _boundaries(self, tokens: int) -> tuple[int, ...] | None:
        return None if self.documents is None else packed.to_the_end(self.documents, tokens)

    def _mine(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[1]
        boundaries = self._boundaries(tokens)
        positions = token_positions(self.config, self.cp_group.rank(), tokens, cu_seqlens=boundaries)
        return x.index_select(1, positions.to(x.device))

    def labels(self, x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else self._mine(self._whole(x, NO_LABEL))

    def loss_mask(self, x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else self._mine(self._whole(x, 0))

    def embeddings(self, x: torch.Tensor | None, sequence_parallel: bool, tp_group: Any) -> torch.Tensor | None:
        """[b, S, h], or a merge of numbers with what they stand for, to [s, b, h] of this rank."""
        if x is None:
            return None
        parts: Parts | None = getattr(x, "loong_parts", None)
        x = self._whole(x, 0)
        local = self._mine(x)
        if parts is not None:
            numbers = local[..., 0].long()
            text = parts.text.index_select(0, (-numbers - 1).clamp(min=0).flatten()).view(*numbers.shape, -1)
            vision = x[..., 0].long().sub(1).clamp(min=-1)
            ranks = tuple(dist.get_process_group_ranks(self.cp_group))
            local = join_tokens(
                text.masked_fill((numbers >= 0)[..., None], 0),  # padding is zeros
                parts.rows,
                vision,
                parts.deal,
                self.state.groups.get(self.config, ranks, local_synchronization=True),
                cu_seqlens=self._boundaries(x.shape[1]),
                cp_group=self.cp_group,
                frozen=parts.frozen,
            )
        local = local.transpose(0, 1).contiguous()
        if sequence_parallel:
            from megatron.core import tensor_parallel

            given = {} if tp_group is None else {"group": tp_group}
            local = tensor_parallel.scatter_to_sequence_parallel_region(local, **given)
        return local


def own_images(x: torch.Tensor, deal: ImageDeal, cp_rank: int) -> torch.Tensor:
    """A rank's images of all; a blank one where it has none, so that the tower has gradients (zeros) on every rank."""
    own = deal.images_of(cp_rank)
    return x[own] if own else x.new_zeros(1, *x.shape[1:])


def is_trained(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def why_whole(module: Any) -> str | None:
    """Why the images of a tower cannot be dealt, if so: another rank's images would get other dropout masks."""
    for part in module.modules():
        config = getattr(part, "config", None)
        for name in ("hidden_dropout", "attention_dropout"):
            if part.training and getattr(config, name, 0.0):
                # All ranks draw the same numbers, and go on from the same state only after as many draws.
                return f"{name}={getattr(config, name)} in {type(part).__name__}"
    return None


def check_tower(module: Any) -> None:
    """Raise `ValueError` where the attention of a tower would run over the context-parallel ranks."""
    for part in module.modules():
        if isinstance(part, LoongCoreAttention):
            raise ValueError(
                f"context_parallel_size={part.config.context_parallel_size} in the TransformerConfig of "
                f"{type(module).__name__}, which encodes images: ranks do not share an image. Give it "
                "TransformerConfig(context_parallel_size=1, ...)"
            )


def refuse_beside_images(state: Runtime, config: Any) -> None:
    """Raise `NotImplementedError` for what cannot be had beside images; `config`: the language model's."""
    for on, what, instead in (
        (state.hybrid, "--hybrid-context-parallel", "one context-parallel size for all micro-batches"),
        (getattr(config, "mtp_num_layers", None), "--mtp-num-layers (it shifts token ids, and images have none)", "0"),
    ):
        if on:
            raise NotImplementedError(
                f"images do not work with {what} and --context-parallel-impl loong; supported: {instead}"
            )
