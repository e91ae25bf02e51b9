"""Operators: opaque to compilers, and plain functions where nobody compiles."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Operator"]

_PLAIN = (Tensor, nn.Parameter)


class Operator:
    """A function of tensors with a backward pass of its own.

    Compilers get a custom operator, and so do tensors without numbers. A custom
    operator takes a tenth of a millisecond of Python at every call, which a small layer
    does not; so what is computed at once is an ordinary function of autograd.

    Args:
        name: Its name in the namespace of this package.
        compute: Returns a new tensor, or several; annotated as
            `torch.library.custom_op` wants.
        fake: Returns empty tensors of these shapes and dtypes.
        setup: Saves what backward needs, ``(ctx, inputs, output=...)``.
        backward: Returns the gradients of all arguments, ``(ctx, *grads)``; cannot be
            differentiated. None for an operator without gradients.
        tags: As for `torch.library.custom_op`.
    """

    def __init__(
        self,
        name: str,
        compute: Callable[..., Any],
        fake: Callable[..., Any],
        setup: Callable[..., None] | None = None,
        backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
        tags: Sequence[torch.Tag] = (),
    ) -> None:
        @wraps(compute)
        def fresh(*inputs: Any) -> Any:
            found = compute(*inputs)  # autograd forbids to write to views
            is_one = isinstance(found, Tensor)
            return found.data if is_one else tuple(each.data for each in found)

        self.compute = fresh
        self._opaque = torch.library.custom_op(
            f"peft_ird::{name}", fresh, mutates_args=(), tags=tags
        )
        self._opaque.register_fake(fake)
        self._function: Any = None
        if backward is None or setup is None:
            return
        gradients = backward

        def once(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():  # a graph of the gradients is wanted
                raise RuntimeError(
                    "Gradients of IRD's layers cannot be differentiated, so not with "
                    "`create_graph=True` either. Run the forward pass inside `with "
                    'peft_ird.sparse.ways.forced(way="dense"):`, which is slower.'
                )
            return gradients(ctx, *grads)

        self._opaque.register_autograd(once, setup_context=setup)

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = fresh(*inputs)
            setup(ctx, inputs, output=output)
            return output

        self._function = type(
            name,
            (torch.autograd.Function,),
            {
                "forward": staticmethod(forward),
                "backward": staticmethod(once),
            },
        )

    def __call__(self, first: Tensor, *others: Any) -> Any:
        """Compute; the first argument tells whether there are numbers."""
        is_opaque = type(first) not in _PLAIN or first.is_meta
        if is_opaque or torch.compiler.is_compiling():
            found = self._opaque(first, *others)
        elif self._function is None or not torch.is_grad_enabled():
            found = self.compute(first, *others)
        else:
            found = self._function.apply(first, *others)
        return found
