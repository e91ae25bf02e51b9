r"""Convolutions: linear layers of patches of their input.

With one group the gradient of the weight is :math:`L_n^\top R_n` as for a linear layer;
a token is a position of the output, and R holds the patch that it sees.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ird.selection.gradients.recorder import Recorder, apply

__all__ = ["convolution"]

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS: tuple[Any, ...] = (None, None, None, 1, 0, 1, 1)


class _Convolution(torch.autograd.Function):
    """A convolution; hands out instead of dweight and dbias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        _anchor: Tensor,
        recorder: Recorder,
        stride: Sequence[int],
        padding: Sequence[int],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recorder, ctx.options = recorder, (stride, padding, groups)
        ctx.numbers = recorder.number(weight), recorder.number(bias)
        for number in ctx.numbers:
            recorder.use(number)
        return torch.convolution(
            x, weight, bias, stride, padding, [1] * len(stride), False,
            [0] * len(stride), groups,
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        recorder: Recorder = ctx.recorder
        stride, padding, groups = ctx.options
        number, bias_number = ctx.numbers
        left = dy.flatten(2).transpose(1, 2)  # [rows, positions, o]
        if bias_number is not None:
            recorder.hand_out(bias_number, recorder.token_sums(left))
        if number is not None:
            patches = _patches(x, weight.shape[2:], stride, padding)
            if groups == 1:
                pair = recorder.by_sample(left), recorder.by_sample(patches)
                recorder.hand_out(number, recorder.outer(*pair))
            else:
                by_row = _by_groups(left, patches, groups)
                recorder.hand_out(number, recorder.token_sums(by_row))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.aten.convolution_backward(
                dy, x, weight, None, stride, padding, [1] * len(stride), False,
                [0] * len(stride), groups, [True, False, False],
            )[0]  # fmt: skip
        return dx, *(None,) * 7


def _patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Return what each position of the output sees. Shape ``[rows, positions, i]``."""
    around = [side for each in reversed(padding) for side in (each, each)]
    windows = F.pad(x, around)
    for dim, (size, step) in enumerate(zip(kernel, stride, strict=True)):
        windows = windows.unfold(2 + dim, size, step)
    positions = windows.ndim // 2 - 1
    inside = windows.flatten(2 + positions).movedim(1, -2)  # [rows, *positions, c, *k]
    return inside.flatten(-2).flatten(1, positions)


def _by_groups(left: Tensor, patches: Tensor, groups: int) -> Tensor:
    """Return the gradient by each row of the batch. Shape ``[rows, numel]``."""
    if left.dtype != torch.float64:
        left, patches = left.float(), patches.float()
    parted = (side.unflatten(-1, (groups, -1)) for side in (left, patches))
    return torch.einsum("rtgo,rtgi->rgoi", *parted).flatten(1)


def convolution(recorder: Recorder, _: Any, args: Any, kwargs: Any) -> Any:
    """Replace a convolution without dilation, of parameters, over a batch."""
    given: dict[str, Any] = dict(zip(_NAMES, _DEFAULTS, strict=True))
    given.update(zip(_NAMES, args, strict=False))
    given.update(kwargs)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if recorder.number(weight) is None and recorder.number(bias) is None:
        return NotImplemented
    if x.ndim != weight.ndim or not recorder.splits(x) or recorder.is_known(x):
        return NotImplemented
    sides = x.ndim - 2
    padding = 0 if given["padding"] == "valid" else given["padding"]
    if isinstance(padding, str) or {*_all(given["dilation"], sides)} != {1}:
        return NotImplemented
    stride = _all(given["stride"], sides)
    return apply(
        _Convolution, x, weight, bias, recorder.anchor, recorder, stride,
        _all(padding, sides), given["groups"],
    )  # fmt: skip


def _all(option: int | Sequence[int], sides: int) -> list[int]:
    """Return an option for each side of a kernel."""
    options = [option] if isinstance(option, int) else [*option]
    return options * sides if len(options) == 1 else options
