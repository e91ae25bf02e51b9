r"""The gradient of a delta's values: the dense weight gradient read at their indices.

Source: Sung et al., 2021, arXiv:2111.09839. Of the input only what it needs is kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_ird.sparse.delta import SparseDelta
from peft_ird.sparse.operator import Operator
from peft_ird.sparse.products import METHODS
from peft_ird.sparse.support import Support
from peft_ird.sparse.ways import no_autocast

__all__ = [
    "entries",
    "kept",
    "support_of",
    "taken",
    "value_gradient",
]


def support_of(delta: SparseDelta) -> Support:
    """Return the support of a matrix's delta."""
    assert delta.support is not None, "A linear layer's delta has a support."
    return delta.support


def kept(
    x: Tensor, values: Tensor, indices: Tensor, support: Support, is_transposed: bool
) -> Tensor:
    """Return what the gradient of the values needs of an input.

    Args:
        x: Input. Shape ``[*, i]``.
        values: Values of the delta; if they are frozen, nothing is needed.
        indices: Those of the delta.
        support: That of the delta.
        is_transposed: Whether the weight is ``[i, o]``.

    Returns:
        Shape ``[t, used inputs]``.
    """
    if not values.requires_grad:
        return x.new_empty(0)
    inputs = support.used(indices, 0 if is_transposed else 1)
    return taken(x.reshape(-1, x.shape[-1]), inputs)


def _compute(
    grad: Tensor,
    kept: Tensor,
    values: Tensor,
    indices: Tensor,
    sizes: Sequence[int],
    held: Tensor | None,
    method: str,
    is_transposed: bool,
) -> Tensor:
    """Return the gradient of the values.

    Args:
        grad: Gradient of the output. Shape ``[*, o]``.
        kept: What `kept` returned.
        values: The values. Shape ``[k]``.
        indices: Those of the delta.
        sizes: As in `Support`.
        held: As in `Support`.
        method: As for `entries`.
        is_transposed: As for `entries`.
    """
    rows, columns, places = Support.with_sizes(sizes, held).layout(indices)
    some = taken(grad.reshape(-1, grad.shape[-1]), columns if is_transposed else rows)
    with no_autocast(grad.device.type):
        return entries(some, kept, values, places, method, is_transposed)


def _fake(*args: Any) -> Tensor:
    return torch.empty_like(args[2])


value_gradient = Operator("value_gradient", _compute, _fake)


def entries(
    grad: Tensor,
    kept: Tensor,
    values: Tensor,
    places: Tensor,
    method: str,
    is_transposed: bool,
) -> Tensor:
    """Return the gradient of the values, on the used rows and columns.

    Args:
        grad: Gradient of the used outputs. Shape ``[t, used outputs]``.
        kept: What `kept` returned.
        values: The values. Shape ``[k]``.
        places: Their positions in the block, as in `Layout`. Shape ``[k]``.
        method: One of `METHODS`.
        is_transposed: Whether the weight is ``[i, o]``.
    """
    if not places.numel() or not kept.numel():
        return torch.zeros_like(values)
    left, right = (kept, grad) if is_transposed else (grad, kept)
    return METHODS[method](left, right, places).to(values.dtype)


def taken(matrix: Tensor, columns: Tensor) -> Tensor:
    """Return some columns of a matrix; all if none are named."""
    return matrix.index_select(1, columns) if columns.numel() else matrix
