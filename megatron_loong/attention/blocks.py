"""What travels round a ring: rows of several tensors in one buffer, so that a hop is one message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_loong.schedule.rows import Rows, slice_within


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What out, dq, dk and dv are summed in: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Form:
    """What one row of a block holds, tensor by tensor: (shape, dtype), wider dtypes first so that all are aligned."""

    parts: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    @classmethod
    def of(cls, *parts: tuple[Iterable[int], torch.dtype]) -> Form:
        """From shapes and dtypes."""
        form = cls(tuple((tuple(shape), dtype) for shape, dtype in parts))
        widths = [dtype.itemsize for _, dtype in form.parts]
        assert widths == sorted(widths, reverse=True), f"{form} is not aligned"
        return form

    @classmethod
    def like(cls, *tensors: torch.Tensor) -> Form:
        """The form of rows of these tensors [s, ...]."""
        return cls.of(*((x.shape[1:], x.dtype) for x in tensors))

    @cached_property
    def widths(self) -> list[int]:
        """Bytes of a row, by tensor."""
        return [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.parts]

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return sum(self.widths)

    def size(self, rows: int) -> int:
        """Bytes of so many rows."""
        return rows * self.row_bytes

    def buffer(self, rows: int, device: torch.device) -> torch.Tensor:
        """Uninitialised bytes for so many rows."""
        return torch.empty(self.size(rows), dtype=torch.uint8, device=device)

    def empty(self, rows: int, device: torch.device) -> Block:
        """An uninitialised block."""
        return Block(self, self.buffer(rows, device))


@dataclass(frozen=True)
class Block:
    """Rows of a form in one buffer, tensor after tensor."""

    form: Form
    flat: torch.Tensor
    """uint8."""

    def fill(self, tensors: Iterable[torch.Tensor]) -> Block:
        """Copy tensors [s, ...] into it, of whatever dtypes; returns itself."""
        for part, x in zip(self.parts, tensors, strict=True):
            part.copy_(x)
        return self

    @property
    def rows(self) -> int:
        """Number of rows s."""
        return self.flat.numel() // self.form.row_bytes

    @cached_property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """Views [s, ...] of the tensors."""
        rows = self.rows
        return tuple(
            piece.view(dtype).view(rows, *shape)
            for piece, (shape, dtype) in zip(self._pieces, self.form.parts, strict=True)
        )

    def chosen(self, held: Rows, wanted: Rows) -> torch.Tensor:
        """The buffer of the rows `wanted` out of this block, which holds `held`; a copy unless it wants all."""
        if wanted == held:
            return self.flat
        places = [slice_within(held, run) for run in wanted]
        rows = [piece.view(self.rows, width) for piece, width in zip(self._pieces, self.form.widths, strict=True)]
        return torch.cat([x[place].reshape(-1) for x in rows for place in places])

    @property
    def _pieces(self) -> tuple[torch.Tensor, ...]:
        rows = self.rows
        return self.flat.split([rows * width for width in self.form.widths])
