"""Every difference between Megatron versions, and the few places where this plugin holds on to Megatron.

Features are probed, versions are never compared. A place that is missing is an error when the plugin is installed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch.distributed as dist

import megatron_loong.integration.signatures as signatures

_LANGUAGE_MODULE = "megatron.core.models.common.language_module"
_MODELS = ("gpt.gpt_model", "mamba.mamba_model", "hybrid.hybrid_model")
TESTED_VERSIONS = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")


@dataclass(frozen=True)
class Megatron:
    """What the plugin needs of the Megatron at hand."""

    version: str
    parallel_state: ModuleType
    attention_class: type
    mla_class: type
    absorbed_mla_class: type | None
    """From 0.19 on; it builds a core attention of its own."""
    random: ModuleType
    """`megatron.core.tensor_parallel.random`: the checkpoint."""
    stock_core_attentions: tuple[Any, ...]
    """DotProductAttention and TEDotProductAttention; the second is a mock without TransformerEngine, hence Any."""
    arguments: ModuleType | None
    """`megatron.training.arguments`; None where there is no training loop (the 0.16.1 wheel)."""
    why_no_arguments: str | None


@dataclass(frozen=True)
class Seam:
    """An attribute of a module or class object that `install` replaces and `uninstall` puts back."""

    owner: Any
    name: str

    def __str__(self) -> str:
        where = self.owner.__name__
        return (
            f"{self.owner.__module__}.{where}.{self.name}" if isinstance(self.owner, type) else f"{where}.{self.name}"
        )

    def original(self) -> Any:
        """The attribute as it stands on the owner itself; `NotImplementedError` when it is missing."""
        if self.name not in vars(self.owner):
            raise _unsupported(str(self))
        return vars(self.owner)[self.name]


def find_megatron() -> Megatron:
    """Import what is needed; `NotImplementedError` names what is missing and the versions that were tested."""
    core = _module("megatron.core")
    arguments, why_no_arguments = _training_arguments()
    parallel_state = _module("megatron.core.parallel_state")
    for needed in ("get_context_parallel_group", "RankGenerator"):
        _attribute(parallel_state, needed)
    return Megatron(
        version=getattr(core, "__version__", "unknown"),
        parallel_state=parallel_state,
        attention_class=_attribute(_module("megatron.core.transformer.attention"), "Attention"),
        mla_class=_attribute(_module("megatron.core.transformer.multi_latent_attention"), "MultiLatentAttention"),
        absorbed_mla_class=_absorbed_mla_class(),
        random=_module("megatron.core.tensor_parallel.random"),
        stock_core_attentions=tuple(_stock_core_attentions()),
        arguments=arguments,
        why_no_arguments=why_no_arguments,
    )


def seams(megatron: Megatron) -> dict[str, Seam]:
    """The places to hook into, by the name that `install` uses; each is known to exist.

    Modules that hold one function by value are told apart by `@` and their name.
    """
    found = {
        "initialize_model_parallel": Seam(megatron.parallel_state, "initialize_model_parallel"),
        "destroy_model_parallel": Seam(megatron.parallel_state, "destroy_model_parallel"),
        "attention_init": Seam(megatron.attention_class, "__init__"),
        "attention_forward": Seam(megatron.attention_class, "forward"),
        "mla_init": Seam(megatron.mla_class, "__init__"),
        "checkpoint_function": Seam(megatron.random, "CheckpointFunction"),
        "model_forward": Seam(_attribute(_module("megatron.core.models.gpt"), "GPTModel"), "forward"),
        "language_model_loss": Seam(
            _attribute(_module(f"{_LANGUAGE_MODULE}.language_module"), "LanguageModule"), "compute_language_model_loss"
        ),
        "mlp_forward": Seam(_attribute(_module("megatron.core.transformer.mlp"), "MLP"), "forward"),
        "compile_helpers": Seam(_module("megatron.core.datasets.utils"), "compile_helpers"),
    }
    mtp = _module("megatron.core.transformer.multi_token_prediction")
    if hasattr(mtp, "_compute_mtp_acceptance_counts"):  # from 0.19 on
        found["acceptance_counts"] = Seam(mtp, "_compute_mtp_acceptance_counts")
    if megatron.arguments is not None:
        found["add_megatron_arguments"] = Seam(megatron.arguments, "add_megatron_arguments")
    found.update(_te_checkpoint_seams())
    found.update(_token_layout_seams())
    found.update(_hybrid_seams())
    found.update(_image_seams())
    for name, seam in found.items():
        problem = signatures.problem(name.partition("@")[0], seam.original())
        if problem:
            raise _unsupported(f"{seam}{problem}")
    return found


def untested(megatron: Megatron, found: Mapping[str, Seam]) -> str | None:
    """One line about a Megatron that is not among the tested versions: what its hooked functions take besides."""
    if is_tested(megatron.version):
        return None
    news = [(seam.name, signatures.news(name.partition("@")[0], seam.original())) for name, seam in found.items()]
    # Modules may hold functions of one name, and one of them be new.
    differing = "; ".join(dict.fromkeys(f"{name} takes {', '.join(new)}" for name, new in news if new))
    return (
        f"megatron-core {megatron.version} was not tested with it ({', '.join(TESTED_VERSIONS)} were); "
        f"{differing or 'the functions that it hooks into take nothing new'}"
    )


def is_tested(version: str) -> bool:
    """Whether `version` is one of `TESTED_VERSIONS`; a wheel names its commit after a plus."""
    return version.partition("+")[0] in TESTED_VERSIONS


def _te_checkpoint_seams() -> dict[str, Seam]:
    """TransformerEngine's checkpoint, which Megatron takes under fp8 and fp4; who recomputes layers has it by value."""
    engine = _module("megatron.core.extensions.transformer_engine")
    found = {"te_checkpoint": Seam(engine, "te_checkpoint")}
    for name in ("megatron.core.transformer.transformer_block", "megatron.core.recompute"):
        holder = _module(name) if importlib.util.find_spec(name) else None  # the second from 0.18 on
        if holder is not None and vars(holder).get("te_checkpoint") is vars(engine).get("te_checkpoint"):
            found[f"te_checkpoint@{name}"] = Seam(holder, "te_checkpoint")
    return found


def _token_layout_seams() -> dict[str, Seam]:
    """Where Megatron decides, or takes for granted, which tokens a context-parallel rank holds."""
    utils = _module("megatron.core.utils")
    rope = _module("megatron.core.models.common.embeddings.rope_utils")
    mamba = _module("megatron.core.ssm.mamba_context_parallel")
    mtp = _module("megatron.core.transformer.multi_token_prediction")
    schedules = _module("megatron.core.pipeline_parallel.schedules")
    found = {
        "rotary_thd": Seam(rope, "_apply_rotary_pos_emb_thd"),
        "roll": Seam(mtp, "roll_tensor"),
        "roll_packed": Seam(mtp, "_roll_tensor_packed_seq"),
        "calc_loss": Seam(schedules, "forward_step_calc_loss"),
        "mamba_undo": Seam(mamba, "_undo_attention_load_balancing"),
        "mamba_redo": Seam(mamba, "_redo_attention_load_balancing"),
        "pipeline": Seam(schedules, "forward_backward_pipelining_without_interleaving"),
        "pipeline_interleaved": Seam(schedules, "forward_backward_pipelining_with_interleaving"),
    }
    for name in ("rotary_pos_embedding", "yarn_rotary_pos_embedding"):
        holder = _module(f"megatron.core.models.common.embeddings.{name}")
        found[f"rotary_slice@{name}"] = Seam(holder, "get_pos_emb_on_this_cp_rank")
    gpt_model = _module("megatron.core.models.gpt.gpt_model")
    if hasattr(gpt_model, "roll_tensor"):  # before 0.17, where the loss of MTP is part of GPTModel.forward
        found["roll@gpt_model"] = Seam(gpt_model, "roll_tensor")
    for name in ("transformer.multi_token_prediction", *(f"models.{x}" for x in _MODELS)):  # all but one by value
        holder = _importable(f"megatron.core.{name}")
        if hasattr(holder, "process_mtp_loss"):
            found[f"mtp_loss@{name}"] = Seam(holder, "process_mtp_loss")
    if getattr(rope, "fused_apply_rotary_pos_emb_thd", None) is not None:  # None without TransformerEngine
        found["fused_rotary_thd"] = Seam(rope, "fused_apply_rotary_pos_emb_thd")
    # 0.19, 0.18: functions that get_batch_on_this_cp_rank looks up when it is called.
    for sequence, packed in (
        ("_get_batch_on_this_cp_rank_per_sequence_balancing", "_get_batch_on_this_cp_rank_per_document_balancing"),
        ("get_pretrain_batch_on_this_cp_rank", "get_sft_batch_on_this_cp_rank"),
    ):
        if hasattr(utils, sequence):
            return {**found, "slice_sequence": Seam(utils, sequence), "slice_packed": Seam(utils, packed)}
    # Before: the function itself, which the training loop holds by value.
    found["slice_thd"] = Seam(utils, "get_thd_batch_on_this_cp_rank")
    found["slice_sequence"] = Seam(utils, "get_batch_on_this_cp_rank")
    for name in ("megatron.training.utils", "megatron.training.training"):
        holder = sys.modules.get(name)
        if holder is not None and vars(holder).get("get_batch_on_this_cp_rank") is utils.get_batch_on_this_cp_rank:
            found[f"slice_sequence@{name}"] = Seam(holder, "get_batch_on_this_cp_rank")
    return found


def _hybrid_seams() -> dict[str, Seam]:
    """Where Megatron's hybrid context parallelism has to be mended, see `hybrid_loop`; empty where there is none."""
    if importlib.util.find_spec("megatron.core.pipeline_parallel.hybrid_cp_schedule") is None:
        return {}
    utils, found = _module("megatron.core.utils"), {}
    if hasattr(utils, "get_batch_on_this_tp_rank"):  # 0.18 on; before, the training loop's own was right
        found["hybrid_batch"] = Seam(utils, "get_batch_on_this_tp_rank")
    if hasattr(utils, "get_batch_on_this_hybrid_cp_rank"):
        found["hybrid_one_rank"] = Seam(utils, "get_batch_on_this_hybrid_cp_rank")
    found["hybrid_backward_step"] = Seam(_module("megatron.core.pipeline_parallel.schedules"), "backward_step")
    if not hasattr(sys.modules.get("megatron.training.training"), "wrap_hybrid_cp_data_iterator"):
        wrapper = _attribute(_module("megatron.core.datasets.data_schedule"), "HybridCPDataLoaderWrapper")
        found["hybrid_iterator"] = Seam(wrapper, "__iter__")
    return found


def _image_seams() -> dict[str, Seam]:
    """Where LLaVAModel and MIMO encode images and cut the merged sequence; MIMO from 0.19 on, see `multimodal`."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that MIMO is experimental is said again to who builds one
        llava = getattr(_importable("megatron.core.models.multimodal.llava_model"), "LLaVAModel", None)
        adapter = getattr(_importable("megatron.core.models.mimo.partition.utils"), "PartitionAdapter", None)
    if llava is not None:
        found["llava_forward"] = Seam(llava, "forward")
        found["llava_merge"] = Seam(llava, "_preprocess_data")
        found["llava_cut"] = Seam(llava, "_process_embedding_token_parallel")
    if adapter is not None and "attention_mask" not in inspect.signature(adapter.shard).parameters:
        mimo = _attribute(_module("megatron.core.models.mimo.model.base"), "MimoModel")
        found["mimo_forward"] = Seam(mimo, "_forward_all_modules")
        found["mimo_merge"] = Seam(mimo, "align_embeddings_by_token_positions")
        found["mimo_cut"] = Seam(adapter, "shard")
    return found


def _unsupported(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"this megatron-core has no {what}, which megatron_loong holds on to; it is tested with "
        f"{', '.join(TESTED_VERSIONS)}"
    )


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only Megatron's own modules are ours to explain; a missing dependency speaks for itself.
        if error.name is None or not name.startswith(error.name):
            raise
        raise _unsupported(name) from error


def _attribute(module: ModuleType, name: str) -> Any:
    if not hasattr(module, name):
        raise _unsupported(f"{module.__name__}.{name}")
    return getattr(module, name)


def _stock_core_attentions() -> list[Any]:
    found = [_attribute(_module("megatron.core.transformer.dot_product_attention"), "DotProductAttention")]
    # The module itself copes with an absent TransformerEngine; then its class is a mock that no spec runs with.
    found.append(_attribute(_module("megatron.core.extensions.transformer_engine"), "TEDotProductAttention"))
    return found


def _absorbed_mla_class() -> type | None:
    module = _importable("megatron.core.transformer.experimental_attention_variant.absorbed_mla")
    return getattr(module, "AbsorbedMLASelfAttention", None)


def _importable(name: str) -> ModuleType | None:
    """A module of Megatron that not every version has, or that needs packages of its own: who lacks it uses none."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _training_arguments() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("megatron.training.arguments"), None
    except ImportError as error:
        # The 0.16.1 wheel has no megatron.training, and later ones need packages that core alone does not.
        # Who trains with it will meet the same ImportError; who brings config objects needs none of it.
        return None, str(error)


# ---- what Megatron knows at run time --------------------------------------------------------------------------


def training_args(megatron: Megatron) -> argparse.Namespace | None:
    """The global args of `megatron.training`, or None when there are none (yet)."""
    if megatron.arguments is None:
        return None
    global_vars = importlib.import_module("megatron.training.global_vars")
    try:
        return global_vars.get_args()
    except AssertionError:  # how Megatron says "not initialized"
        return None


def has_transformer_engine() -> bool:
    """Whether Megatron found TransformerEngine when it was imported."""
    return bool(_attribute(_module("megatron.core.extensions.transformer_engine"), "HAVE_TE"))


def group_of(pg_collection: object, name: str) -> Any:
    """A process group of a `ProcessGroupCollection`, or None; 0.19 answers `hasattr` with yes for every name."""
    return None if pg_collection is None else vars(pg_collection).get(name)


def hybrid_groups(megatron: Megatron) -> list[tuple[int, ...]]:
    """Global ranks of every group of this process that hybrid context parallelism makes, the smallest first.

    Of powers of two, and all of DP x CP; groups of one rank Megatron does without.
    """
    parallel_state = megatron.parallel_state
    groups = [group for _, group in sorted(_attribute(parallel_state, "_HYBRID_DP_CP_GROUPS").items())]
    groups.append(parallel_state.get_data_parallel_group(with_context_parallel=True))
    return [tuple(dist.get_process_group_ranks(group)) for group in groups]


def context_parallel_groups(
    megatron: Megatron, *, world_size: int, tp: int, cp: int, pp: int, order: str
) -> list[list[int]]:
    """Global ranks of every context-parallel group that Megatron will make, by its own generator, before it does."""
    generator = megatron.parallel_state.RankGenerator(
        tp=tp, ep=1, dp=world_size // (tp * cp * pp), pp=pp, cp=cp, order=order
    )
    return [[int(rank) for rank in ranks] for ranks in generator.get_ranks("cp")]


def uses_weight_rematerialization(args: object) -> bool:
    """0.19 puts a `gtp_remat` axis between tp and cp; `context_parallel_groups` does not know it."""
    return any((getattr(args, name, 1) or 1) > 1 for name in ("gtp_weight_remat_size", "expert_gtp_weight_remat_size"))


def rank_order(args: object) -> str:
    """The order of axes that `megatron.training` hands to `initialize_model_parallel`."""
    return "tp-cp-ep-pp-dp" if getattr(args, "use_tp_pp_dp_mapping", False) else "tp-cp-ep-dp-pp"
