r"""The delta of a linear layer as a product of its own, :math:`y + x \Delta^\top`.

For base layers whose weights are not to be written to, not even for a moment, or too
coarse to hold a small delta. Shapes as in `peft_ird.sparse.linear`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_ird.sparse.delta import SparseDelta
from peft_ird.sparse.products import computable
from peft_ird.sparse.support import Support
from peft_ird.sparse.values import (
    kept,
    support_of,
    taken,
    value_gradient,
    without_autocast,
)
from peft_ird.sparse.ways import gradient_in_force

__all__ = ["plus_product"]


def plus_product(
    y: Tensor,
    x: Tensor,
    delta: SparseDelta,
    is_transposed: bool = False,
) -> Tensor:
    r"""Return :math:`y + x \Delta^\top`, computed in float32 or better.

    Args:
        y: Output of the base layer. Shape ``[*, o]``, any floating type.
        x: Input. Shape ``[*, i]``.
        delta: Its values own the gradient; it has a support.
        is_transposed: Whether the weight is ``[i, o]``.

    Returns:
        Shape and dtype of ``y``.
    """
    support = support_of(delta)
    out: Tensor = _plus_product(
        y, x, delta.values, delta.indices, support.rows, support.columns,
        list(support.shape), gradient_in_force(support.gradient), is_transposed,
    )  # fmt: skip
    return out


@torch.library.custom_op("peft_ird::plus_product", mutates_args=())
def _plus_product(
    y: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    rows: Tensor,
    columns: Tensor,
    shape: Sequence[int],
    method: str,  # noqa: ARG001 (for the backward pass)
    is_transposed: bool,
) -> Tensor:
    inputs, outputs, block = _oriented(
        values, indices, rows, columns, shape, is_transposed
    )
    with without_autocast(x):
        some = taken(x.reshape(-1, x.shape[-1]), inputs).to(block.dtype)
        share = some @ block
    out = y.clone(memory_format=torch.contiguous_format)
    flat = out.view(-1, y.shape[-1])
    sums = (taken(flat, outputs) + share).to(y.dtype)
    if len(outputs):
        flat.index_copy_(1, outputs.long(), sums)
    else:
        flat.copy_(sums)
    return out


@_plus_product.register_fake
def _(y: Tensor, *_: Any) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op("peft_ird::product_input_gradient", mutates_args=())
def _product_input_gradient(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    rows: Tensor,
    columns: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    is_transposed: bool,
) -> Tensor:
    inputs, outputs, block = _oriented(
        values, indices, rows, columns, shape, is_transposed
    )
    with without_autocast(grad):
        some = taken(grad.reshape(-1, grad.shape[-1]), outputs).to(block.dtype)
        share = (some @ block.t()).to(dtype)
    width = shape[0 if is_transposed else 1]
    if len(inputs):
        whole = share.new_zeros(len(share), width)
        share = whole.index_copy_(1, inputs.long(), share)
    return share.view(*grad.shape[:-1], width)


@_product_input_gradient.register_fake
def _(grad: Tensor, *others: Any) -> Tensor:
    shape, dtype, is_transposed = others[-3:]
    return grad.new_empty(
        *grad.shape[:-1], shape[0 if is_transposed else 1], dtype=dtype
    )


def _product_setup(ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
    _, x, values, indices, rows, columns, shape, method, is_transposed = inputs
    ctx.shape, ctx.method, ctx.is_transposed = shape, method, is_transposed
    ctx.dtype = x.dtype
    support = Support((shape[0], shape[1]), rows, columns)
    needed = kept(x, values, support, is_transposed)
    ctx.save_for_backward(needed, values, indices, rows, columns)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed, values, indices, rows, columns = ctx.saved_tensors
    needs_y, needs_x, needs_values = ctx.needs_input_grad[:3]
    for_x = for_values = None
    if needs_x:
        for_x = _product_input_gradient(
            grad, values, indices, rows, columns, ctx.shape, ctx.dtype,
            ctx.is_transposed,
        )  # fmt: skip
    if needs_values:
        for_values = value_gradient(
            grad, needed, values, indices, rows, columns, ctx.shape, ctx.method,
            ctx.is_transposed,
        )  # fmt: skip
    others = (None,) * 6
    return grad if needs_y else None, for_x, for_values, *others


_plus_product.register_autograd(_product_backward, setup_context=_product_setup)


def _oriented(
    values: Tensor,
    indices: Tensor,
    rows: Tensor,
    columns: Tensor,
    shape: Sequence[int],
    is_transposed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the used inputs, the used outputs, and the delta at both in float32."""
    support = Support((shape[0], shape[1]), rows, columns)
    block = support.dense(indices, computable(values))
    return (rows, columns, block) if is_transposed else (columns, rows, block.t())
