r"""Linear layers with a sparse delta, :math:`y = x (W + \Delta)^\top + b`.

The delta is inside the weight for the moment of the product. No second copy of the
weight is kept, no dense gradient of it is formed, and of x only the columns that have
entries are saved. It is made of custom operators, which a compiler takes as they are.

Shapes: ``o`` outputs, ``i`` inputs, ``k`` entries. A transposed weight, as of
``Conv1D``, is ``[i, o]``.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ird.sparse.delta import SparseDelta
from peft_ird.sparse.lending import with_delta
from peft_ird.sparse.operator import Operator
from peft_ird.sparse.support import Support
from peft_ird.sparse.values import kept, support_of, value_gradient
from peft_ird.sparse.ways import gradient_in_force

__all__ = ["affine", "input_gradient", "linear"]


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
    support = support_of(delta)
    output: Tensor = _linear(
        x, weight, bias, delta.values, delta.indices, support.sizes, support.held,
        gradient_in_force(support.gradient), is_transposed,
    )  # fmt: skip
    return output


def _compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    sizes: Sequence[int],  # noqa: ARG001 (for the backward pass)
    held: Tensor | None,  # noqa: ARG001
    method: str,  # noqa: ARG001
    is_transposed: bool,
) -> Tensor:
    run = partial(affine, x, bias=bias, is_transposed=is_transposed)
    return with_delta(weight, indices, values, run, x)


def affine(
    x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool
) -> Tensor:
    """Return what the layer computes with a weight; shapes as for `linear`."""
    if not is_transposed:
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return y.view(*x.shape[:-1], weight.shape[1])


def input_gradient(grad: Tensor, weight: Tensor, is_transposed: bool) -> Tensor:
    """Return the gradient of the layer's input; shapes as for `linear`."""
    return grad @ (weight.t() if is_transposed else weight)


def _fake(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1 if others[-1] else 0])


def _compute_input_gradient(
    grad: Tensor, weight: Tensor, values: Tensor, indices: Tensor, is_transposed: bool
) -> Tensor:
    run = partial(input_gradient, grad, is_transposed=is_transposed)
    return with_delta(weight, indices, values, run, grad)


def _fake_input_gradient(grad: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[0 if others[-1] else 1])


_input_gradient = Operator(
    "input_gradient", _compute_input_gradient, _fake_input_gradient
)


def _setup(ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
    x, weight, _, values, indices, ctx.sizes, held = inputs[:7]
    ctx.method, ctx.is_transposed = inputs[7:]
    support = Support.with_sizes(ctx.sizes, held)
    needed = kept(x, values, indices, support, ctx.is_transposed)
    ctx.save_for_backward(needed, weight, values, indices, held)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed, weight, values, indices, held = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_values = ctx.needs_input_grad[:4]
    assert not needs_weight, "The base weight is frozen."
    for_x = for_values = for_bias = None
    if needs_x:
        for_x = _input_gradient(grad, weight, values, indices, ctx.is_transposed)
    if needs_values:
        for_values = value_gradient(
            grad, needed, values, indices, ctx.sizes, held, ctx.method,
            ctx.is_transposed,
        )  # fmt: skip
    if needs_bias:
        for_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return for_x, None, for_bias, for_values, *(None,) * 5


_linear = Operator("linear", _compute, _fake, _setup, _backward)
