"""Uses of a parameter, replaced by ones that leave the gradient of each sample.

Each substitute has the arguments of the function it stands for. It returns
``NotImplemented`` where that function is better left alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ird.selection.gradients.convolution import convolution
from peft_ird.selection.gradients.copies import add, broadcast, expand, repeat
from peft_ird.selection.gradients.recorder import Recorder, apply
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
            y = x @ weight if bias is None else F.linear(x, weight.t(), bias)
        else:
            y = F.linear(x, weight, bias)
        return y.data  # some models write to it, which autograd forbids with views

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        recorder: Recorder = ctx.recorder
        number, bias_number = ctx.numbers
        if bias_number is not None:
            recorder.hand_out(bias_number, recorder.token_sums(dy))
        if number is not None:
            pair = (recorder.by_sample(dy), recorder.by_sample(x))
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
            recorder.hand_out(bias_number, recorder.token_sums(dy))
        if number is not None:
            normed = x.to(mean.dtype).sub(mean).mul_(rstd)
            recorder.hand_out(number, recorder.token_sums(normed.mul_(dy)))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.aten.native_layer_norm_backward(
                dy.contiguous(), x, x.shape[-1:], mean, rstd, weight, None,
                [True, False, False],
            )[0]  # fmt: skip
        return dx, None, None, None, None, None


def _linear(recorder: Recorder, _: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias = _three(args, kwargs, ("input", "weight", "bias"))
    return _product(recorder, x, weight, bias, transposed=False)


def _product(
    recorder: Recorder, x: Tensor, matrix: Tensor, bias: Tensor | None, transposed: bool
) -> Any:
    """Replace a product of a batch with a parameter, or what is transposed of one."""
    weight = recorder.flipped(matrix)
    if weight is None:
        weight = matrix
    else:
        transposed = not transposed
    if recorder.number(weight) is None and recorder.number(bias) is None:
        return NotImplemented
    if x.ndim < 2 or weight.ndim != 2 or not recorder.splits(x):
        return NotImplemented
    if recorder.is_known(x) or (bias is not None and bias.ndim != 1):
        return NotImplemented
    return apply(_Linear, x, weight, bias, recorder.anchor, recorder, transposed)


def _addmm(recorder: Recorder, _: Any, args: Any, kwargs: Any) -> Any:
    bias, x, weight = _three(args, kwargs, ("input", "mat1", "mat2"))
    if {"alpha", "beta", "out"} & kwargs.keys():
        return NotImplemented
    return _product(recorder, x, weight, bias, transposed=True)


def _matmul(recorder: Recorder, _: Any, args: Any, kwargs: Any) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    x, matrix = args
    return _product(recorder, x, matrix, None, transposed=True)


def _transposed(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Let a transposed matrix stand for the matrix in products."""
    if not args or recorder.number(args[0]) is None or args[0].ndim != 2:
        return NotImplemented
    result: Tensor = func(*args, **kwargs)
    is_same = result.shape == args[0].shape and result.stride() == args[0].stride()
    return NotImplemented if is_same else recorder.flip(args[0], result)


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
    return apply(_Embedding, ids, table, recorder.anchor, recorder, padding)


def _layer_norm(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    given = bind(func, args, kwargs)
    x, weight, bias = (given[name] for name in ("input", "weight", "bias"))
    if recorder.number(weight) is None and recorder.number(bias) is None:
        return NotImplemented
    if len(given["normalized_shape"]) != 1 or x.ndim < 2 or not recorder.splits(x):
        return NotImplemented
    if recorder.is_known(x):
        return NotImplemented
    return apply(_LayerNorm, x, weight, bias, recorder.anchor, recorder, given["eps"])


def _rms_norm(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    given = bind(func, args, kwargs)
    x, weight = given["input"], given["weight"]
    if recorder.number(weight) is None or not recorder.splits(x):
        return NotImplemented
    if recorder.is_known(x):
        return NotImplemented
    normed = F.rms_norm(x, given["normalized_shape"], None, given["eps"])
    return broadcast(recorder, torch.mul, (normed, weight), {})


def _converted(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Let a parameter in another type, or on another device, stand for itself."""
    if not args or recorder.number(args[0]) is None:
        return NotImplemented
    result = func(*args, **kwargs)
    return recorder.alias(args[0], result) if result.is_floating_point() else result


_SIDES = [getattr(Tensor, name).__get__ for name in ("T", "mT")]

SUBSTITUTES: dict[Any, Callable[[Recorder, Any, Any, Any], Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys(
        [torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm], _matmul
    ),
    **dict.fromkeys(
        [torch.t, torch.transpose, Tensor.t, Tensor.transpose, *_SIDES], _transposed
    ),
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    **dict.fromkeys(
        [torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__], broadcast
    ),
    **dict.fromkeys([torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__], add),
    **dict.fromkeys([Tensor.to, Tensor.float], _converted),
    **dict.fromkeys([torch.conv1d, torch.conv2d, torch.conv3d], convolution),
    Tensor.expand: expand,
    Tensor.repeat: repeat,
}  # fmt: skip
