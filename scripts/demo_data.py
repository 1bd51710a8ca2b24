"""Write real text that every Python carries, its language reference, as a byte-level Megatron indexed dataset.

python scripts/demo_data.py runs/demo/text      # makes runs/demo/text.bin and runs/demo/text.idx
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

#: One token per byte, and one more that ends a document.
END_OF_DOCUMENT = 256


def write_dataset(documents: list[str], prefix: Path) -> int:
    """Write `documents` as `prefix`.bin and `prefix`.idx; return the number of tokens."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    tokens = 0
    for document in documents:
        ids = torch.tensor([*document.encode("utf-8"), END_OF_DOCUMENT])
        builder.add_document(ids, [len(ids)])
        tokens += len(ids)
    builder.finalize(f"{prefix}.idx")
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", type=Path, help="where to write, without .bin and .idx")
    prefix = parser.parse_args().prefix
    tokens = write_dataset([topics[name] for name in sorted(topics)], prefix)
    print(f"{prefix}.bin: Python's language reference, {len(topics)} documents, {tokens:,} byte tokens")


if __name__ == "__main__":
    main()
