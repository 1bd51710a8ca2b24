"""Megatron's dataset helpers in C++: built once, and not where they are there already.

Its training loop runs `make` at every start, on a GPU as on a CPU. The megatron-core wheel brings the built helpers and
no Makefile, so that run would end there.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import sysconfig
import unittest.mock
from collections.abc import Callable


def compile_if_missing(compile_helpers: Callable[[], None]) -> Callable[[], None]:
    """`megatron.core.datasets.utils.compile_helpers` that does nothing where the helpers can be imported."""

    @functools.wraps(compile_helpers)
    def compile_helpers_if_missing() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
            return
        # In a virtual environment, make would ask the wrong python3 and python3-config about headers and suffix.
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        with unittest.mock.patch.dict(os.environ, PATH=path, MAKEFLAGS=f"LIBEXT={suffix}"):
            compile_helpers()
        importlib.invalidate_caches()  # find_spec has just remembered that there is no such file

    return compile_helpers_if_missing
