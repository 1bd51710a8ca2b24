"""Images inside Megatron: LLaVAModel and MIMO encode each on one rank, and send its rows where its tokens are.

Both models merge text and images themselves. Here the original merges *numbers* in the place of embeddings, and so says
which row belongs at each place of the sequence, whatever its rules are; then `join_tokens` moves the rows:

    LLaVAModel.forward                        own images in the place of all
      vision model, projector                 as they are
      _preprocess_data                        merges numbers
      _process_embedding_token_parallel       cuts labels and mask, joins this rank's tokens
    MimoModel._forward_all_modules            own images in the place of all
      align_embeddings_by_token_positions     merges numbers
      PartitionAdapter.shard                  cuts and joins

Where images cannot be dealt (`merged.why_whole`), every rank encodes all of them, as Megatron does, and keeps its own
tokens.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

import megatron_loong.integration.lengths as lengths
import megatron_loong.integration.packed as packed
from megatron_loong.config import LoongConfig
from megatron_loong.integration.merged import (
    Cut,
    Parts,
    check_tower,
    is_trained,
    numbers_from_one,
    own_images,
    refuse_beside_images,
    why_whole,
)
from megatron_loong.integration.runtime import Runtime
from megatron_loong.multimodal.images import ImageDeal, deal_images

# ---- LLaVAModel ------------------------------------------------------------------------------------------------


def _hook_llava_forward(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = _llava_layout(state, self)
        if config is None:
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments
        refuse_beside_images(state, self.language_model.config)
        images = given.get("images")
        # A batch without an image too: a blank one gives the tower its gradients, which a reducer may wait for.
        has_images = self.add_encoder and images is not None and images.shape[1:].numel() > 0
        if has_images:
            check_tower(self.vision_model)
        whole = _why_llava_whole(self, given) if has_images else None
        if whole:
            state.say(f"every rank encodes all images, as in native context parallelism: {whole}")
        self.loong_dealt = has_images and not whole
        if self.loong_dealt:
            assert images is not None
            tiles = given.get("num_image_tiles")
            if tiles is None:  # which Megatron would make of the images that it is given
                tiles = torch.ones(len(images), dtype=torch.int, device=given["input_ids"].device)
            if int(tiles.sum()) != len(images):
                raise ValueError(f"num_image_tiles={tiles.tolist()!r:.80} are not the tiles of {len(images)} images")
            deal = deal_images([1] * len(images), config.context_parallel_size)
            given.update(images=own_images(images, deal, self.cp_group.rank()), num_image_tiles=tiles)
        return original(*bound.args, **bound.kwargs)

    return forward


def _why_llava_whole(model: Any, given: dict[str, Any]) -> str | None:
    if model._tile_tags is not None:
        return "tile tags are put before each image's rows"
    for name in ("imgs_sizes", "vision_packed_seq_params", "num_frames"):
        if given.get(name) is not None:
            return f"{name} (images of dynamic resolution or videos, which the tower sees as one pack)"
    if given.get("sound_clips") is not None:
        return "sound_clips"
    if given.get("inference_context") is not None or given.get("inference_params") is not None:
        return "inference"
    return why_whole(model.vision_model)


def _hook_llava_merge(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _preprocess_data(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments
        if _llava_layout(state, self) is None or not (self.pre_process and getattr(self, "loong_dealt", False)):
            return original(self, *args, **kwargs)
        rows, text, tiles = (given[name] for name in ("image_embeddings", "language_embeddings", "num_image_tiles"))
        count, length = int(tiles.sum()), rows.shape[0]
        deal = deal_images([length] * count, self.cp_group.size())
        rows = rows.transpose(0, 1).reshape(-1, rows.shape[2])  # image after image
        rows = rows[: deal.rows_of(self.cp_group.rank())]  # none of a blank image
        frozen = not any(is_trained(part) for part in (self.vision_model, self.vision_projection))
        numbers = numbers_from_one(length * count, text.device).view(count, length).t()[..., None]
        given["image_embeddings"] = numbers if count else numbers[:0]  # [0, 0, 1], as without images
        given["language_embeddings"] = -numbers_from_one(text.shape[0] * text.shape[1], text.device).view(
            *text.shape[:2], 1
        )
        merged, *others = original(*bound.args, **bound.kwargs)
        merged.loong_parts = Parts(text.flatten(0, 1), rows, deal, frozen)
        return merged, *others

    return _preprocess_data


def _hook_llava_cut(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _process_embedding_token_parallel(
        self: Any, combined_embeddings: Any, labels: Any, loss_mask: Any, packed_seq_params: Any
    ) -> Any:
        config = _llava_layout(state, self)
        if config is None or not (self.pre_process or self.post_process):
            return original(self, combined_embeddings, labels, loss_mask, packed_seq_params)
        cut = Cut(state, config, self.cp_group, packed_seq_params)
        embeddings = cut.embeddings(combined_embeddings, self.sequence_parallel_lm, None)
        return embeddings, cut.labels(labels), cut.loss_mask(loss_mask), packed_seq_params

    return _process_embedding_token_parallel


def _llava_layout(state: Runtime, model: Any) -> LoongConfig | None:
    if model.context_parallel_lm == 1:
        return None
    return packed.layout_config(state, model.cp_group.size())


# ---- MIMO ------------------------------------------------------------------------------------------------------


def _hook_mimo_forward(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _forward_all_modules(self: Any, *args: Any, **kwargs: Any) -> Any:
        cp_group = _mimo_group(self)
        config = None if cp_group is None else packed.layout_config(state, cp_group.size())
        if cp_group is None or config is None:
            return original(self, *args, **kwargs)
        cp_rank = cp_group.rank()
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments
        refuse_beside_images(state, self.config)
        _refuse_padded_mrope(state, self, given["input_ids"].shape[1])
        inputs, deals = dict(given.get("modality_inputs") or {}), {}
        for name, encoder_inputs in inputs.items():
            if encoder_inputs is None or name not in self.modality_submodules:
                continue
            tokens = int((given["input_ids"] == self.special_token_ids.get(name)).sum())
            check_tower(self.modality_submodules[name])
            count, whole = _mimo_images(self, name, encoder_inputs, tokens)
            if whole:
                state.say(f"every rank encodes all of {name}, as in native context parallelism: {whole}")
                continue
            deals[name] = deal_images([tokens // count] * count, config.context_parallel_size)
            inputs[name] = {
                encoder: {key: own_images(x, deals[name], cp_rank) for key, x in one.items()}
                for encoder, one in encoder_inputs.items()
            }
        given["modality_inputs"] = inputs
        self.loong_deals = deals
        try:
            return original(*bound.args, **bound.kwargs)
        finally:
            del self.loong_deals

    return _forward_all_modules


def _mimo_images(model: Any, name: str, encoder_inputs: Any, tokens: int) -> tuple[int, str | None]:
    """How many images there are, and why they cannot be dealt."""
    tensors = [x for one in encoder_inputs.values() for x in one.values() if isinstance(x, torch.Tensor)]
    pictures = [x for x in tensors if x.dim() >= 4 and x.is_floating_point()]
    if len(encoder_inputs) != 1 or not pictures or len(tensors) != sum(len(one) for one in encoder_inputs.values()):
        return 0, "its inputs are not those of one encoder, tensors with pictures [n, ...] of 4 dimensions or more"
    count = len(pictures[0])
    if any(len(x) != count for x in tensors) or not count or tokens % count:
        return (
            0,
            f"its inputs {[list(x.shape) for x in tensors]} and {tokens} tokens do not say which belong to an image",
        )
    if model.colocated_comms:
        return 0, "its encoder has tensor or data parallel sizes of its own"
    return count, why_whole(model.modality_submodules[name])


def _refuse_padded_mrope(state: Runtime, model: Any, tokens: int) -> None:
    """Megatron cuts the positions of mrope itself, which nobody pads."""
    padded = lengths.length_for_megatron(state, tokens)
    language = model.language_model
    language = getattr(language, "module", language)  # under a wrapper for data parallelism, if it has its own
    if padded != tokens and getattr(language, "position_embedding_type", None) == "mrope":
        raise NotImplementedError(
            f"{tokens} tokens would be padded to {padded}, which does not work with --position-embedding-type mrope "
            f"and --context-parallel-impl loong; supported: sequences of {padded} tokens"
        )


def _hook_mimo_merge(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def align_embeddings_by_token_positions(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        deals, embeddings = vars(self).get("loong_deals"), given["modality_embeddings"]
        if not deals:
            return original(self, *args, **kwargs)
        whole = [name for name in embeddings if name != "text" and name not in deals]
        # Modalities that every rank has encoded whole are as text to the exchange: here already.
        here = torch.cat([embeddings[name] for name in ("text", *whole)])
        numbers, at = {}, 0
        for name in ("text", *whole):
            n = len(embeddings[name])
            numbers[name], at = -numbers_from_one(at + n, here.device)[at:, None], at + n
        at, rows = 0, []
        rank = self.partition_adapter.cfg.cp_group.rank()
        for name, deal in deals.items():
            n, own = sum(deal.rows), len(deal.images_of(rank))
            # A blank image has as many rows as any, so that every rank finds the same fault here.
            if len(embeddings[name]) != max(1, own) * deal.rows[0]:
                raise ValueError(
                    f"token {given['special_token_ids'].get(name)} stands at {n} places for {len(deal.rows)} inputs of "
                    f"{name}, {deal.rows[0]} for each, but its encoder makes {len(embeddings[name]) // max(1, own)} of "
                    "each"
                )
            numbers[name], at = numbers_from_one(at + n, here.device)[at:, None], at + n
            rows.append(embeddings[name] if own else embeddings[name][:0])  # none of a blank image
        merged = original(self, numbers, given["input_ids"], given["special_token_ids"])
        deal = ImageDeal(*(sum((getattr(d, part) for d in deals.values()), ()) for part in ("rows", "encoders")))
        frozen = not any(is_trained(self.modality_submodules[name]) for name in deals)
        merged.loong_parts = Parts(here, torch.cat(rows), deal, frozen)
        return merged

    return align_embeddings_by_token_positions


def _hook_mimo_cut(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def shard(self: Any, embeddings: Any, labels: Any, loss_mask: Any, packed_seq_params: Any = None) -> Any:
        cp_group = self.cfg.cp_group
        config = None if not self.cfg.use_cp else packed.layout_config(state, cp_group.size())
        if config is None:
            return original(self, embeddings, labels, loss_mask, packed_seq_params)
        cut = Cut(state, config, cp_group, packed_seq_params)
        if embeddings is not None:
            parts = getattr(embeddings, "loong_parts", None)
            embeddings = embeddings.transpose(0, 1)
            if parts is not None:
                embeddings.loong_parts = parts
        embeddings = cut.embeddings(embeddings, self.cfg.seq_parallel, self.cfg.tp_group)
        return embeddings, cut.labels(labels), cut.loss_mask(loss_mask), packed_seq_params

    return shard


def _mimo_group(model: Any) -> Any:
    """Megatron's context-parallel group; None where no ranks share a sequence."""
    adapter = model.partition_adapter
    return adapter.cfg.cp_group if adapter is not None and adapter.cfg.use_cp else None


HOOKS: dict[str, Callable[[Runtime, Any], Any]] = {
    "llava_forward": _hook_llava_forward,
    "llava_merge": _hook_llava_merge,
    "llava_cut": _hook_llava_cut,
    "mimo_forward": _hook_mimo_forward,
    "mimo_merge": _hook_mimo_merge,
    "mimo_cut": _hook_mimo_cut,
}
