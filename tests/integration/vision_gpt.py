"""A ViT and a GPT on samples of text and pictures, trained by `megatron.training`; a script, and no tests.

`--vision-model llava`: Megatron's LLaVAModel as its pretrain_vlm.py builds it, and besides what that script refuses (PP
beside CP) or lacks (more or less than one image in a sample). `mimo`: the same parts as a MimoModel. The dataset is
Megatron's mock of text; the pictures are cut out of a photograph that matplotlib ships.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from copy import deepcopy
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import pretrain_gpt as base
from megatron import training
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.multimodal_dataset import MockMultimodalDataset, MultimodalDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec, get_submodules
from megatron.training import argument_utils, arguments, get_args, get_tokenizer

SIDE, PATCH, CLASS_TOKEN = 12, 6, 1
ROWS = (SIDE // PATCH) ** 2
MOST_IMAGES = 5
IMAGE = -200


def add_arguments(parser: Any) -> Any:
    parser.add_argument("--vision-model", default="llava", choices=("llava", "mimo"))
    parser.add_argument("--text-length", type=int, default=56)
    parser.add_argument("--images", default="uneven", choices=("uneven", "few", "none"))
    parser.add_argument("--freeze", nargs="*", default=[])
    parser.add_argument("--vision-dropout", type=float, default=0.0)
    parser.add_argument("--packed", action="store_true")
    # Mistakes.
    parser.add_argument("--vision-cp", type=int, default=1)
    parser.add_argument("--tiles", type=int)
    return parser


def provide_model(pre_process: bool = True, post_process: bool = True, vp_stage=None, config=None, pg_collection=None):
    args: Any = get_args()
    language: Any = config or arguments.core_transformer_config_from_args(args)
    vision = deepcopy(language)
    vision.context_parallel_size, vision.pipeline_model_parallel_size = args.vision_cp, 1
    vision.vision_model_type = "clip"
    projection = deepcopy(vision)
    vision.hidden_dropout = args.vision_dropout
    # The ViT's heads have keys of their own each.
    vision.num_query_groups = vision.num_attention_heads
    spec = decoder_model_with_local_default_spec(None, False)
    mlp = deepcopy(get_submodules(spec.submodules.mlp))
    encoder: dict[str, Any] = {"img_h": SIDE, "img_w": SIDE, "patch_dim": PATCH}
    decoder: dict[str, Any] = {"pre_process": pre_process, "post_process": post_process}
    if args.vision_model == "llava":
        model: Any = LLaVAModel(
            language_transformer_config=language,
            language_transformer_layer_spec=spec,
            language_vocab_size=args.padded_vocab_size,
            language_max_sequence_length=args.decoder_seq_length,
            vision_transformer_config=vision,
            vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
            drop_vision_class_token=True,
            vision_projection_config=projection,
            vision_projection_layer_spec=mlp,
            language_position_embedding_type=args.position_embedding_type,
            add_encoder=pre_process,
            **decoder,
            **encoder,
        )
        parts = {"language": model.language_model}
        if pre_process:
            parts.update(vision=model.vision_model, projection=model.vision_projection)
    else:
        model = mimo_model(args, language, vision, projection, spec, mlp, decoder, encoder)
        images = model.modality_submodules["images"]
        parts = {
            "vision": images.encoders["clip"],
            "projection": images.input_projections,
            "language": model.language_model,
        }
    if "vision" in parts:
        parts["vision"].register_forward_pre_hook(check_number, with_kwargs=True)
    for name in args.freeze:
        parts[name].requires_grad_(False)
    return model


most_images = MOST_IMAGES
"""That a rank may encode of a micro-batch."""


def check_number(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    (images,) = (*args, *kwargs.values())
    if len(images) > most_images:
        raise RuntimeError(f"this rank is given {len(images)} images to encode, and its share is {most_images}")


class DroppedClassToken(CLIPViTModel):
    """MIMO takes every row that its encoder returns."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs)[:, self.class_token_len :]


def mimo_model(args, language, vision, projection, spec, mlp, decoder, encoder) -> MimoModel:
    tower = {"transformer_config": vision, "transformer_layer_spec": get_vit_layer_with_local_spec(), **encoder}
    project = {"config": projection, "submodules": mlp, "projector_type": "mlp", "input_size": vision.hidden_size}
    gpt = {
        "config": language,
        "transformer_layer_spec": spec,
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.decoder_seq_length,
        "position_embedding_type": args.position_embedding_type,
    }
    images = ModuleSpec(
        module=VisionModalitySubmodules,
        submodules={
            "encoders": {"clip": ModuleSpec(module=DroppedClassToken, params=tower)},
            "input_projections": [ModuleSpec(module=MultimodalProjector, params=project)],
        },
    )
    config = MimoModelConfig(
        language_model_spec=ModuleSpec(module=GPTModel, params={**gpt, **decoder}),
        modality_submodules_spec={"images": images},
        special_token_ids={"images": IMAGE},
    )
    groups = {"cp_group": mpu.get_context_parallel_group(), "tp_group": mpu.get_tensor_model_parallel_group()}
    model = MimoModel(config, **groups)
    model.pg_collection = model.language_model.pg_collection  # which the training loop asks for
    return model


@functools.cache
def photograph() -> torch.Tensor:
    """[3, height, width] from 0 to 1."""
    found = importlib.util.find_spec("matplotlib")  # to import it would take every rank a second
    assert found is not None and found.origin is not None
    with Image.open(Path(found.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg") as picture:
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 255


def with_pictures(sample: dict[str, Any]) -> dict[str, Any]:
    """Some tokens become pictures: from none to MOST_IMAGES, in a bunch at one end or anywhere."""
    args: Any = get_args()
    draw = torch.Generator().manual_seed(int(sample["tokens"].sum()))

    def random(high: int, n: int = 1) -> list[int]:
        return torch.randint(high, (n,), generator=draw).tolist()

    count = {"uneven": random(MOST_IMAGES + 1)[0], "few": random(2)[0], "none": 0}[args.images]
    length = args.text_length
    places = [list(range(count)), list(range(length - count, length)), sorted(set(random(length, count)))][random(3)[0]]
    tokens = sample["tokens"][:length].clone()
    tokens[places] = IMAGE
    images = torch.zeros(MOST_IMAGES, 3, SIDE, SIDE)
    for i in range(len(places)):
        top, left = random(500, 2)
        images[i] = photograph()[:, top : top + SIDE, left : left + SIDE]
    if args.vision_model == "mimo":  # a token for each row, and a fixed length
        tokens = torch.cat([t.expand(ROWS if t == IMAGE else 1) for t in tokens])[: args.decoder_seq_length]
        missing = args.decoder_seq_length - len(tokens)
        mask = torch.nn.functional.pad(torch.ones(len(tokens)), (0, missing))
        tokens = torch.nn.functional.pad(tokens, (0, missing), value=1)
        kept = int((tokens == IMAGE).sum())
        tokens[(tokens == IMAGE).nonzero().flatten()[kept - kept % ROWS :]] = 1  # a picture that was cut short
        images[kept // ROWS :], places = 0, places[: kept // ROWS]
    else:
        mask = torch.ones(length)
    labels = torch.nn.functional.pad(tokens[1:], (0, 1), value=1)
    mask = mask * (tokens != IMAGE) if args.vision_model == "llava" else mask * (labels != IMAGE)
    positions = torch.arange(len(tokens))
    return {
        "tokens": tokens,
        "labels": labels if args.vision_model == "llava" else labels.clamp(min=0),
        "loss_mask": mask.float(),
        "position_ids": positions,
        "images": images,
        "count": torch.tensor(len(places)),
    }


def grid_of(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Height and width of each row of the images, counted on from one to the next."""
    row = image.cumsum(1) - 1
    return row // (SIDE // PATCH), row % (SIDE // PATCH)


def provide_datasets(num_samples: list[int], vp_stage: int | None = None):
    args: Any = get_args()
    values = {f.name: getattr(args, f.name) for f in fields(MultimodalDatasetConfig) if hasattr(args, f.name)}
    values.update(random_seed=args.seed, sequence_length=args.seq_length, tokenizer=get_tokenizer())
    values.update(image_h=SIDE, image_w=SIDE, preprocess_func=with_pictures, create_attention_mask=False)
    config = MultimodalDatasetConfig(**values)
    return BlendedMegatronDatasetBuilder(MockMultimodalDataset, num_samples, lambda: True, config).build()


provide_datasets.is_distributed = True


def forward_step(data_iterator, model):
    args: Any = get_args()
    batch = next(data_iterator)
    global most_images
    images = torch.cat([x[:n] for x, n in zip(batch["images"], batch["count"].tolist(), strict=True)])
    cp = mpu.get_context_parallel_world_size()
    most_images = max(1, -(-len(images) // cp))
    named = {name: batch[name] for name in ("position_ids", "labels", "loss_mask")}
    named.update(input_ids=batch["tokens"], attention_mask=None)
    if args.position_embedding_type == "mrope":  # time, height and width: an image's rows go over its grid
        image = batch["tokens"] == IMAGE
        grid = [torch.where(image, positions, batch["position_ids"]) for positions in grid_of(image)]
        named["position_ids"] = torch.stack([batch["position_ids"] - image.cumsum(1), *grid])
    if args.vision_model == "llava":
        tiles = None if args.tiles is None else torch.tensor([args.tiles])
        output, loss_mask = model(images=images, num_image_tiles=tiles, **named)
    else:
        inputs = {"images": {"clip": {"x": images}}} if len(images) else None
        if args.packed and cp > 1:  # rows become documents of one pack
            ends = torch.arange(len(batch["tokens"]) + 1, dtype=torch.int32) * batch["tokens"].shape[1]
            named = {name: x if x is None else x.reshape(1, -1) for name, x in named.items()}
            longest = batch["tokens"].shape[1]
            packing = {f"cu_seqlens_{side}": ends for side in ("q", "kv", "q_padded", "kv_padded")}
            named["packing_kwargs"] = {**packing, "max_seqlen_q": longest, "max_seqlen_kv": longest}
        output, loss_mask = model(modality_inputs=inputs, **named)
    # LLaVA cuts off what is too long, and leaves the mask a view.
    return output, partial(base.sum_loss, loss_mask if loss_mask is None else loss_mask.contiguous())


if __name__ == "__main__":
    container = argument_utils.pretrain_cfg_container_from_args(
        arguments.parse_and_validate_args(extra_args_provider=add_arguments)
    )
    training.pretrain(
        model_provider=provide_model,
        model_type=ModelType.encoder_or_decoder,
        train_valid_test_dataset_provider=provide_datasets,
        forward_step_func=forward_step,
        cfg_container=container,
    )
