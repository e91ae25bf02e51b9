"""The rows and columns of a matrix in which an adapter has entries.

Fisher masks are clustered: at small budgets all entries lie in a few rows and columns.
What is computed with a delta is computed on that block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from peft_ird.sparse.costs import cheapest

__all__ = ["Support"]

# A copy of more than this share of the columns of an input costs more than it saves.
_DENSE = 0.5
# A GPU multiplies 16-bit matrices of odd sizes no faster than ones a hundred times as
# large; there some rows and columns without entries are taken along.
_MULTIPLE = {"cuda": 8}


@dataclass(frozen=True)
class Support:
    """Used rows and columns of a matrix, and the way to the gradient of its entries.

    Args:
        shape: Rows and columns of the matrix.
        rows: Numbers of the used rows, ascending; empty for all. Shape ``[r]``, int32.
        columns: Numbers of the used columns, as ``rows``. Shape ``[c]``, int32.
        gradient: One of `METHODS`.
        known: Positions of the entries in the block, ``[k]``, int32, on a GPU: there
            starting the kernels that find them takes longer than a layer. Else None.
    """

    shape: tuple[int, int]
    rows: Tensor
    columns: Tensor
    gradient: str = "block"
    known: Tensor | None = None

    @classmethod
    def of(cls, indices: Tensor, shape: torch.Size, dtype: torch.dtype) -> "Support":
        """Look where entries are, and choose the way to their gradient.

        Args:
            indices: Sorted flat positions. Shape ``[k]``, integer.
            shape: Shape of the matrix.
            dtype: Type of the inputs and of the output's gradient.
        """
        if indices.is_meta:
            none = indices.new_empty(0, dtype=torch.int32)
            return cls((shape[0], shape[1]), none, none)
        multiple = _MULTIPLE.get(indices.device.type, 1)
        rows, columns = (
            _used(numbers, size, multiple)
            for numbers, size in zip(_divided(indices, shape[1]), shape, strict=True)
        )
        found = cls((shape[0], shape[1]), rows, columns)
        method = cheapest(found.block, len(indices), indices.device, dtype)
        height, width = found.block
        is_kept = indices.is_cuda and height * width < 1 << 31
        known = found.places(indices).int() if is_kept else None
        return cls(found.shape, rows, columns, method, known)

    @property
    def block(self) -> tuple[int, int]:
        """Number of rows and columns that are computed with."""
        height, width = self.shape
        return self.rows.numel() or height, self.columns.numel() or width

    def places(self, indices: Tensor) -> Tensor:
        """Return the positions of the entries in the block. Shape ``[k]``, integer."""
        if self.known is not None:
            return self.known
        if not (self.rows.numel() or self.columns.numel()):
            return indices
        row, column = _divided(indices, self.shape[1])
        if self.rows.numel():
            row = torch.searchsorted(self.rows, row)
        if self.columns.numel():
            column = torch.searchsorted(self.columns, column)
        return row.long() * self.block[1] + column

    def dense(self, places: Tensor, values: Tensor) -> Tensor:
        """Return the block of the delta. Shape `block`, dtype of ``values``.

        Args:
            places: What `places` returned.
            values: Shape ``[k]``.
        """
        height, width = self.block
        flat = values.new_zeros(height * width).index_add_(0, places, values)
        return flat.view(height, width)


def _divided(indices: Tensor, width: int) -> tuple[Tensor, Tensor]:
    row = torch.div(indices, width, rounding_mode="floor")
    return row, indices - row * width


def _used(numbers: Tensor, size: int, multiple: int = 1) -> Tensor:
    """Return the distinct numbers below ``size``; none if they are most of them.

    So many others are among them that their count is a multiple, if there are enough.
    """
    is_used = torch.zeros(size, dtype=torch.bool, device=numbers.device)
    is_used[numbers.long()] = True
    missing = -int(is_used.sum()) % multiple
    is_used[is_used.logical_not().nonzero().flatten()[:missing]] = True
    used = is_used.nonzero().flatten().int()
    return used if len(used) <= _DENSE * size else used.new_empty(0)
