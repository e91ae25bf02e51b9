r"""Linear layers with a sparse delta, :math:`y = x (W + \Delta)^\top + b`.

Two ways: with the delta inside the weight for the moment of the product (`linear`), or
as a product of its own (`plus_product`). No second copy of the weight is kept, no dense
gradient of it is formed, and of x only the columns that have entries are saved. All is
made of custom operators, which a compiler takes as they are.

Shapes: ``o`` outputs, ``i`` inputs, ``k`` entries. A transposed weight, as of
``Conv1D``, is ``[i, o]``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ird.sparse.delta import SparseDelta
from peft_ird.sparse.lending import with_delta
from peft_ird.sparse.products import METHODS
from peft_ird.sparse.support import Support
from peft_ird.sparse.ways import gradient_in_force

__all__ = ["linear", "plus_product"]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: SparseDelta,
    is_transposed: bool = False,
) -> Tensor:
    r"""Return :math:`x (W + \Delta)^\top + b`, as the layer would after merging.

    The gradient of the values is the dense weight gradient read at their indices (Sung
    et al., 2021, arXiv:2111.09839).

    Args:
        x: Input. Shape ``[*, i]``.
        weight: Frozen weight; unchanged afterwards. Shape ``[o, i]``, dtype of ``x``.
        bias: Shape ``[o]``; may require a gradient.
        delta: Its values own the gradient; it has a support.
        is_transposed: Whether the weight is ``[i, o]``.

    Returns:
        Output. Shape ``[*, o]``, dtype of ``x``.
    """
    support = _support(delta)
    y: Tensor = _linear(
        x, weight, bias, delta.values, delta.indices, support.rows, support.columns,
        gradient_in_force(support.gradient), is_transposed,
    )  # fmt: skip
    return y


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
    support = _support(delta)
    out: Tensor = _plus_product(
        y, x, delta.values, delta.indices, support.rows, support.columns,
        list(support.shape), gradient_in_force(support.gradient), is_transposed,
    )  # fmt: skip
    return out


def _support(delta: SparseDelta) -> Support:
    assert delta.support is not None, "A linear layer's delta has a support."
    return delta.support


@torch.library.custom_op("peft_ird::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    rows: Tensor,  # noqa: ARG001 (for the backward pass)
    columns: Tensor,  # noqa: ARG001
    method: str,  # noqa: ARG001
    is_transposed: bool,
) -> Tensor:
    with with_delta(weight, indices, values) as merged:
        if not is_transposed:
            return F.linear(x, merged, bias)
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ merged if bias is None else torch.addmm(bias, flat, merged)
        return y.view(*x.shape[:-1], merged.shape[1])


@_linear.register_fake
def _(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1 if others[-1] else 0])


@torch.library.custom_op("peft_ird::input_gradient", mutates_args=())
def _input_gradient(
    grad: Tensor, weight: Tensor, values: Tensor, indices: Tensor, is_transposed: bool
) -> Tensor:
    with with_delta(weight, indices, values) as merged:
        return grad @ (merged.t() if is_transposed else merged)


@_input_gradient.register_fake
def _(grad: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[0 if others[-1] else 1])


@torch.library.custom_op("peft_ird::value_gradient", mutates_args=())
def _value_gradient(
    grad: Tensor,
    kept: Tensor,
    values: Tensor,
    indices: Tensor,
    rows: Tensor,
    columns: Tensor,
    shape: Sequence[int],
    method: str,
    is_transposed: bool,
) -> Tensor:
    support = Support((shape[0], shape[1]), rows, columns)
    places = support.places(indices)
    if not len(places) or not kept.numel():
        return torch.zeros_like(values)
    outputs = columns if is_transposed else rows
    left, right = _taken(grad.reshape(-1, grad.shape[-1]), outputs), kept
    if is_transposed:
        left, right = right, left
    with _without_autocast(grad):
        return METHODS[method](left, right, places).to(values.dtype)


@_value_gradient.register_fake
def _(*args: Any) -> Tensor:
    return torch.empty_like(args[2])


def _keep(ctx: Any, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return what the gradient of the values needs of x. Shape ``[t, used inputs]``."""
    inputs = rows if ctx.is_transposed else columns
    return _taken(x.reshape(-1, x.shape[-1]), inputs)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
    x, weight, bias, values, indices, rows, columns, method, is_transposed = inputs
    ctx.method, ctx.is_transposed = method, is_transposed
    ctx.has_bias = bias is not None
    kept = _keep(ctx, x, rows, columns) if values.requires_grad else x.new_empty(0)
    ctx.save_for_backward(kept, weight, values, indices, rows, columns)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kept, weight, values, indices, rows, columns = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_values = ctx.needs_input_grad[:4]
    assert not needs_weight, "The base weight is frozen."
    for_x = for_values = for_bias = None
    if needs_x:
        for_x = _input_gradient(grad, weight, values, indices, ctx.is_transposed)
    if needs_values:
        for_values = _value_gradient(
            grad, kept, values, indices, rows, columns, list(weight.shape), ctx.method,
            ctx.is_transposed,
        )  # fmt: skip
    if needs_bias and ctx.has_bias:
        for_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return for_x, None, for_bias, for_values, None, None, None, None, None


_linear.register_autograd(_linear_backward, setup_context=_linear_setup)


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
    support = Support((shape[0], shape[1]), rows, columns)
    inputs, outputs = (rows, columns) if is_transposed else (columns, rows)
    block = support.dense(indices, values)
    with _without_autocast(x):
        some = _taken(x.reshape(-1, x.shape[-1]), inputs).to(values.dtype)
        share = some @ (block if is_transposed else block.t())
    out = y.clone(memory_format=torch.contiguous_format)
    flat = out.view(-1, y.shape[-1])
    sums = (_taken(flat, outputs) + share).to(y.dtype)
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
    support = Support((shape[0], shape[1]), rows, columns)
    inputs, outputs = (rows, columns) if is_transposed else (columns, rows)
    block = support.dense(indices, values)
    with _without_autocast(grad):
        some = _taken(grad.reshape(-1, grad.shape[-1]), outputs).to(values.dtype)
        share = (some @ (block.t() if is_transposed else block)).to(dtype)
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
    kept = _keep(ctx, x, rows, columns) if values.requires_grad else x.new_empty(0)
    ctx.save_for_backward(kept, values, indices, rows, columns)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kept, values, indices, rows, columns = ctx.saved_tensors
    needs_y, needs_x, needs_values = ctx.needs_input_grad[:3]
    for_x = for_values = None
    if needs_x:
        for_x = _product_input_gradient(
            grad, values, indices, rows, columns, ctx.shape, ctx.dtype,
            ctx.is_transposed,
        )  # fmt: skip
    if needs_values:
        for_values = _value_gradient(
            grad, kept, values, indices, rows, columns, ctx.shape, ctx.method,
            ctx.is_transposed,
        )  # fmt: skip
    others = (None,) * 6
    return grad if needs_y else None, for_x, for_values, *others


_plus_product.register_autograd(_product_backward, setup_context=_product_setup)


def _taken(matrix: Tensor, columns: Tensor) -> Tensor:
    return matrix.index_select(1, columns) if len(columns) else matrix


@contextmanager
def _without_autocast(tensor: Tensor) -> Iterator[None]:
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind):  # as for meta
        yield
        return
    with torch.autocast(kind, enabled=False):
        yield
