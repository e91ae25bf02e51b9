"""Chosen entries of one parameter, and what finding them quickly needs."""

from functools import cached_property

import torch
from torch import Tensor

from peft_ird.sparse.products import Sampling

__all__ = ["Where"]


class Where:
    """Chosen entries of one parameter, and what finding them quickly needs.

    Args:
        flat: Sorted flat row-major positions. Shape ``[k]``, int64.
        shape: The parameter's shape; that of a convolution's weight counts as a matrix.
    """

    def __init__(self, flat: Tensor, shape: torch.Size) -> None:
        self.flat = flat
        is_matrix = len(shape) < 3
        self.shape = shape if is_matrix else (shape[0], shape[1:].numel())

    def __len__(self) -> int:
        return self.flat.numel()

    @cached_property
    def row(self) -> Tensor:
        """Row of each entry. Shape ``[k]``."""
        return self.flat // self.shape[1]

    @cached_property
    def column(self) -> Tensor:
        """Column of each entry. Shape ``[k]``."""
        return self.flat % self.shape[1]

    @cached_property
    def starts(self) -> Tensor:
        """Where each row begins among the entries. Shape ``[o + 1]``."""
        bounds = torch.arange(self.shape[0] + 1, device=self.flat.device)
        return torch.searchsorted(self.flat, bounds * self.shape[1])

    @property
    def sampling(self) -> Sampling:
        """The way to the entries of a product, one by one."""
        return Sampling(self.starts, self.column, self.shape[1])

    @cached_property
    def used(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows and columns with an entry, and the entries' places in that block."""
        rows, row = _numbered(self.row, self.shape[0])
        columns, column = _numbered(self.column, self.shape[1])
        return rows, columns, row * len(columns) + column


def _numbered(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the distinct values below ``size``, and which of them each value is."""
    is_used = torch.zeros(size, dtype=torch.bool, device=values.device)
    is_used[values] = True
    return is_used.nonzero().flatten(), (is_used.cumsum(0) - 1)[values]
