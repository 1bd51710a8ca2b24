"""`install` and `uninstall`: hooks at the seams of `compat`, and nothing else."""

from __future__ import annotations

import argparse
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

import megatron_loong.integration.arguments as arguments
import megatron_loong.integration.compat as compat
import megatron_loong.integration.data_hooks as data_hooks
import megatron_loong.integration.dynamic as dynamic
import megatron_loong.integration.hybrid_loop as hybrid_loop
import megatron_loong.integration.lengths as lengths
import megatron_loong.integration.multimodal as multimodal
import megatron_loong.integration.placement as placement
import megatron_loong.integration.reset_mask as reset_mask
import megatron_loong.integration.rotary as rotary
import megatron_loong.integration.runtime as runtime
import megatron_loong.integration.zero as zero
from megatron_loong.integration.checks import check_args, check_options, check_parts
from megatron_loong.integration.core_attention import LoongCoreAttention
from megatron_loong.integration.dataset_helpers import compile_if_missing
from megatron_loong.integration.memory_options import check_tiled
from megatron_loong.integration.options import FIELDS, LoongOptions, fields_of, fields_of_attributes
from megatron_loong.integration.recompute import checkpoint_function, te_checkpoint
from megatron_loong.integration.runtime import Runtime
from megatron_loong.integration.spec import refuse_forgotten_size, swapped_submodules
from megatron_loong.integration.tiled import acceptance_counts, language_model_loss, mlp_forward, model_forward

_hooked: dict[compat.Seam, tuple[Any, Any]] = {}
"""Seam -> (the original, what stands in its place)."""


def install(options: LoongOptions | Mapping[str, Any] | str | os.PathLike[str] | None = None) -> None:
    """Hook into the Megatron that `import megatron.core` finds; with `native` (the default) nothing changes in it.

    `options`: a `LoongOptions`, a mapping, or the path of a YAML file with such a mapping, for programs without
    Megatron's argument parser; they are merged with the command line and with attributes of a TransformerConfig,
    and two sources that set one option differently are a `ValueError`. A misspelt key is a `ValueError`.
    Installing again does nothing, except that `options`, if given, take the place of the earlier ones.
    Raises `NotImplementedError` when this Megatron lacks a place to hook into.
    """
    fields = fields_of(options)
    if _hooked:
        if options is not None:
            runtime.active().installed_fields = dict(fields)
        return
    megatron = compat.find_megatron()
    seams = compat.seams(megatron)
    state = Runtime(megatron, fields)
    runtime.activate(state)
    line = compat.untested(megatron, seams)
    if line and int(os.environ.get("RANK", "0")) == 0:  # no process group yet that would tell the ranks apart
        state.say(line)
    for name, seam in seams.items():
        original = seam.original()
        replacement = _HOOKS[name.partition("@")[0]](state, original)
        setattr(seam.owner, seam.name, replacement)
        _hooked[seam] = (original, replacement)


def is_installed() -> bool:
    """Whether `install` was called, and `uninstall` not since."""
    return bool(_hooked)


def uninstall() -> None:
    """Put back what `install` replaced, the very objects, and release all groups. Without `install`, nothing.

    `RuntimeError`, and nothing is changed, when someone else has replaced a hook since: they would be cut off.
    """
    for seam, (_, replacement) in _hooked.items():
        if vars(seam.owner).get(seam.name) is not replacement:
            raise RuntimeError(f"{seam} was replaced after megatron_loong was installed; undo that first")
    for seam, (original, _) in _hooked.items():
        setattr(seam.owner, seam.name, original)
    if _hooked:
        _hooked.clear()
        runtime.active().release()
        runtime.activate(None)


def place_this_process(
    *,
    world_size: int,
    context_parallel_size: int,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    num_attention_heads: int | None = None,
    order: str = "tp-cp-ep-dp-pp",
) -> None:
    """Set RANK to where `placement` puts this process, for programs that do not use Megatron's argument parser.

    Call it after `install(options)` and before `torch.distributed.init_process_group`, which then reads RANK.
    """
    state = runtime.active()
    chosen = state.options()
    tp = tensor_model_parallel_size
    check_options(chosen, cp=context_parallel_size, tp=tp, num_attention_heads=num_attention_heads)
    plan = chosen.loong and state.plan_placement(
        chosen,
        world_size=world_size,
        tp=tp,
        cp=context_parallel_size,
        pp=pipeline_model_parallel_size,
        num_attention_heads=num_attention_heads,
        order=order,
    )
    if plan:
        placement.take_rank(os.environ, *plan)


# ---- the hooks; each takes the original and returns what stands in its place -----------------------------------


def _hook_add_megatron_arguments(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_megatron_arguments(*args: Any, **kwargs: Any) -> Any:
        parser = original(*args, **kwargs)
        arguments.add_loong_arguments(parser)
        arguments.mend_help(parser)
        arguments.listen(parser, functools.partial(on_parsed, state))
        return parser

    return add_megatron_arguments


def on_parsed(state: Runtime, args: argparse.Namespace) -> None:
    """Check what can be checked before anything starts, and take the rank that the placement gives."""
    state.parsed = args
    if getattr(args, "yaml_cfg", None) and fields_of_attributes(args):
        raise ValueError(
            "Megatron ignores flags when --yaml-cfg is given, so --context-parallel-impl and --loong-... would be "
            f"ignored too; write them ({', '.join(FIELDS)}) at the top level of that file"
        )
    chosen = state.options(args=args)
    if getattr(args, "yaml_cfg", None):
        return
    check_args(chosen, args, final=False)
    state.zero_in_effect = zero.apply(chosen, args, int(os.environ.get("WORLD_SIZE", "1")))
    if not chosen.loong:
        return
    lengths.let_megatron_accept(args)
    heads = None if getattr(args, "use_checkpoint_args", False) else getattr(args, "num_attention_heads", None)
    plan = state.plan_placement(
        chosen,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        tp=args.tensor_model_parallel_size,
        cp=args.context_parallel_size,
        pp=args.pipeline_model_parallel_size,
        num_attention_heads=heads,
        order=compat.rank_order(args),
    )
    if plan is not None:
        refuse_with_placement(chosen, args)
        placement.take_rank(os.environ, *plan)


def refuse_with_placement(chosen: LoongOptions, args: object) -> None:
    """Raise `NotImplementedError` for what takes a rank for a place, or orders ranks in a way not planned for."""
    reason = None
    if compat.uses_weight_rematerialization(args):
        reason = "--gtp-weight-remat-size above 1 adds an axis of ranks"
    if getattr(args, "async_save", False):
        reason = "--async-save takes the rank for a GPU number"  # dist_checkpointing: rank % device_count
    if reason:
        raise NotImplementedError(
            f"{reason} and does not work with --loong-placement {chosen.loong_placement} yet; "
            "supported: --loong-placement head_first"
        )


def _hook_initialize(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def initialize_model_parallel(*args: Any, **kwargs: Any) -> Any:
        chosen = state.options()
        megatron_args = state.args()
        if megatron_args is not None:
            check_args(chosen, megatron_args, final=True)
        if zero.asked(chosen) and state.zero_in_effect is None:
            raise NotImplementedError(
                "--loong-zero-...-size is translated when Megatron's command line is parsed, which did not happen; "
                "without it, give DistributedDataParallelConfig what megatron_loong.integration.zero.translate names"
            )
        if not chosen.loong:
            result = original(*args, **kwargs)
            state.say_zero()
            return result
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        state.hybrid = bool(given.arguments.get("hybrid_context_parallel"))
        check_options(
            chosen,
            cp=given.arguments["context_parallel_size"],
            hybrid=state.hybrid,
            hierarchical_context_parallel_sizes=given.arguments.get("hierarchical_context_parallel_sizes"),
        )
        result = original(*args, **kwargs)
        cp_group = state.megatron.parallel_state.get_context_parallel_group()
        if state.hybrid:
            dp_cp_group = state.megatron.parallel_state.get_data_parallel_group(with_context_parallel=True)
            check_parts(chosen, dp_cp_group.size())
        minutes = given.arguments.get("distributed_timeout_minutes")
        timeout = timedelta(minutes=minutes) if minutes else None
        state.say_zero()
        state.build_with_the_world(dist.get_process_group_ranks(cp_group), timeout)
        return result

    return initialize_model_parallel


def _hook_destroy(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def destroy_model_parallel(*args: Any, **kwargs: Any) -> Any:
        state.groups.release()
        return original(*args, **kwargs)

    return destroy_model_parallel


def _hook_attention_init(state: Runtime, original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, config: Any, submodules: Any, *args: Any, **kwargs: Any) -> None:
        chosen = state.options(config)
        check_tiled(chosen, config)
        state.recompute.note(chosen)
        original(self, config, swapped_submodules(state, self, config, submodules), *args, **kwargs)
        if chosen.loong and chosen.loong_mla_latent and getattr(config, "multi_latent_attention", False):
            import megatron_loong.integration.latent as latent  # imports Megatron

            latent.check_latent(self)
            latent.attach_before_first_use(self, self.core_attention.groups.config)

    return __init__


def _hook_attention_forward(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    """Tells the rotary embedding inside which ranks share the micro-batch, where it brings its own."""
    place = list(inspect.signature(original).parameters).index("packed_seq_params")

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # One less than its place, for `self`.
        given = args[place - 1] if len(args) >= place else kwargs.get("packed_seq_params")
        if given is None or not isinstance(self.core_attention, LoongCoreAttention):
            return original(self, *args, **kwargs)
        with dynamic.attending(state, dynamic.members_of(given)):
            return original(self, *args, **kwargs)

    return forward


def _hook_checkpoint_function(state: Runtime, original: Any) -> Any:
    return checkpoint_function(state.recompute, original)


def _hook_te_checkpoint(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    return te_checkpoint(state.recompute, original)


def _hook_model_forward(state: Runtime, original: Callable[..., Any]) -> Callable[..., Any]:
    forward_of_model = lengths.model_forward(state, model_forward(state.options, original))
    forward_of_model = reset_mask.model_forward(state, forward_of_model)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_forgotten_size(state, self)
        return forward_of_model(self, *args, **kwargs)

    return forward


def _with_options(hook: Callable[..., Any]) -> Callable[[Runtime, Any], Any]:
    """A hook that needs only to know the options of a TransformerConfig."""
    return lambda state, original: hook(state.options, original)


_HOOKS: dict[str, Callable[[Runtime, Any], Any]] = {
    "add_megatron_arguments": _hook_add_megatron_arguments,
    "initialize_model_parallel": _hook_initialize,
    "destroy_model_parallel": _hook_destroy,
    "attention_init": _hook_attention_init,
    "attention_forward": _hook_attention_forward,
    "mla_init": _hook_attention_init,
    "checkpoint_function": _hook_checkpoint_function,
    "te_checkpoint": _hook_te_checkpoint,
    "model_forward": _hook_model_forward,
    "language_model_loss": _with_options(language_model_loss),
    "acceptance_counts": _with_options(acceptance_counts),
    "mlp_forward": _with_options(mlp_forward),
    "compile_helpers": lambda _, original: compile_if_missing(original),
    **data_hooks.HOOKS,
    **rotary.HOOKS,
    **hybrid_loop.HOOKS,
    **multimodal.HOOKS,
}
