"""Uses of a parameter, replaced by ones that leave the gradient of each sample.

Each substitute has the arguments of the function it stands for. It returns
``NotImplemented`` where that function is better left alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ird.selection.gradients.recorder import Recorder
from peft_ird.selection.gradients.signatures import bind

__all__ = ["SUBSTITUTES"]


class _Linear(torch.autograd.Function):
    """``x W^T + b``, or ``x W + b`` if ``transposed``; hands out instead of dW, db."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        _anchor: Tensor,
        recorder: Recorder,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recorder, ctx.transposed = recorder, transposed
        ctx.numbers = recorder.number(weight), recorder.number(bias)
        for number in ctx.numbers:
            recorder.use(number)
        if transposed:
            y = x @ weight if bias is None else torch.addmm(bias, x, weight)
        else:
            y = F.linear(x, weight, bias)
        return y.data  # some models write to it, which autograd forbids with views

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        recorder: Recorder = ctx.recorder
        number, bias_number = ctx.numbers
        by_sample = recorder.by_sample(dy)
        if bias_number is not None:
            recorder.hand_out(bias_number, recorder.dense(_sum_tokens(by_sample)))
        if number is not None:
            pair = (by_sample, recorder.by_sample(x))
            left, right = reversed(pair) if ctx.transposed else pair
            recorder.hand_out(number, recorder.outer(left, right))
        dx = None
        if ctx.needs_input_grad[0]:
            matrix = (weight.t() if ctx.transposed else weight).to(dy.dtype)
            dx = (dy @ matrix).to(x.dtype)
        return dx, None, None, None, None, None


class _Embedding(torch.autograd.Function):
    """Looks rows up; hands out instead of the gradient of the table."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        table: Tensor,
        _anchor: Tensor,
        recorder: Recorder,
        padding_idx: int | None,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.recorder, ctx.number = recorder, recorder.number(table)
        ctx.padding_idx = padding_idx
        if padding_idx is not None and padding_idx < 0:
            ctx.padding_idx = padding_idx + table.shape[0]
        recorder.use(ctx.number)
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        dy = grads[0].reshape(ctx.recorder.size, -1, grads[0].shape[-1])
        if ctx.padding_idx is not None:
            dy = dy * (ids != ctx.padding_idx).view(*dy.shape[:2], 1)
        ctx.recorder.hand_out(ctx.number, ctx.recorder.rows(ids, dy))
        return None, None, None, None, None


class _LayerNorm(torch.autograd.Function):
    """Layer norm over the last dimension; hands out instead of dweight and dbias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        _anchor: Tensor,
        recorder: Recorder,
        eps: float,
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.recorder = recorder
        ctx.numbers = recorder.number(weight), recorder.number(bias)
        for number in ctx.numbers:
            recorder.use(number)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        x, weight, mean, rstd = ctx.saved_tensors
        recorder: Recorder = ctx.recorder
        number, bias_number = ctx.numbers
        if bias_number is not None:
            bias_grads = _sum_tokens(recorder.by_sample(dy))
            recorder.hand_out(bias_number, recorder.dense(bias_grads))
        if number is not None:
            normed = x.to(mean.dtype).sub(mean).mul_(rstd)
            weight_grads = recorder.by_sample(normed.mul_(dy)).sum(1)
            recorder.hand_out(number, recorder.dense(weight_grads))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.aten.native_layer_norm_backward(
                dy.contiguous(), x, x.shape[-1:], mean, rstd, weight, None,
                [True, False, False],
            )[0]  # fmt: skip
        return dx, None, None, None, None, None


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


def _sum_tokens(by_sample: Tensor) -> Tensor:
    """Sum over tokens in float32 or better. Shape ``[n, features]``."""
    dtype = torch.float64 if by_sample.dtype == torch.float64 else torch.float32
    return by_sample.sum(1, dtype=dtype)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)


def _linear(recorder: Recorder, _: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias = _three(args, kwargs, ("input", "weight", "bias"))
    if recorder.number(weight) is None and recorder.number(bias) is None:
        return NotImplemented
    if x.ndim < 2 or not recorder.splits(x) or weight.ndim != 2:
        return NotImplemented
    return _apply(_Linear, x, weight, bias, recorder.anchor, recorder, False)


def _addmm(recorder: Recorder, _: Any, args: Any, kwargs: Any) -> Any:
    bias, x, weight = _three(args, kwargs, ("input", "mat1", "mat2"))
    if recorder.number(weight) is None and recorder.number(bias) is None:
        return NotImplemented
    has_factors = {"alpha", "beta", "out"} & kwargs.keys()
    if has_factors or not recorder.splits(x) or bias.ndim != 1:
        return NotImplemented
    return _apply(_Linear, x, weight, bias, recorder.anchor, recorder, True)


def _three(args: Any, kwargs: Any, names: tuple[str, str, str]) -> list[Any]:
    """Return arguments given by position or name; what is missing is None."""
    return [*args, *(kwargs.get(name) for name in names[len(args) :])]


def _embedding(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    given = bind(func, args, kwargs)
    ids, table = given["input"], given["weight"]
    is_odd = given["max_norm"] is not None or given["scale_grad_by_freq"]
    if recorder.number(table) is None or is_odd:
        return NotImplemented
    if ids.ndim == 2 and ids.shape[0] == 1:  # positions, the same for all samples
        ids = ids.expand(recorder.rows_of_batch, -1)
    if not recorder.splits(ids):
        return NotImplemented
    padding = given["padding_idx"]
    return _apply(_Embedding, ids, table, recorder.anchor, recorder, padding)


def _layer_norm(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    given = bind(func, args, kwargs)
    x, weight, bias = (given[name] for name in ("input", "weight", "bias"))
    if recorder.number(weight) is None and recorder.number(bias) is None:
        return NotImplemented
    if len(given["normalized_shape"]) != 1 or x.ndim < 2 or not recorder.splits(x):
        return NotImplemented
    return _apply(_LayerNorm, x, weight, bias, recorder.anchor, recorder, given["eps"])


def _rms_norm(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    given = bind(func, args, kwargs)
    x, weight = given["input"], given["weight"]
    if recorder.number(weight) is None or not recorder.splits(x):
        return NotImplemented
    normed = F.rms_norm(x, given["normalized_shape"], None, given["eps"])
    return _broadcast(recorder, torch.mul, (normed, weight), {})


def _add(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Let a parameter plus a number, as in norms, stand for the parameter."""
    if len(args) == 2 and not kwargs:
        for one, other in (args, args[::-1]):
            if recorder.number(one) is not None and isinstance(other, int | float):
                return recorder.alias(one, func(*args))
    return _broadcast(recorder, func, args, kwargs)


def _converted(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Let a parameter in another type, or on another device, stand for itself."""
    if recorder.number(args[0]) is None:
        return NotImplemented
    result = func(*args, **kwargs)
    return recorder.alias(args[0], result) if result.is_floating_point() else result


def _broadcast(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
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
    if numbers[1 - position] is not None or not fits:
        return NotImplemented
    if torch.broadcast_shapes(shape, other.shape) != other.shape:
        return NotImplemented
    copies = _copies(recorder, parameter, other.shape, len(shape))
    pair = (copies, other) if position == 0 else (other, copies)
    return func(*pair).to(torch.result_type(parameter, other))


def _copies(
    recorder: Recorder, parameter: Tensor, shape: torch.Size, own: int
) -> Tensor:
    """Return a copy of a parameter per sample, which hands out its gradient."""
    copies: Tensor = _apply(_Copies, parameter, recorder.anchor, recorder)
    size = recorder.size
    rest = parameter.shape[parameter.ndim - own :]
    between = (1,) * (len(shape) - 1 - own)
    each = shape[0] // size
    spread = copies.reshape(size, 1, *between, *rest)
    return spread.expand(size, each, *between, *rest).flatten(0, 1)


SUBSTITUTES: dict[Any, Callable[[Recorder, Any, Any, Any], Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    **dict.fromkeys(
        [torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__], _broadcast
    ),
    **dict.fromkeys([torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__], _add),
    **dict.fromkeys([Tensor.to, Tensor.float], _converted),
}  # fmt: skip
