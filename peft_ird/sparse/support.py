"""The rows and columns of a matrix in which an adapter has entries.

Fisher masks are clustered: at small budgets all entries lie in a few rows and columns.
What is computed with a delta is computed on that block. On a CPU it is found anew from
the indices whenever it is needed, in a small part of the time of the layer's product,
so that nothing but the indices is held.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peft_ird.sparse.costs import cheapest
from peft_ird.sparse.operator import Operator

__all__ = ["Layout", "Support"]

# A copy of more than this share of the columns of an input costs more than it saves.
_DENSE = 0.5
# A GPU multiplies 16-bit matrices of odd sizes no faster than ones a hundred times as
# large; there some rows and columns without entries are taken along.
_MULTIPLE = {"cuda": 8}
# Starting the kernels that find a layout takes longer than a layer there.
_HOLDING = ("cuda",)


class Layout(NamedTuple):
    """Where the entries of a matrix lie.

    Args:
        rows: Numbers of the used rows, ascending; empty for all. Shape ``[r]``, int32
            or int64.
        columns: Numbers of the used columns, as ``rows``. Shape ``[c]``.
        places: Flat positions of the entries in the block that these are. Shape
            ``[k]``, ascending.
    """

    rows: Tensor
    columns: Tensor
    places: Tensor


@dataclass(frozen=True)
class Support:
    """How many rows and columns have entries, and the way to these entries' gradient.

    Args:
        shape: Rows and columns of the matrix.
        block: Number of rows and columns that are computed with; all of them, where
            most have entries.
        gradient: One of `METHODS`.
        held: The layout's parts, one after the other, on a GPU. Shape ``[r + c + k]``,
            int32, or int64 past 2^31 entries. Else None.
        kind: The type of device that the indices were on.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    gradient: str = "block"
    held: Tensor | None = None
    kind: str = "cpu"

    @classmethod
    def of(cls, indices: Tensor, shape: torch.Size, dtype: torch.dtype) -> "Support":
        """Look where entries are, and choose the way to their gradient.

        Args:
            indices: Sorted flat positions. Shape ``[k]``, integer.
            shape: Shape of the matrix.
            dtype: Type of the inputs and of the output's gradient.
        """
        height, width = shape
        kind = indices.device.type
        if indices.is_meta or not len(indices):
            return cls((height, width), (height, width), kind=kind)
        multiple = _MULTIPLE.get(kind, 1)
        block = [
            _count(numbers, size, multiple)
            for numbers, size in zip(_divided(indices, width), shape, strict=True)
        ]
        found = cls((height, width), (block[0], block[1]))
        method = cheapest(found.block, len(indices), indices.device, dtype)
        held = None
        if kind in _HOLDING:
            held = torch.cat(found.layout(indices))
            held = held.int() if shape.numel() < 1 << 31 else held
        return cls(found.shape, found.block, method, held, kind)

    @classmethod
    def with_sizes(cls, sizes: Sequence[int], held: Tensor | None) -> "Support":
        """Return what operators are told of a support, as one; see `sizes`."""
        height, width, rows, columns = sizes
        return cls((height, width), (rows, columns), held=held)

    @property
    def sizes(self) -> list[int]:
        """``shape`` and ``block``."""
        return [*self.shape, *self.block]

    def is_for(self, device: torch.device) -> bool:
        """Return whether it serves indices on a device."""
        if self.held is not None:
            return self.held.device == device
        return self.kind == device.type

    def layout(self, indices: Tensor) -> Layout:
        """Return where entries are.

        Args:
            indices: Those that it is the support of.
        """
        if self.held is not None:
            return Layout(*self.held.tensor_split(self._bounds))
        if self.block == self.shape:
            none = indices.new_empty(0)
            return Layout(none, none, indices)
        (rows, row), (columns, column) = (
            _among(numbers, size, count)
            for numbers, size, count in zip(
                _divided(indices, self.shape[1]), self.shape, self.block, strict=True
            )
        )
        return Layout(rows, columns, torch.add(column, row, alpha=self.block[1]))

    def used(self, indices: Tensor, side: int) -> Tensor:
        """Return the rows (``side`` 0) or columns (1) of the layout.

        Args:
            indices: As for `layout`.
            side: Which.
        """
        if self.held is not None:
            return self.layout(indices)[side]
        found: Tensor = _used(indices, side, self.sizes)
        return found

    @property
    def _bounds(self) -> tuple[int, int]:
        """Where the rows and the columns that are held end."""
        rows, columns = (
            0 if size == count else count
            for size, count in zip(self.shape, self.block, strict=True)
        )
        return rows, rows + columns

    def dense(self, places: Tensor, values: Tensor) -> Tensor:
        """Return the block of the delta. Shape `block`, dtype of ``values``.

        Args:
            places: Those of the layout.
            values: Shape ``[k]``.
        """
        height, width = self.block
        flat = values.new_zeros(height * width).index_add_(0, places, values)
        return flat.view(height, width)


def _divided(indices: Tensor, width: int) -> tuple[Tensor, Tensor]:
    flat = indices.long()
    row = torch.div(flat, width, rounding_mode="floor")
    return row, torch.sub(flat, row, alpha=width)


def _marked(numbers: Tensor, size: int) -> Tensor:
    marks = torch.zeros(size, dtype=torch.bool, device=numbers.device)
    return marks.index_fill_(0, numbers, True)


def _count(numbers: Tensor, size: int, multiple: int) -> int:
    """Return how many numbers below ``size`` are in use; all if most of them are.

    Others are counted among them up to a multiple, if there are enough.
    """
    count = int(_marked(numbers, size).sum())
    count = min(size, count + -count % multiple)
    return count if count <= _DENSE * size else size


def _taken(numbers: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the numbers in use, with the first others up to a count, and marks."""
    marks = _marked(numbers, size)
    used = marks.nonzero().flatten()
    if len(used) < count:
        marks[marks.logical_not().nonzero().flatten()[: count - len(used)]] = True
        used = marks.nonzero().flatten()
    return used, marks


def _among(numbers: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the numbers in use, none for all, and where those of the entries are."""
    if count == size:
        return numbers.new_empty(0), numbers
    used, marks = _taken(numbers, size, count)
    return used, marks.cumsum(0).sub_(1).index_select(0, numbers)


def _compute_used(indices: Tensor, side: int, sizes: Sequence[int]) -> Tensor:
    size, count = sizes[side], sizes[2 + side]
    if size == count:
        return indices.new_empty(0)
    used, _ = _taken(_divided(indices, sizes[1])[side], size, count)
    return used


def _fake_used(indices: Tensor, side: int, sizes: Sequence[int]) -> Tensor:
    size, count = sizes[side], sizes[2 + side]
    if size == count:
        return indices.new_empty(0)
    return indices.new_empty(count, dtype=torch.int64)


_used = Operator("used", _compute_used, _fake_used)
