"""The sparse delta: the one data type that selection, layers and files share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from peft_ird.sparse.support import Support

__all__ = ["SparseDelta", "check_indices", "index_dtype"]


def index_dtype(numel: int) -> torch.dtype:
    """Return the integer type for flat positions in a tensor of ``numel`` entries."""
    return torch.int32 if numel <= torch.iinfo(torch.int32).max else torch.int64


def check_indices(indices: Tensor, numel: int, name: str) -> None:
    """Check that flat positions are sorted, distinct and inside the tensor.

    Args:
        indices: Flat row-major positions. Shape ``[k]``, integer.
        numel: Number of entries of the tensor that they point into.
        name: The parameter's name, for the message.

    Raises:
        ValueError: If a position repeats, is out of order or out of range.
    """
    if indices.numel() == 0:
        return
    if indices.ndim != 1 or indices.is_floating_point() or indices.is_complex():
        raise ValueError(
            f"The indices of '{name}' must be a 1-D integer tensor, got shape "
            f"{tuple(indices.shape)} and dtype {indices.dtype}."
        )
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= numel:
        raise ValueError(
            f"The indices of '{name}' must lie in [0, {numel}), got {low} to {high}. "
            "Was the adapter made for another base model?"
        )
    if bool((indices[1:] <= indices[:-1]).any()):
        raise ValueError(
            f"The indices of '{name}' must be sorted and distinct, but some repeat or "
            "are out of order. The file is damaged; save the adapter again."
        )


@dataclass(frozen=True)
class SparseDelta:
    """An additive update of a few entries of one tensor.

    Args:
        indices: Distinct flat row-major positions, sorted. Shape ``[k]``, int32
            (int64 past 2^31 entries).
        values: The update at these positions. Shape ``[k]``, floating point; owns the
            gradient.
        shape: Shape of the tensor that is updated.
        support: Its rows and columns with entries, for a matrix.
    """

    indices: Tensor
    values: Tensor
    shape: torch.Size
    support: Support | None = None

    def to_dense(self, dtype: torch.dtype) -> Tensor:
        """Return the delta as a dense tensor, differentiable in ``values``.

        Args:
            dtype: Type of the result.

        Returns:
            Zeros but for the selected entries. Shape ``shape``.
        """
        flat = self.values.new_zeros(self.shape.numel(), dtype=dtype)
        return flat.index_add(0, self.indices, self.values.to(dtype)).view(self.shape)
