"""Embeddings with a sparse delta: what it costs depends on tokens and entries alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ird.sparse.delta import SparseDelta
from peft_ird.sparse.lending import unlent
from peft_ird.sparse.operator import Operator

__all__ = ["plus_rows", "rows_of"]

_NO_PADDING = -1


def plus_rows(
    y: Tensor, ids: Tensor, delta: SparseDelta, padding_idx: int | None = None
) -> Tensor:
    r"""Return :math:`y + \Delta[\text{ids}]`.

    Args:
        y: Output of the base layer. Shape ``[*, i]``, any floating type.
        ids: Rows that were looked up. Shape ``[*]``, integer.
        delta: Delta of the table, ``[rows, i]``; its values own the gradient.
        padding_idx: Row whose entries get no gradient.

    Returns:
        Shape and dtype of ``y``.
    """
    padding = _NO_PADDING if padding_idx is None else padding_idx
    found: Tensor = _plus_rows(y, ids, delta.values, delta.indices, padding)
    return found


def rows_of(weight: Tensor, ids: Tensor) -> Tensor:
    """Look up rows of a frozen table into which a linear layer may put its delta.

    Args:
        weight: The table. Shape ``[rows, i]``; gets no gradient.
        ids: Rows. Shape ``[*]``, integer.

    Returns:
        Shape ``[*, i]``, dtype of ``weight``.
    """
    found: Tensor = _rows_of(weight, ids)
    return found


def _compute_rows_of(weight: Tensor, ids: Tensor) -> Tensor:
    with unlent(weight):
        return F.embedding(ids, weight)


def _fake_rows_of(weight: Tensor, ids: Tensor) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


def _compute(
    y: Tensor,
    ids: Tensor,
    values: Tensor,
    indices: Tensor,
    padding: int,  # noqa: ARG001 (for the backward pass)
) -> Tensor:
    out = y.clone(memory_format=torch.contiguous_format)
    flat, (entry, place) = out.view(-1), _matches(ids, indices, y.shape[-1])
    flat[place] = (flat[place] + values[entry]).to(y.dtype)
    return out


def _fake(y: Tensor, *_: Any) -> Tensor:
    return y.new_empty(y.shape)


def _compute_gradient(
    grad: Tensor, ids: Tensor, values: Tensor, indices: Tensor, padding: int
) -> Tensor:
    entry, place = _matches(ids, indices, grad.shape[-1], padding)
    found = grad.reshape(-1)[place].to(values.dtype)
    return torch.zeros_like(values).index_add_(0, entry, found)


def _fake_gradient(*args: Any) -> Tensor:
    return torch.empty_like(args[2])


def _setup(ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
    _, ids, values, indices, ctx.padding = inputs
    ctx.save_for_backward(ids, values, indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, values, indices = ctx.saved_tensors
    needs_y, _, needs_values = ctx.needs_input_grad[:3]
    found = None
    if needs_values:
        found = _rows_gradient(grad, ids, values, indices, ctx.padding)
    return grad if needs_y else None, None, found, None, None


# How many entries the tokens have is not known before: no graph of CUDA's can hold it.
_SIZED = (torch.Tag.cudagraph_unsafe,)
_rows_of = Operator("rows_of", _compute_rows_of, _fake_rows_of)
_plus_rows = Operator("plus_rows", _compute, _fake, _setup, _backward, _SIZED)
_rows_gradient = Operator(
    "rows_gradient", _compute_gradient, _fake_gradient, tags=_SIZED
)


def _matches(
    ids: Tensor, indices: Tensor, width: int, padding: int = _NO_PADDING
) -> tuple[Tensor, Tensor]:
    """Return each entry of each token's row, and its place in the flat output."""
    rows = ids.reshape(-1).to(indices.dtype)
    first, last = (
        torch.searchsorted(indices, bound * width) for bound in (rows, rows + 1)
    )
    count = (last - first).masked_fill(rows == padding, 0)
    token = torch.arange(len(rows), device=ids.device).repeat_interleave(count)
    before = count.cumsum(0) - count
    entry = torch.arange(len(token), device=ids.device) + (first - before)[token]
    return entry, token * width + indices[entry] % width
