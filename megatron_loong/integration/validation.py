"""What Megatron's own parser and checks say of flags, asked as rank 0 of a run would ask them; nothing is started."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

import megatron_loong.integration.compat as compat
from megatron_loong.integration.arguments import add_loong_arguments
from megatron_loong.planner.flags import CONNECTIONS, connections

#: Without these Megatron refuses any command line.
NEEDED = (
    "--num-layers",
    "--hidden-size",
    "--num-attention-heads",
    "--seq-length",
    "--max-position-embeddings",
    "--micro-batch-size",
)
#: What the checks are told of a GPU that is not here: before Blackwell, where Megatron asks for more.
_HOPPER = types.SimpleNamespace(major=9, minor=0)


def unknown_to_megatron(words: Sequence[str]) -> list[str]:
    """Flags among the words that neither Megatron's parser nor the plugin's knows: a script's own, or mistakes."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    add_loong_arguments(_arguments().add_megatron_arguments(parser))
    known = parser._option_string_actions  # argparse has no public view of its options
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [flag for flag in flags if flag not in known]


def _arguments() -> Any:
    """Megatron's argument module; `NotImplementedError` without a training loop."""
    megatron = compat.find_megatron()
    if megatron.arguments is None:
        raise NotImplementedError(f"no training loop: {megatron.why_no_arguments}")
    return megatron.arguments


def validated(
    words: Sequence[str], world_size: int, ranks_per_node: int, *, parse_only: bool = False
) -> argparse.Namespace:
    """Megatron's arguments, parsed, and unless `parse_only` validated and turned into its TransformerConfig once.

    `ValueError` or `NotImplementedError` where Megatron, or this plugin in it, refuses them.
    CUDA_DEVICE_MAX_CONNECTIONS counts as it is set; where it is not, the flags get what they need.
    """
    arguments = _arguments()
    with _as_rank_0(words, world_size, ranks_per_node), _installed(), io.StringIO() as said:
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                args = arguments.parse_args(ignore_unknown_args=True)
                if parse_only:
                    return args
                args = arguments.validate_args(args, {})
                if importlib.util.find_spec("transformer_engine") is None:
                    args.apply_rope_fusion = False  # on by default, and refused on a machine that has no GPU software
                arguments.core_transformer_config_from_args(args)
        except SystemExit:  # argparse, and a few of Megatron's own checks, print why and leave
            raise ValueError(said.getvalue().strip().split("\n")[-1].rpartition("error: ")[2]) from None
        except (ValueError, NotImplementedError):
            raise
        except Exception as error:  # mostly assertions; whatever it is, a run would end with it
            # Many of Megatron's assertions have no text: their line is what there is.
            raise ValueError(str(error) or traceback.extract_tb(error.__traceback__)[-1].line) from error
    return args


@contextlib.contextmanager
def _as_rank_0(words: Sequence[str], world_size: int, ranks_per_node: int) -> Iterator[None]:
    """The process as a launcher would have made it, for as long as the block lasts."""
    environment = {"RANK": "0", "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(ranks_per_node)}
    needed = connections(words)
    if needed is not None:
        environment[CONNECTIONS] = os.environ.get(CONNECTIONS, needed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(mock.patch.object(sys, "argv", ["pretrain_gpt.py", *words]))
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", lambda *_: _HOPPER))
        yield


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    """The plugin in Megatron, so that its flags are known and its checks run."""
    import megatron_loong.integration.hooks as hooks  # imports Megatron, which may be missing where doctor runs

    was_installed = hooks.is_installed()
    hooks.install()
    try:
        yield
    finally:
        if not was_installed:
            hooks.uninstall()
