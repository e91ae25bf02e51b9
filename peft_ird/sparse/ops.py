"""Arithmetic of sparse deltas on dense weights.

Shapes: ``k`` selected entries of a tensor, in flat row-major order.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from peft_ird.sparse.delta import SparseDelta

__all__ = ["add_deltas", "gather", "scatter_", "sum_dense"]


def add_deltas(weight: Tensor, deltas: Iterable[SparseDelta]) -> Tensor:
    r"""Return :math:`W + \sum_a \Delta_a` as a new tensor.

    The gradient of a delta's values is the dense weight gradient read at its indices
    (Sung et al., 2021, arXiv:2111.09839).

    Args:
        weight: Frozen tensor of any shape; it is not changed.
        deltas: Updates of that shape; their values are cast to the weight's dtype.

    Returns:
        A tensor of the shape and dtype of ``weight``.
    """
    flat = weight.reshape(-1)
    for delta in deltas:
        flat = flat.index_add(0, delta.indices, delta.values.to(weight.dtype))
    return flat.view(weight.shape)


def sum_dense(deltas: Sequence[SparseDelta], dtype: torch.dtype) -> Tensor:
    r"""Return :math:`\sum_a \Delta_a` as a dense tensor.

    Args:
        deltas: At least one update; all of one shape.
        dtype: Type of the result.

    Returns:
        The sum. Shape of the deltas.
    """
    total = deltas[0].to_dense(dtype)
    for delta in deltas[1:]:
        total = total + delta.to_dense(dtype)
    return total


def gather(tensor: Tensor, indices: Tensor) -> Tensor:
    """Return the entries at flat row-major positions, whatever the memory layout.

    Args:
        tensor: Any shape.
        indices: Flat positions. Shape ``[k]``, integer.

    Returns:
        A copy of the entries. Shape ``[k]``, dtype of ``tensor``.
    """
    if tensor.is_contiguous():
        return tensor.view(-1).index_select(0, indices)
    return tensor[_position(tensor, indices)]


def scatter_(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Overwrite the entries at flat row-major positions in place.

    Args:
        tensor: Any shape; changed in place.
        indices: Distinct flat positions. Shape ``[k]``, integer.
        values: New entries. Shape ``[k]``, dtype of ``tensor``.
    """
    if tensor.is_contiguous():
        tensor.view(-1).scatter_(0, indices.long(), values)
    else:
        tensor[_position(tensor, indices)] = values


def _position(tensor: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    """Return the multi-dimensional form of flat positions, for indexing."""
    if tensor.ndim == 0:
        return (torch.ones((), dtype=torch.bool, device=tensor.device),)
    return torch.unravel_index(indices.long(), tensor.shape)
