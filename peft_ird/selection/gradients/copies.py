"""Parameters that are spread over a batch: each sample gets a copy of its own.

Handlers are as in `peft_ird.selection.gradients.substitutes`.
"""

from typing import Any

import torch
from torch import Tensor

from peft_ird.selection.gradients.recorder import Recorder, apply

__all__ = ["add", "broadcast", "expand", "repeat"]


class _Copies(torch.autograd.Function):
    """One copy of a parameter for each sample, ``[n, *shape]``; hands out its gradient.

    Copies are in float32 or better.
    """

    @staticmethod
    def forward(
        ctx: Any, parameter: Tensor, _anchor: Tensor, recorder: Recorder
    ) -> Tensor:
        ctx.recorder, ctx.number = recorder, recorder.number(parameter)
        recorder.use(ctx.number)
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        return parameter.to(dtype).expand(recorder.size, *parameter.shape).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        recorder: Recorder = ctx.recorder
        values = grads[0].reshape(recorder.size, -1)
        recorder.hand_out(ctx.number, recorder.dense(values))
        return None, None, None


def add(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Let a parameter plus a number, as in norms, stand for the parameter."""
    if len(args) == 2 and not kwargs:
        for one, other in (args, args[::-1]):
            if recorder.number(one) is not None and isinstance(other, int | float):
                return recorder.alias(one, func(*args))
    return broadcast(recorder, func, args, kwargs)


def broadcast(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Give each sample a copy of a parameter that is broadcast against a batch."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    numbers = [recorder.number(arg) for arg in args]
    if numbers == [None, None]:
        return NotImplemented
    position = 1 if numbers[0] is None else 0
    parameter, other = args[position], args[1 - position]
    if not isinstance(other, Tensor) or not other.is_floating_point():
        return NotImplemented
    shape = parameter.shape
    if len(shape) == other.ndim and len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    fits = other.ndim > len(shape) and recorder.splits(other) and other.numel() > 0
    if recorder.is_known(other) or not fits:
        return NotImplemented
    if torch.broadcast_shapes(shape, other.shape) != other.shape:
        return NotImplemented
    copies = _copies(recorder, parameter, other.shape, len(shape))
    pair = (copies, other) if position == 0 else (other, copies)
    return func(*pair).to(torch.result_type(parameter, other))


def expand(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Give each sample a copy of a parameter that is expanded to a batch."""
    if not args or recorder.number(args[0]) is None or kwargs:
        return NotImplemented
    parameter, result = args[0], func(*args)
    own = parameter.ndim
    if own == result.ndim and own > 0 and parameter.shape[0] == 1:
        own -= 1
    if own >= result.ndim or not recorder.splits(result):
        return NotImplemented
    copies = _copies(recorder, parameter, result.shape, own)
    return copies.to(parameter.dtype).expand(result.shape)


def repeat(recorder: Recorder, _: Any, args: Any, kwargs: Any) -> Any:
    """As `expand`, for a parameter that is repeated once for each sample."""
    if not args:
        return NotImplemented
    parameter, *times = args
    times = times[0] if len(times) == 1 and not isinstance(times[0], int) else times
    if recorder.number(parameter) is None or kwargs or {*times[1:]} != {1}:
        return NotImplemented
    is_row = len(times) == parameter.ndim and parameter.shape[0] == 1
    if not is_row and len(times) != parameter.ndim + 1:
        return NotImplemented
    rest = parameter.shape[1:] if is_row else parameter.shape
    result = expand(recorder, Tensor.expand, (parameter, times[0], *rest), {})
    return result if result is NotImplemented else result.clone()


def _copies(
    recorder: Recorder, parameter: Tensor, shape: torch.Size, own: int
) -> Tensor:
    """Return a copy of a parameter per sample, which hands out its gradient."""
    copies: Tensor = apply(_Copies, parameter, recorder.anchor, recorder)
    size = recorder.size
    rest = parameter.shape[parameter.ndim - own :]
    between = (1,) * (len(shape) - 1 - own)
    each = shape[0] // size
    spread = copies.reshape(size, 1, *between, *rest)
    return spread.expand(size, each, *between, *rest).flatten(0, 1)
