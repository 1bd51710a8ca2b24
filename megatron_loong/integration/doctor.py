"""`megatron-loong doctor`: what is installed, which kernels serve and why not the others, and whether flags fit.

One screen of text, or `--json` for programs. Flags of Megatron may be given as to a training script; they are checked
for this machine and `--nodes` of its like, with the very checks that a run makes, Megatron's own among them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from typing import Any

import megatron_loong
import megatron_loong.integration.zero as zero
from megatron_loong.config import LoongConfig
from megatron_loong.integration.arguments import add_loong_arguments, refuse_misspelt
from megatron_loong.integration.checks import check_kernel_name, check_options
from megatron_loong.integration.compat import TESTED_VERSIONS, find_megatron, is_tested, seams
from megatron_loong.integration.options import LoongOptions, fields_of_attributes, flag_of, resolve
from megatron_loong.integration.validation import NEEDED, unknown_to_megatron, validated
from megatron_loong.layout.placement import cp_ranks_per_node
from megatron_loong.planner.flags import CONNECTIONS, connections

PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "flash-attn-3",
    "megatron-bridge",
    "transformers",
)
#: Flags that do not ask who runs attention.
IN_EFFECT_WITH_NATIVE = ("--loong-tiled-", "--loong-offload-activations", "--loong-zero-")


def report(words: list[str]) -> dict[str, Any]:
    """Everything that is shown. `words`: the flags to judge; none are judged when there are none."""
    found: dict[str, Any] = {
        "megatron_loong": megatron_loong.__version__,
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "devices": devices(),
        "megatron": megatron(),
        "kernels": kernels(),
    }
    if words:
        found["flags"] = flags(words, len(found["devices"]))
    return found


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[str]:
    """Names of the GPUs of this machine."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def megatron() -> dict[str, Any]:
    """Which megatron-core, whether that version was tested, and whether the plugin finds its places in it."""
    try:
        here = find_megatron()
        hooks = sorted(map(str, seams(here).values()))
    except (ImportError, NotImplementedError) as error:
        return {"version": version_of("megatron-core"), "works": False, "problem": f"{type(error).__name__}: {error}"}
    return {
        "version": own_version(here.version),
        "tested": is_tested(here.version),
        "tested_versions": list(TESTED_VERSIONS),
        "works": True,
        "hooks": hooks,
        "training_loop": here.arguments is not None,
        "why_no_training_loop": here.why_no_arguments,
    }


def own_version(version: str) -> str:
    """`version` with the commit after its plus only if that is Megatron's.

    Megatron asks git in its own folder, and gets the commit of whatever repository an environment lies in.
    """
    import megatron.core

    command = ["git", "rev-parse", "--show-prefix"]
    try:
        asked = subprocess.run(command, cwd=megatron.core.__path__[0], capture_output=True, text=True)
    except OSError:  # no git: then there is no commit either
        return version
    return version if asked.stdout.strip() == "megatron/core/" else version.partition("+")[0]


def kernels() -> dict[str, str]:
    """For each kernel `usable`, or why it cannot serve a usual request: bf16, head width 128."""
    import torch

    from megatron_loong.kernels.interface import KernelRequest
    from megatron_loong.kernels.registry import KERNELS

    request = KernelRequest(
        device_type="cuda" if torch.cuda.is_available() else "cpu",
        dtype=torch.bfloat16,
        head_dim=128,
        value_head_dim=128,
        query_heads=8,
        kv_heads=8,
        deterministic=False,
    )
    return {name: kernel.why_not(request) or "usable" for name, kernel in KERNELS.items()}


def flags(words: list[str], gpus: int) -> dict[str, Any]:
    """Whether the flags fit each other and this cluster; `problem` says why not."""
    cluster = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    cluster.add_argument("--nodes", type=int, default=1)
    cluster.add_argument("--gpus-per-node", type=int, default=gpus or 1)
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    add_loong_arguments(parser)
    for flag, default in (
        ("--tensor-model-parallel-size", 1),
        ("--pipeline-model-parallel-size", 1),
        ("--context-parallel-size", 1),
        ("--num-attention-heads", None),
        ("--seq-length", None),
    ):
        parser.add_argument(flag, type=int, default=default)
    try:
        here, words = cluster.parse_known_args(words)
        args, ignored = parser.parse_known_args(words, here)
        refuse_misspelt(ignored)
        layout, notes = judge(args)
        more, not_judged = ask_megatron(words, ignored, args.nodes * args.gpus_per_node, args.gpus_per_node)
    except (ValueError, NotImplementedError, argparse.ArgumentError) as error:
        return {"fit": False, "problem": str(error)}
    return {"fit": True, "layout": layout, "notes": notes + more, "not_judged": not_judged}


def ask_megatron(words: list[str], ignored: list[str], world: int, per_node: int) -> tuple[list[str], list[str]]:
    """Remarks, and what nobody judged; `ValueError` or `NotImplementedError` where a run would end at its start."""
    try:
        unknown = unknown_to_megatron(words)
    except (ImportError, NotImplementedError) as error:
        return [f"Megatron's own checks were not run: {error}"], ignored
    given = {word.partition("=")[0] for word in words}
    missing = [flag for flag in NEEDED if flag not in given]
    args = validated(words, world, per_node, parse_only=bool(missing))
    if missing:
        return [f"Megatron's own checks were not run: they need {', '.join(missing)} too"], unknown
    notes = []
    needed, set_here = connections(words), os.environ.get(CONNECTIONS)
    parallel = args.tensor_model_parallel_size * args.context_parallel_size > 1
    if needed is not None and set_here is None and parallel:
        notes.append(f"{CONNECTIONS}={needed} is taken for granted, and not set here (megatron-loong sbatch sets it)")
    if args.transformer_impl == "transformer_engine" and version_of("transformer-engine") is None:
        notes.append("--transformer-impl transformer_engine (the default) needs TransformerEngine, which is not here")
    return notes, unknown


def judge(args: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The layout that these flags resolve to, and remarks; `ValueError` when they do not fit."""
    options = LoongOptions(**fields_of_attributes(args))
    tp, cp, pp = args.tensor_model_parallel_size, args.context_parallel_size, args.pipeline_model_parallel_size
    world = args.nodes * args.gpus_per_node
    if min(tp, cp, pp, world) < 1 or world % (tp * cp * pp):
        raise ValueError(
            f"{args.nodes} nodes x {args.gpus_per_node} GPUs = {world} ranks are not a multiple of TP {tp} x CP {cp} x "
            f"PP {pp} = {tp * cp * pp}; give --nodes and --gpus-per-node, or change the sizes"
        )
    notes = []
    if zero.asked(options):
        dp_cp = world // (tp * pp)
        means = zero.translate(zero.sizes_of(options, dp_cp), dp_cp)
        notes.append(f"ZeRO over {dp_cp} data x context ranks: " + ", ".join(f"{k}={v}" for k, v in means.items()))
    if not options.loong:
        return None, notes + remarks_on_native(options)
    heads = args.num_attention_heads
    check_options(options, cp=cp, tp=tp, num_attention_heads=heads)
    check_kernel_name(options.loong_kernel)
    in_node = cp_ranks_per_node([tp * i for i in range(cp)], args.gpus_per_node)
    config = resolve(options, context_parallel_size=cp, heads=heads and heads // tp, cp_ranks_in_node=in_node)
    if config is None:
        return None, [*notes, "give --num-attention-heads: 'auto' depends on it"]
    return config.describe(), notes + remarks(config, in_node, args.seq_length)


def remarks_on_native(options: LoongOptions) -> list[str]:
    """What of the flags works beside Megatron's own attention, and what does not."""
    given = [f"{flag_of(name)} {value}" for name, value in fields_of_attributes(options).items()]
    works = [words for words in given if words.startswith(IN_EFFECT_WITH_NATIVE)]
    idle = [words for words in given if words not in works]
    native = "--context-parallel-impl is native: attention is Megatron's own"
    if not given:
        return [f"{native}, and megatron_loong changes nothing"]
    notes = [f"{native}; in effect all the same: {', '.join(works)}"] if works else [native]
    return [*notes, f"without effect beside it: {', '.join(idle)}"] if idle else notes


def remarks(config: LoongConfig, in_node: int, seq_length: int | None) -> list[str]:
    """What is allowed, and probably not meant."""
    found = []
    if config.placement == "head_first" and config.head_parallel_size > in_node:
        found.append(
            f"the all-to-all over {config.head_parallel_size} ranks leaves the node, which holds {in_node} of the "
            "context-parallel ranks: every byte of it crosses the network"
        )
    if config.outer_ring_size == 1 and config.ring_size > in_node > 1:
        found.append("one ring over several nodes: an inner ring size that fits in a node hides the slow hops")
    if seq_length and seq_length % config.sequence_multiple:
        found.append(
            f"--seq-length {seq_length} is no multiple of {config.sequence_multiple} (2 x CP): every batch is padded "
            "at its end"
        )
    return found


def text_of(found: dict[str, Any]) -> str:
    """The report on one screen."""
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    missing = ", ".join(name for name, version in found["packages"].items() if not version)
    megatron = found["megatron"]
    if megatron["works"]:
        tested = "tested" if megatron["tested"] else f"NOT tested; tested: {', '.join(megatron['tested_versions'])}"
        state = f"{megatron['version']} ({tested}); {len(megatron['hooks'])} hooks found"
        if not megatron["training_loop"]:
            state += f"; no training loop: {megatron['why_no_training_loop']}"
    else:
        state = f"{megatron['version'] or 'not installed'}: {megatron['problem']}"
    lines = [
        f"megatron_loong {found['megatron_loong']}, Python {found['python']}",
        f"installed   {packages}",
        f"missing     {missing or 'nothing'}",
        f"GPUs        {', '.join(found['devices']) or 'none: --cpu trains on gloo, slowly'}",
        f"Megatron    {state}",
        "kernels     (bf16, head width 128, in order of preference)",
        *(f"  {name:16s} {why}" for name, why in found["kernels"].items()),
    ]
    if "flags" in found:
        judged = found["flags"]
        lines.append(f"flags       {'fit' if judged['fit'] else 'DO NOT FIT: ' + judged['problem']}")
        if judged["fit"]:
            lines += [
                f"  layout        {judged['layout'] or 'open'}",
                *(f"  note          {n}" for n in judged["notes"]),
            ]
            lines += [f"  not judged    {' '.join(judged['not_judged'])}"] if judged["not_judged"] else []
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """`megatron-loong doctor [--json] [MEGATRON'S FLAGS]`. 1: no usable Megatron, or flags that do not fit."""
    if "-h" in argv or "--help" in argv:
        print(f"usage: megatron-loong doctor [--json] [MEGATRON'S FLAGS] [--nodes N] [--gpus-per-node N]\n\n{__doc__}")
        return 0
    import warnings

    warnings.simplefilter("ignore")  # Megatron's, about what is not installed: that is said here
    found = report([word for word in argv if word != "--json"])
    print(json.dumps(found, indent=1) if "--json" in argv else text_of(found))
    healthy = found["megatron"]["works"] and found.get("flags", {}).get("fit", True)
    return 0 if healthy else 1
