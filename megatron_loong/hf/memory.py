"""Memory of a transformers model: tiled loss, tiled MLPs, Selective Checkpoint++, offload; each can be undone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

from megatron_loong.hf.loss import NO_LABEL, check_loss_arguments
from megatron_loong.recompute.offload import Parking, inputs_wait_in
from megatron_loong.recompute.selective import context_fn
from megatron_loong.recompute.tiled import tiled
from megatron_loong.recompute.tiled_loss import tiled_cross_entropy

Undo = list[Callable[[], None]]

#: Where a config says that logits are more than a product of the head.
_SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


def check(base: Any, *, tiled_loss: int, tiled_mlp: int, offload: bool, selective: bool) -> None:
    """`ValueError` or `NotImplementedError` for what is asked for and could not be in effect."""
    for name, value in (("tiled_loss", tiled_loss), ("tiled_mlp", tiled_mlp)):
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}={value!r} must be a whole number: 0 for off")
    if offload and not selective:
        raise ValueError("offload=True moves what checkpoints keep; give selective_checkpoint=True too")
    if tiled_loss:
        config, head = base.config.get_text_config(), base.get_output_embeddings()
        scales = [name for name in _SCALES if getattr(config, name, None) not in (None, 1.0)]
        reason = None
        if "forward" in vars(base):
            reason = "a forward that was replaced (TRL's SFTTrainer makes its logits in parts itself)"
        elif scales:
            reason = f"{', '.join(scales)} in the config"
        elif type(head) is not torch.nn.Linear or head.bias is not None:
            reason = f"a head {type(head).__name__} that is no plain Linear without bias"
        elif head is not getattr(base, "lm_head", getattr(base, "embed_out", head)) or hasattr(
            config, "unpadded_vocab_size"
        ):
            reason = f"{type(base).__name__}, which does more to its logits than the product of the head"
        if reason:
            raise NotImplementedError(f"tiled_loss={tiled_loss} does not work with {reason}; leave it out (0)")
    if tiled_mlp and not _mlps(base):
        raise NotImplementedError(
            f"tiled_mlp={tiled_mlp}: no MLP of {type(base).__name__} can go through in parts (experts and dropout "
            "cannot); leave it out (0)"
        )


def tile_loss(base: Any, tile: int) -> Undo:
    """With labels, `base.forward` computes the loss `tile` tokens at a time and returns no logits."""
    original = base.forward

    # The signature stays: transformers reads in it which columns of a dataset the model wants.
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is None:
            return original(*args, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        kwargs.pop("labels")
        labels, count = kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None)
        check_loss_arguments(labels, count)
        hidden = getattr(base, base.base_model_prefix)(*args, **kwargs)[0]
        weight = base.get_output_embeddings().weight
        if hasattr(weight, "full_tensor"):  # FSDP2 keeps a head of its own group in parts
            weight = weight.full_tensor()
        softcap = getattr(base.config.get_text_config(), "final_logit_softcapping", None) or 0.0
        losses = tiled_cross_entropy(hidden, weight, labels.clamp(min=0), tile=tile, softcap=softcap)
        return CausalLMOutputWithPast(loss=(losses * (labels != NO_LABEL)).sum() / count)

    base.forward = forward
    return [lambda: vars(base).pop("forward")]


def tile_mlps(base: Any, tiles: int) -> Undo:
    """Every MLP goes through `tiles` parts of its tokens, forward and backward."""
    undo: Undo = []
    for mlp in _mlps(base):
        mlp.forward = functools.partial(_in_parts, mlp, mlp.forward, tiles)
        undo.append(functools.partial(vars(mlp).pop, "forward"))
    return undo


def _in_parts(mlp: Any, original: Callable[..., Any], tiles: int, x: torch.Tensor) -> torch.Tensor:
    return tiled(original, x.reshape(-1, x.shape[-1]), list(mlp.parameters()), tiles).view_as(x)


def _mlps(base: Any) -> list[Any]:
    """Modules of three products, token by token: gate, up and down. Experts see chosen tokens, and are none."""

    def fits(module: Any) -> bool:
        products = all(hasattr(module, name) for name in ("up_proj", "down_proj"))
        products = products or all(hasattr(module, name) for name in ("gate_up_proj", "down_proj"))
        draws = any(isinstance(m, torch.nn.Dropout) and m.p for m in module.modules())
        return type(module).__name__.endswith("MLP") and products and not draws and not hasattr(module, "router")

    experts = [m for m in base.modules() if type(m).__name__.endswith(("Experts", "MoE", "MoeBlock"))]
    inside = {id(m) for e in experts for m in e.modules()}
    return [m for m in base.modules() if fits(m) and id(m) not in inside and "forward" not in vars(m)]


def checkpoint_layers(base: Any, offload: bool) -> Undo:
    """Each layer is run again in the backward, all but its attention, whatever checkpointing is asked for later."""
    kept, inputs = Parking(), Parking()

    def run(function: Callable[..., Any], *args: Any, **ignored: Any) -> Any:
        park = [kept.lot().park] if offload else []
        waiting = inputs_wait_in(inputs.lot(), args) if offload else contextlib.nullcontext()
        with waiting:
            return torch_checkpoint.checkpoint(
                function, *args, use_reentrant=False, context_fn=functools.partial(context_fn, *park)
            )

    original = base._set_gradient_checkpointing

    def switch(enable: bool = True, **unused: Any) -> None:
        original(enable=enable, gradient_checkpointing_func=run)

    base._set_gradient_checkpointing = switch
    switch()

    def undo() -> None:
        del base._set_gradient_checkpointing
        base._set_gradient_checkpointing(enable=False)

    return [undo]
