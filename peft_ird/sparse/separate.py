r"""The delta of a linear layer as a product of its own, :math:`y + x \Delta^\top`.

For base layers whose weights are not to be written to, not even for a moment, or too
coarse to hold a small delta. Shapes as in `peft_ird.sparse.linear`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_ird.sparse.delta import SparseDelta
from peft_ird.sparse.linear import affine
from peft_ird.sparse.operator import Operator
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

__all__ = ["linear_and_product", "plus_product"]

_HALVES = (torch.bfloat16, torch.float16)


def plus_product(
    y: Tensor,
    x: Tensor,
    delta: SparseDelta,
    is_transposed: bool = False,
) -> Tensor:
    r"""Return :math:`y + x \Delta^\top`, with sums in float32 or better.

    Args:
        y: Output of the base layer. Shape ``[*, o]``, any floating type.
        x: Input. Shape ``[*, i]``. In 16 bits on a GPU the values are rounded to its
            type; else the product is computed in float32 or better.
        delta: Its values own the gradient; it has a support.
        is_transposed: Whether the weight is ``[i, o]``.

    Returns:
        Shape and dtype of ``y``.
    """
    support = support_of(delta)
    return _plus_product(
        y, x, delta.values, support.places(delta.indices), support.rows,
        support.columns, list(support.shape), gradient_in_force(support.gradient),
        is_transposed,
    )  # fmt: skip


def linear_and_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: SparseDelta,
    is_transposed: bool = False,
) -> Tensor:
    """Return what `plus_product` makes of the layer's output, without a copy of it.

    Args:
        x: Input. Shape ``[*, i]``.
        weight: Frozen weight. Shape ``[o, i]``, dtype of ``x``.
        bias: Frozen. Shape ``[o]``.
        delta: As for `plus_product`.
        is_transposed: Whether the weight is ``[i, o]``.

    Returns:
        Shape ``[*, o]``, dtype of ``x``.
    """
    support = support_of(delta)
    return _linear_and_product(
        x, weight, bias, delta.values, support.places(delta.indices), support.rows,
        support.columns, gradient_in_force(support.gradient), is_transposed,
    )  # fmt: skip


def _compute_plus_product(
    y: Tensor,
    x: Tensor,
    values: Tensor,
    places: Tensor,
    rows: Tensor,
    columns: Tensor,
    shape: Sequence[int],
    method: str,  # noqa: ARG001 (for the backward pass)
    is_transposed: bool,
) -> Tensor:
    out = y.clone(memory_format=torch.contiguous_format)
    with without_autocast(x):
        delta = _Oriented(x, values, places, rows, columns, shape, is_transposed)
        delta.add_product_(out, x)
    return out


def _fake_plus_product(y: Tensor, *_: Any) -> Tensor:
    return y.new_empty(y.shape)


def _compute_linear_and_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    places: Tensor,
    rows: Tensor,
    columns: Tensor,
    method: str,  # noqa: ARG001 (for the backward pass)
    is_transposed: bool,
) -> Tensor:
    y = affine(x, weight, bias, is_transposed)
    delta = _Oriented(x, values, places, rows, columns, weight.shape, is_transposed)
    delta.add_product_(y, x)
    return y


def _fake_linear_and_product(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1 if others[-1] else 0])


def _compute_product_input_gradient(
    grad: Tensor,
    weight: Tensor | None,
    values: Tensor,
    places: Tensor,
    rows: Tensor,
    columns: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    is_transposed: bool,
) -> Tensor:
    """Return the gradient that comes through the delta, and the weight if given."""
    width = shape[0 if is_transposed else 1]
    with without_autocast(grad):
        if weight is None:
            out = grad.new_zeros(*grad.shape[:-1], width, dtype=dtype)
        else:
            out = grad @ (weight.t() if is_transposed else weight)
        delta = _Oriented(grad, values, places, rows, columns, shape, is_transposed)
        delta.add_product_(out, grad, is_backward=True)
    return out


def _fake_product_input_gradient(grad: Tensor, *others: Any) -> Tensor:
    shape, dtype, is_transposed = others[-3:]
    return grad.new_empty(
        *grad.shape[:-1], shape[0 if is_transposed else 1], dtype=dtype
    )


def _product_setup(ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
    _, x, values, places, rows, columns, shape, method, is_transposed = inputs
    ctx.shape, ctx.method, ctx.is_transposed = shape, method, is_transposed
    ctx.dtype = x.dtype
    support = Support((shape[0], shape[1]), rows, columns)
    needed = kept(x, values, support, is_transposed)
    ctx.save_for_backward(needed, None, values, places, rows, columns)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
    x, weight, _, values, places, rows, columns, method, is_transposed = inputs
    ctx.shape, ctx.method, ctx.is_transposed = [*weight.shape], method, is_transposed
    ctx.dtype = x.dtype
    support = Support((weight.shape[0], weight.shape[1]), rows, columns)
    needed = kept(x, values, support, is_transposed)
    ctx.save_for_backward(needed, weight, values, places, rows, columns)


def _gradients(
    ctx: Any, grad: Tensor, needs_x: bool, needs_values: bool
) -> tuple[Tensor | None, Tensor | None]:
    needed, weight, values, places, rows, columns = ctx.saved_tensors
    for_x = for_values = None
    if needs_x:
        for_x = _product_input_gradient(
            grad, weight, values, places, rows, columns, ctx.shape, ctx.dtype,
            ctx.is_transposed,
        )  # fmt: skip
    if needs_values:
        for_values = value_gradient(
            grad, needed, values, places, rows, columns, ctx.method, ctx.is_transposed
        )
    return for_x, for_values


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_y, needs_x, needs_values = ctx.needs_input_grad[:3]
    found = _gradients(ctx, grad, needs_x, needs_values)
    return grad if needs_y else None, *found, *(None,) * 6


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_weight, needs_bias, needs_values = ctx.needs_input_grad[:4]
    assert not needs_weight, "The base weight is frozen."
    assert not needs_bias, "The base layer's bias is frozen."
    for_x, for_values = _gradients(ctx, grad, needs_x, needs_values)
    return for_x, None, None, for_values, *(None,) * 5


_product_input_gradient = Operator(
    "product_input_gradient",
    _compute_product_input_gradient,
    _fake_product_input_gradient,
)
_plus_product = Operator(
    "plus_product",
    _compute_plus_product,
    _fake_plus_product,
    _product_setup,
    _product_backward,
)
_linear_and_product = Operator(
    "linear_and_product",
    _compute_linear_and_product,
    _fake_linear_and_product,
    _linear_setup,
    _linear_backward,
)


class _Oriented:
    """A delta's block, from inputs to outputs, in the type that it is computed in."""

    def __init__(
        self,
        like: Tensor,
        values: Tensor,
        places: Tensor,
        rows: Tensor,
        columns: Tensor,
        shape: Sequence[int],
        is_transposed: bool,
    ) -> None:
        is_half = like.is_cuda and like.dtype in _HALVES
        values = values.to(like.dtype) if is_half else computable(values)
        support = Support((shape[0], shape[1]), rows, columns)
        block = support.dense(places, values)
        self.inputs, self.outputs = (
            (rows, columns) if is_transposed else (columns, rows)
        )
        self.block = block if is_transposed else block.t()

    def add_product_(
        self, out: Tensor, side: Tensor, is_backward: bool = False
    ) -> None:
        """Add the product of a side and the block to ``out``, rounded once.

        Args:
            out: Shape ``[*, o]``, or ``[*, i]`` backward; contiguous.
            side: Shape ``[*, i]``, or ``[*, o]`` backward.
            is_backward: Whether it goes from outputs to inputs.
        """
        block, used, target = self.block, self.inputs, self.outputs
        if is_backward:
            block, used, target = block.t(), target, used
        some = taken(side.reshape(-1, side.shape[-1]), used)
        share = some.to(block.dtype) @ block
        flat = out.view(-1, out.shape[-1])
        if not target.numel():
            flat += share
        elif share.dtype == flat.dtype:
            flat.index_add_(1, target, share)
        else:
            sums = flat.index_select(1, target) + share
            flat.index_copy_(1, target.long(), sums.to(flat.dtype))
