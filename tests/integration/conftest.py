from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator

import pytest
import torch

from tests.integration import megatron_runs


@pytest.fixture(autouse=True)
def _environment_is_put_back() -> Iterator[None]:
    """Placement and CPU mode set environment variables; a later test's processes must not inherit them."""
    saved = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(saved)


#: Scripts that need megatron.training as soon as they are imported; nothing in them is a test.
collect_ignore = [
    "packed_gpt.py",
    "hybrid_gpt.py",
    "hybrid_checkout.py",
    "fp8_gpt.py",
    "drawn_gpt.py",
    "cut_packs_gpt.py",
    "rl_gpt.py",
    "vision_gpt.py",
]


def pytest_collection_finish() -> None:
    """A script that is imported like a test would switch on CPU mode for all tests: no GPU, but `is_available`."""
    if torch.cuda.is_available.__module__ != "torch.cuda":
        raise pytest.UsageError("CPU mode is on after collecting: name the script that did it in collect_ignore")


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Flags for an indexed dataset of documents of 2 to 51 tokens, masked from one another."""
    specification = importlib.util.spec_from_file_location(
        "demo_data", megatron_runs.REPOSITORY / "scripts" / "demo_data.py"
    )
    assert specification is not None and specification.loader is not None
    demo_data = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(demo_data)
    draw = random.Random(5)
    texts = [
        "".join(chr(draw.randint(32, 126)) for _ in range(draw.choice([1, 2, 5, 9, 17, 30, 50]))) for _ in range(300)
    ]
    prefix = tmp_path_factory.mktemp("documents") / "text"
    demo_data.write_dataset(texts, prefix)
    return f"--data-path {prefix} --split 100,0,0 --dataloader-inter-document-masking --train-iters 4"
