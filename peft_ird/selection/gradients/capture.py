r"""One backward pass over a batch that hands out the gradients of its single samples.

While a `Capture` is on, every use of a chosen parameter by a known function (linear
layers, embeddings, norms, products and sums with broadcasting) is replaced by one that
keeps what the gradient of each sample needs, and every mean over the batch that a loss
takes becomes the sum of the samples' own means. No module is changed, and no weight
gradient is formed. Uses by other functions give nothing; the caller finds these
parameters by comparison with one sample at a time.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peft_ird.selection.gradients.losses import LOSSES
from peft_ird.selection.gradients.recorder import Observer, Recorder
from peft_ird.selection.gradients.substitutes import SUBSTITUTES

__all__ = ["Capture"]

_HANDLERS = {**SUBSTITUTES, **LOSSES}


class Capture(TorchFunctionMode):
    """Hands out per-sample gradients of chosen parameters during one backward pass.

    Args:
        parameters: The parameters by number; none of them requires a gradient.
        size: Number of samples in the batch.
        widths: Rows that a sample may have where a batch is flattened.
        device: The model's device.
        observe: Called with a parameter's number and its gradients as soon as the
            backward pass is through with the parameter.
        scale: Factor on the loss that keeps low-precision gradients from underflow;
            what is handed out is free of it.
    """

    def __init__(
        self,
        parameters: Mapping[int, nn.Parameter],
        size: int,
        widths: Collection[int],
        device: torch.device,
        observe: Observer,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self._recorder = Recorder(parameters, size, widths, device, observe, scale)

    @property
    def losses(self) -> list[Tensor]:
        """The samples' losses, ``[n]``, one tensor for each mean that was replaced."""
        return self._recorder.losses

    @property
    def refused(self) -> set[int]:
        """Parameters that were used in a way that hands nothing out."""
        return self._recorder.refused

    @property
    def mixes_losses(self) -> bool:
        """Whether a mean over the batch was taken that has no rows of each sample."""
        return self._recorder.mixes_losses

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
        if isinstance(result, Tensor):
            self._recorder.refuse((*args, *kwargs.values()))
            if self._recorder.size > 1:
                self._recorder.picked.note(func, args, result)
        return result

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of the sum of the samples' losses.

        Args:
            loss: A scalar that the model gave while the capture was on.
        """
        recorder = self._recorder
        recorder.is_backward = True
        recorder.picked.clear()
        if recorder.scale != 1.0:
            loss = loss.float().mul(recorder.scale)
        torch.autograd.backward(loss)
        recorder.finish()
