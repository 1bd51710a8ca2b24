"""Fine-tune a causal language model of Hugging Face's on long pieces of text, each shared by several ranks.

    torchrun --nproc-per-node 8 scripts/hf_finetune.py --model Qwen/Qwen3-8B --text books/*.txt --seq_length 1048576 \
        --rope_factor 32 --context_parallel_size 8 --head_parallel_size 2 --tiled_loss 1024 --tiled_mlp 8 \
        --selective_checkpoint --offload --bf16 --output_dir out --max_steps 100 --learning_rate 1e-5 ...
    accelerate launch --num-processes 8 scripts/hf_finetune.py recipe.yaml        # the same names, in a file

Every flag of transformers' TrainingArguments works besides. Without --model it trains a small byte-level Llama; without
--text on the text of Python's language reference; with --use_cpu on a CPU. So this needs nothing but the packages:

    torchrun --nproc-per-node 4 scripts/hf_finetune.py --use_cpu --context_parallel_size 4 --head_parallel_size 2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from megatron_loong import LoongConfig
from megatron_loong.hf import with_loong


@dataclass
class Recipe:
    """What is trained on what, and how a sequence is shared."""

    model: str = field(default="", metadata={"help": "a name or folder; empty: a small byte-level Llama"})
    text: list[str] = field(default_factory=list, metadata={"help": "text files; none: Python's language reference"})
    seq_length: int = field(default=512, metadata={"help": "tokens of a sequence, over all ranks that share it"})
    context_parallel_size: int = field(default=1, metadata={"help": "ranks that share a sequence"})
    head_parallel_size: int = field(default=1, metadata={"help": "ranks of them that share out heads"})
    inner_ring_size: int | None = field(default=None, metadata={"help": "ranks of an inner ring; none: one ring"})
    rope_factor: float = field(default=1.0, metadata={"help": "YaRN: times the length that the model was trained for"})
    lora: int = field(default=0, metadata={"help": "rank of LoRA on all linear layers; 0: train all weights"})
    tiled_loss: int = field(default=0, metadata={"help": "tokens whose logits exist at a time; 0: all"})
    tiled_mlp: int = field(default=0, metadata={"help": "parts in which an MLP goes through; 0: one"})
    selective_checkpoint: bool = field(default=False, metadata={"help": "run layers again, but their attention"})
    offload: bool = field(default=False, metadata={"help": "what checkpoints keep waits in host memory"})


class Pieces(torch.utils.data.Dataset):
    """Text, cut into rows of equal length; what is left over at the end is dropped."""

    def __init__(self, tokens: torch.Tensor, length: int) -> None:
        if len(tokens) < length:
            raise ValueError(f"the text has {len(tokens)} tokens, fewer than seq_length={length}; give more text")
        self.rows = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def load_text(files: Sequence[str]) -> str:
    """The files, one after another."""
    if files:
        return "\n".join(Path(name).read_text() for name in files)
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def load_model(recipe: Recipe, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """The model, and the text as its tokens."""
    text = load_text(recipe.text)
    if not recipe.model:
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        config: Any = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=256, max_position_embeddings=1 << 20)
        return LlamaForCausalLM(config), torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    config = AutoConfig.from_pretrained(recipe.model)
    if recipe.rope_factor != 1.0:
        name = "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling"  # up to transformers 4
        trained = config.max_position_embeddings
        yarn = {"rope_type": "yarn", "factor": recipe.rope_factor, "original_max_position_embeddings": trained}
        setattr(config, name, {**(getattr(config, name, None) or {}), **yarn})
        config.max_position_embeddings = int(trained * recipe.rope_factor)
    model = AutoModelForCausalLM.from_pretrained(recipe.model, config=config, torch_dtype=dtype)
    tokens = AutoTokenizer.from_pretrained(recipe.model)(text, return_tensors="pt")["input_ids"][0]
    return model, tokens


def main(argv: list[str]) -> Any:
    """Train as the flags, or the YAML or JSON file, say; returns the trainer."""
    parser = HfArgumentParser((Recipe, TrainingArguments))  # type: ignore[arg-type]
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml", ".json")):
        recipe, args = (parser.parse_json_file if argv[0].endswith(".json") else parser.parse_yaml_file)(argv[0])
    else:
        recipe, args = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)
    model, tokens = load_model(recipe, torch.bfloat16 if args.bf16 else torch.float32)
    if recipe.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=recipe.lora, target_modules="all-linear", task_type="CAUSAL_LM"))
    config = LoongConfig(recipe.context_parallel_size, recipe.head_parallel_size, recipe.inner_ring_size)
    trainer = with_loong(Trainer)(
        model=model,
        args=args,
        train_dataset=Pieces(tokens, recipe.seq_length),
        loong=config,
        tiled_loss=recipe.tiled_loss,
        tiled_mlp=recipe.tiled_mlp,
        selective_checkpoint=recipe.selective_checkpoint,
        offload=recipe.offload,
    )
    if trainer.is_world_process_zero():
        print(f"{len(trainer.train_dataset)} pieces of {recipe.seq_length} tokens, {config.describe()}")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.save_strategy != "no":
        trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
