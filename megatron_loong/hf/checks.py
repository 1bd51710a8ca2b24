"""What context parallelism would get wrong in silence, refused by name."""

from __future__ import annotations

from typing import Any

import torch

from megatron_loong.hf import compat


def check_model(model: Any, base: Any) -> None:
    """`NotImplementedError` for a model that would go wrong on parts of a sequence; `model` may be PEFT's of `base`."""
    config = base.config
    text = config.get_text_config()
    reason = None
    learning = [n for n, c in getattr(model, "peft_config", {}).items() if getattr(c, "is_prompt_learning", False)]
    if learning:
        reason = f"prompt learning ({', '.join(learning)}), which puts virtual tokens before every part; use LoRA"
    elif not type(base).__name__.endswith("ForCausalLM"):
        reason = f"{type(base).__name__}; supported: causal language models (...ForCausalLM)"
    elif text is not config:
        reason = f"{type(base).__name__}, which has more inputs than text; load the model of text alone"
    elif getattr(config, "is_encoder_decoder", False):
        reason = f"{type(base).__name__}, an encoder and a decoder; supported: decoders"
    elif not compat.attention_by_name(base):
        reason = f"{type(base).__name__} of this transformers, whose attention cannot be replaced; upgrade transformers"
    elif getattr(text, "attn_temperature_tuning", False) and any(not x for x in getattr(text, "no_rope_layers", ())):
        reason = "attn_temperature_tuning, which counts positions from 0 on every rank; set it to False"
    elif (getattr(text, "attention_dropout", 0.0) or 0.0) > 0:
        reason = f"attention_dropout={text.attention_dropout}; set it to 0"
    elif getattr(text, "output_router_logits", False):
        reason = "output_router_logits=True, a balancing loss of each rank's own tokens; set it to False"
    elif any(kind not in _LAYERS for kind in getattr(text, "layer_types", None) or ()):
        kinds = sorted(set(text.layer_types) - set(_LAYERS))
        reason = f"layers of {', '.join(kinds)}; supported: {' and '.join(_LAYERS)}"
    elif any(isinstance(module, torch.nn.Conv1d) for module in base.modules()):
        reason = f"{type(base).__name__}, whose layers mix tokens outside attention (Conv1d)"
    if reason:
        raise NotImplementedError(f"megatron_loong.hf does not work with {reason}")


#: Kinds of layers whose tokens meet in attention alone.
_LAYERS = ("full_attention", "sliding_attention")
