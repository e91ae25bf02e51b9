r"""The delta of a linear layer as a product of its own, :math:`y + x \Delta^\top`.

For base layers whose weights are not to be written to, not even for a moment, or too
coarse to hold a small delta. Shapes as in `peft_ird.sparse.linear`.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from peft_ird.sparse.delta import SparseDelta
from peft_ird.sparse.lending import unlent
from peft_ird.sparse.linear import affine, input_gradient
from peft_ird.sparse.operator import Operator
from peft_ird.sparse.products import HALVES, computable
from peft_ird.sparse.support import Support
from peft_ird.sparse.values import entries, support_of, taken
from peft_ird.sparse.ways import gradient_in_force, is_autocast, no_autocast

__all__ = ["linear_and_product", "plus_product"]


def plus_product(
    y: Tensor,
    x: Tensor,
    delta: SparseDelta,
    is_transposed: bool = False,
) -> Tensor:
    r"""Return :math:`y + x \Delta^\top`.

    Args:
        y: Output of the base layer. Shape ``[*, o]``, any floating type.
        x: Input. Shape ``[*, i]``. In 16 bits on a GPU, under autocast too, the values
            and their product are rounded to its type; else the product is computed in
            float32 or better.
        delta: Its values own the gradient; it has a support.
        is_transposed: Whether the weight is ``[i, o]``.

    Returns:
        Shape and dtype of ``y``.
    """
    support = support_of(delta)
    kind = x.device.type
    if x.is_cuda and x.dtype == torch.float32 and is_autocast(kind):
        x = x.to(torch.get_autocast_dtype(kind))  # as the base layer does
    output: Tensor
    output, _ = _plus_product(
        y, x, delta.values, delta.indices, support.sizes, support.held,
        gradient_in_force(support.gradient), is_transposed,
    )  # fmt: skip
    return output


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
    output: Tensor
    output, _ = _linear_and_product(
        x, weight, bias, delta.values, delta.indices, support.sizes, support.held,
        gradient_in_force(support.gradient), is_transposed,
    )  # fmt: skip
    return output


def _compute_plus_product(
    y: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    sizes: Sequence[int],
    held: Tensor | None,
    method: str,  # noqa: ARG001 (for the backward pass)
    is_transposed: bool,
) -> tuple[Tensor, Tensor]:
    out = y.clone(memory_format=torch.contiguous_format)
    with no_autocast(x.device.type):
        delta = _Oriented(x, values, indices, sizes, held, is_transposed)
        return out, delta.add_product_(out, x)


def _compute_linear_and_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    sizes: Sequence[int],
    held: Tensor | None,
    method: str,  # noqa: ARG001 (for the backward pass)
    is_transposed: bool,
) -> tuple[Tensor, Tensor]:
    with unlent(weight):
        y = affine(x, weight, bias, is_transposed)
    delta = _Oriented(x, values, indices, sizes, held, is_transposed)
    return y, delta.add_product_(y, x)


def _fake_plus_product(y: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    _values, _indices, sizes, _held, _method, is_transposed = others
    return y.new_empty(y.shape), _fake_copy(x, sizes, is_transposed)


def _fake_linear_and_product(
    x: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    _bias, _values, _indices, sizes, _held, _method, is_transposed = others
    y = x.new_empty(*x.shape[:-1], weight.shape[1 if is_transposed else 0])
    return y, _fake_copy(x, sizes, is_transposed)


def _fake_copy(x: Tensor, sizes: Sequence[int], is_transposed: bool) -> Tensor:
    if _is_whole(sizes, is_transposed):
        return x.new_empty(0)
    tokens = x.reshape(-1, x.shape[-1]).shape[0]
    return x.new_empty(tokens, sizes[2 if is_transposed else 3])


def _is_whole(sizes: Sequence[int], is_transposed: bool) -> bool:
    """Return whether a block has all inputs."""
    side = 0 if is_transposed else 1
    return sizes[side] == sizes[2 + side]


def _product_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, x, *others = inputs
    _save(ctx, x, output[1], None, *others)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, *others = inputs
    _save(ctx, x, output[1], weight, *others)


def _save(
    ctx: Any,
    x: Tensor,
    some: Tensor,
    weight: Tensor | None,
    values: Tensor,
    indices: Tensor,
    sizes: Sequence[int],
    held: Tensor | None,
    method: str,
    is_transposed: bool,
) -> None:
    """Save what was taken of the input; the input itself where that is all of it."""
    ctx.mark_non_differentiable(some)
    ctx.set_materialize_grads(False)
    ctx.facts = sizes, x.dtype, method, is_transposed
    kept = x.reshape(-1, x.shape[-1]) if _is_whole(sizes, is_transposed) else some
    if not values.requires_grad:
        kept = x.new_empty(0)
    ctx.save_for_backward(kept, weight, values, indices, held)


def _compute_gradients(
    grad: Tensor,
    kept: Tensor,
    weight: Tensor | None,
    values: Tensor,
    indices: Tensor,
    held: Tensor | None,
    sizes: Sequence[int],
    dtype: torch.dtype,
    method: str,
    is_transposed: bool,
    needs_x: bool,
    needs_values: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the input, by the weight too if it is given, and values.

    One that is not needed is empty.
    """
    for_x, for_values = grad.new_empty(0, dtype=dtype), values.new_empty(0)
    with no_autocast(grad.device.type):
        delta = _Oriented(grad, values, indices, sizes, held, is_transposed)
        some = taken(grad.reshape(-1, grad.shape[-1]), delta.outputs)
        if needs_x:
            if weight is None:
                width = sizes[0 if is_transposed else 1]
                for_x = grad.new_zeros(*grad.shape[:-1], width, dtype=dtype)
            else:
                with unlent(weight):
                    for_x = input_gradient(grad, weight, is_transposed)
            delta.add_input_gradient_(for_x, some)
        if needs_values:
            for_values = entries(
                some, kept, values, delta.places, method, is_transposed
            )
    return for_x, for_values


def _fake_gradients(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    _kept, _weight, values, _indices, _held, sizes, dtype, _method = others[:8]
    is_transposed, needs_x, needs_values = others[8:]
    shape = (*grad.shape[:-1], sizes[0 if is_transposed else 1]) if needs_x else (0,)
    for_values = values.new_empty(values.shape if needs_values else 0)
    return grad.new_empty(shape, dtype=dtype), for_values


_gradients = Operator("product_gradients", _compute_gradients, _fake_gradients)


def _through(
    ctx: Any, grad: Tensor | None, needs_x: bool, needs_values: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the input and of the values, as far as needed."""
    if grad is None or not (needs_x or needs_values):
        return None, None
    kept, weight, values, indices, held = ctx.saved_tensors
    for_x, for_values = _gradients(
        grad, kept, weight, values, indices, held, *ctx.facts, needs_x, needs_values
    )
    return for_x if needs_x else None, for_values if needs_values else None


def _product_backward(
    ctx: Any, grad: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs_y, needs_x, needs_values = ctx.needs_input_grad[:3]
    found = _through(ctx, grad, needs_x, needs_values)
    return grad if needs_y else None, *found, *(None,) * 5


def _linear_backward(
    ctx: Any, grad: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs_x, needs_weight, needs_bias, needs_values = ctx.needs_input_grad[:4]
    assert not needs_weight, "The base weight is frozen."
    assert not needs_bias, "The base layer's bias is frozen."
    for_x, for_values = _through(ctx, grad, needs_x, needs_values)
    return for_x, None, None, for_values, *(None,) * 5


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
        indices: Tensor,
        sizes: Sequence[int],
        held: Tensor | None,
        is_transposed: bool,
    ) -> None:
        is_half = like.is_cuda and like.dtype in HALVES
        self._values = values.to(like.dtype) if is_half else computable(values)
        self._support = Support.with_sizes(sizes, held)
        self._is_transposed = is_transposed
        rows, columns, self.places = self._support.layout(indices)
        self.inputs, self.outputs = (
            (rows, columns) if is_transposed else (columns, rows)
        )

    @cached_property
    def block(self) -> Tensor:
        """The delta on used inputs and outputs. Shape ``[inputs, outputs]``."""
        block = self._support.dense(self.places, self._values)
        return block if self._is_transposed else block.t()

    def add_product_(self, y: Tensor, x: Tensor) -> Tensor:
        """Add the product of an input and the block to an output.

        Args:
            y: Shape ``[*, o]``, contiguous.
            x: Shape ``[*, i]``.

        Returns:
            The used columns of the input. Shape ``[t, used inputs]``; ``[0]`` where
            that is all of it.
        """
        some = taken(x.reshape(-1, x.shape[-1]), self.inputs)
        _add_product_(y, some, self.block, self.outputs)
        return some if self.inputs.numel() else x.new_empty(0)

    def add_input_gradient_(self, out: Tensor, grad: Tensor) -> None:
        """Add the gradient of the input to ``out``.

        Args:
            out: Shape ``[*, i]``, contiguous.
            grad: Gradient of the used outputs. Shape ``[t, used outputs]``.
        """
        _add_product_(out, grad, self.block.t(), self.inputs)


def _add_product_(out: Tensor, side: Tensor, block: Tensor, target: Tensor) -> None:
    """Add the product of a side and a block to some columns of ``out``, or to all."""
    flat, side = out.view(-1, out.shape[-1]), side.to(block.dtype)
    if not target.numel() and flat.dtype == block.dtype:
        flat.addmm_(side, block)  # rounded once
    elif not target.numel():
        flat += side @ block
    elif flat.dtype == block.dtype:
        flat.index_add_(1, target, side @ block)
    else:
        sums = flat.index_select(1, target) + side @ block
        flat.index_copy_(1, target.long(), sums.to(flat.dtype))
