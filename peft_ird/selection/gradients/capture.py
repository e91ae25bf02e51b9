r"""One backward pass over a batch that hands out the gradients of its single samples.

While a `Capture` is on, every use of a chosen parameter by a known function (linear
layers, embeddings, norms, products and sums with broadcasting) is replaced by one that
keeps what the gradient of each sample needs, and every mean over the batch that a loss
takes becomes the sum of the samples' own means. No module is changed, and no weight
gradient is formed. Uses by other functions are left alone and hand nothing out; the
recorder notes these parameters as refused. They are taken one sample at a time from
then on, and a pass that meets them for the first time starts again (`Engine.run`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from peft_ird.selection.gradients.losses import LOSSES
from peft_ird.selection.gradients.picked import tensors
from peft_ird.selection.gradients.recorder import Recorder
from peft_ird.selection.gradients.substitutes import SUBSTITUTES

__all__ = ["Capture"]

_HANDLERS = {**SUBSTITUTES, **LOSSES}


class Capture(TorchFunctionMode):
    """Has chosen parameters leave per-sample gradients during one backward pass.

    Args:
        recorder: What gathers them; it also has the samples' losses, and notes what was
            used in a way that hands nothing out.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(self._recorder, func, args, kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if result is None or tensors((result,)):  # None of what is written to
            self._recorder.refuse(tensors((*args, *kwargs.values())))
            if self._recorder.size > 1:
                self._recorder.picked.note(func, args, kwargs, result)
        return result

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of the sum of the samples' losses.

        Args:
            loss: A scalar that the model gave while the capture was on.
        """
        recorder = self._recorder
        recorder.picked.clear()
        if recorder.scale != 1.0:
            loss = loss.float().mul(recorder.scale)
        # Parameters of the loss's own keep their gradients. The mode is off inside, as
        # this call goes through it: what checkpoints compute anew is left alone.
        torch.autograd.backward(loss, inputs=[recorder.anchor])
        recorder.finish()
