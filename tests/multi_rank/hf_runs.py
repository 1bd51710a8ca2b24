"""Trainer runs of tiny models, for one process and for the ranks of a pool alike: on the CPU, in float32."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

try:
    from transformers.masking_utils import find_packed_sequence_indices
except ImportError:
    find_packed_sequence_indices = None  # up to 4.53
PACKS_SEE_ONE_ANOTHER = find_packed_sequence_indices is None

VOCAB = 61
WORLD = 4


class Samples(torch.utils.data.Dataset):
    """Rows of unequal length, of which a part has labels; one row has all of its labels in one rank's part."""

    def __init__(self, count: int, longest: int = 40) -> None:
        generator = torch.Generator().manual_seed(count)
        self.rows = []
        for i in range(count):
            tokens = torch.randint(1, VOCAB, (longest - (7 * i) % 13,), generator=generator)
            labels = tokens.clone()
            labels[: (5 * i) % 23] = -100
            if i == 3:
                labels[6:] = -100
            self.rows.append({"input_ids": tokens, "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def pad(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Padding behind the tokens."""
    longest = max(len(f["input_ids"]) for f in features)

    def rows(name: str, fill: int) -> torch.Tensor:
        return torch.stack(
            [torch.nn.functional.pad(f[name], (0, longest - len(f[name])), value=fill) for f in features]
        )

    mask = torch.stack([(torch.arange(longest) < len(f["input_ids"])).long() for f in features])
    return {"input_ids": rows("input_ids", 0), "labels": rows("labels", -100), "attention_mask": mask}


def at_random(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Each rank draws other tokens, as a collator that masks at random would."""
    batch = pad(features)
    noise = torch.randint(1, VOCAB, batch["input_ids"].shape, generator=torch.Generator().manual_seed(os.getpid()))
    return {**batch, "input_ids": noise * batch["attention_mask"]}


def flatten(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """transformers' own collator that joins rows into one, told apart by their positions."""
    from transformers import DataCollatorWithFlattening

    lists = [{k: x.tolist() for k, x in f.items()} for f in features]
    return DataCollatorWithFlattening(return_tensors="pt")(lists)


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **{
            **sizes,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB,
            "pad_token_id": 0,
            "initializer_range": 0.2,
            **changes,
        }
    )
    return LlamaForCausalLM(config)


def join_world(rank: int) -> None:
    """What torchrun would have told this process."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT="29500", LOCAL_WORLD_SIZE=str(WORLD))


def arguments(kind: Any = None, **changes: Any) -> Any:
    from transformers import TrainingArguments

    common = {
        "use_cpu": True, "max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1,
        "max_grad_norm": 0.5, "gradient_accumulation_steps": 2, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "seed": 3, "optim": "sgd",
    }  # fmt: skip
    return (kind or TrainingArguments)(**{**common, **changes})


def outcome(trainer: Any) -> dict[str, Any]:
    """Logged losses and norms, and the weights, once trained."""
    names = ("loss", "grad_norm", "eval_loss")
    history = [{k: float(v) for k, v in h.items() if k in names} for h in trainer.state.log_history]
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"history": [h for h in history if h], "weights": weights}


def run(rank: int | None, cp: int, batch_size: int, collate: str = "pad", **options: Any) -> dict[str, Any]:
    """A stock Trainer on one rank (`rank=None`), or one with loong on each rank of a world of four."""
    from transformers import Trainer

    from megatron_loong import LoongConfig
    from megatron_loong.hf import with_loong

    kind, more = Trainer, {}
    if rank is not None:
        join_world(rank)
        kind, more = with_loong(Trainer), {"loong": LoongConfig(cp, min(cp, 2)), **options.pop("memory", {})}
    options.pop("memory", None)
    folder, resume = options.pop("folder", None), options.pop("resume", False)
    with tempfile.TemporaryDirectory() as scratch:
        folder = folder or scratch
        trainer = kind(
            model=llama(),
            args=arguments(
                output_dir=folder,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=3,
                **options,
            ),
            train_dataset=Samples(26),
            eval_dataset=Samples(9),  # three batches: with two groups, one of them has a batch that fills up
            data_collator={"pad": pad, "flatten": flatten, "at random": at_random}[collate],
            **more,
        )
        trainer.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-2") if resume else None)
        trainer.evaluate()
        result = outcome(trainer)
        model = trainer.accelerator.unwrap_model(trainer.model)
        prompt = torch.arange(1, 8).unsqueeze(0)
        result["generated"] = model.generate(prompt, max_new_tokens=6, do_sample=False).tolist()
        return result


def sft(rank: int | None, cp: int, batch_size: int, *, lora: bool = False, **options: Any) -> dict[str, Any]:
    """TRL's SFTTrainer on rows of tokens, packed or padded."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from megatron_loong import LoongConfig
    from megatron_loong.hf import with_loong

    kind, more = SFTTrainer, {}
    if rank is not None:
        join_world(rank)
        kind, more = with_loong(SFTTrainer), {"loong": LoongConfig(cp, min(cp, 2))}
    if lora:
        more["peft_config"] = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [{k: x.tolist() for k, x in row.items()} for row in Samples(26).rows]
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            model=llama(),
            args=arguments(
                SFTConfig,
                output_dir=folder,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=3,
                max_length=80,
                bf16=False,
                **options,
            ),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:10]),
            processing_class=tokenizer(),
            **more,
        )
        trainer.train()
        trainer.evaluate()
        return outcome(trainer)


def tokenizer() -> Any:
    """TRL wants one, though the rows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, VOCAB)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="w1"
    )


def recipe(rank: int | None, *flags: str) -> dict[str, Any]:
    """scripts/hf_finetune.py: on one rank, or on each rank of a world of four."""
    import runpy

    if rank is not None:
        join_world(rank)
    script = Path(__file__).parents[2] / "scripts" / "hf_finetune.py"
    with tempfile.TemporaryDirectory() as folder:
        common = (
            f"--use_cpu --output_dir {folder} --max_steps 6 --logging_steps 1 --learning_rate 3e-3 --report_to none"
        )
        common += " --per_device_train_batch_size 2 --seq_length 130 --save_strategy no --lr_scheduler_type constant"
        trainer = runpy.run_path(str(script))["main"]([*common.split(), *flags])
    return outcome(trainer)


def fully_sharded_step(rank: int, options: dict[str, Any]) -> tuple[float, float, float, float]:
    """(loss, gradient norm, and both of one rank) of a step with torch's fully_shard beside context parallelism."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from megatron_loong.hf import parallelize, shard_batch

    model = llama()
    groups = parallelize(model, (WORLD, 2), **options)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    batch = pad([Samples(4)[i] for i in range(3)])
    loss = model(**shard_batch(batch, groups)).loss
    (loss * WORLD).backward()  # it averages over the ranks
    norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    total = loss.detach().clone()
    dist.all_reduce(total)
    reference = llama()
    expected = reference(**batch).loss
    expected.backward()
    expected_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1e9)
    return total.item(), norm.full_tensor().item(), expected.item(), expected_norm.item()
