"""A batch of samples, taken through the model together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_ird.selection.gradients.batching import Sample, stack
from peft_ird.selection.gradients.capture import Capture
from peft_ird.selection.gradients.recorder import Observer
from peft_ird.selection.gradients.singles import Singles

__all__ = ["Together", "size_of"]


class Together:
    """Takes batches through the model and hands out what each sample gives alone.

    Args:
        singles: The samples, their model and their loss.
    """

    def __init__(self, singles: Singles) -> None:
        self.singles = singles
        self.is_mean = False  # whether a loss that was left alone is a mean

    def run(
        self, batch: Sequence[Sample], parts: Sequence[int], observe: Observer
    ) -> Tensor | None:
        """Run forward and backward.

        Args:
            batch: Samples that may go together.
            parts: Numbers of the parameters whose gradients are wanted.
            observe: Called with each one's number and gradients.

        Returns:
            The loss of each sample, ``[n]``, where it is known.

        Raises:
            FloatingPointError: If the loss is not finite; nothing was handed out.
        """
        pool = self.singles.pool
        parameters = {part: pool.parameters[part] for part in parts}
        with Capture(
            parameters, len(batch), pool.device, observe, self.singles.scale
        ) as capture:
            loss, losses = self._summed(batch, capture)
            if not bool(loss.isfinite()):
                raise FloatingPointError("the loss is not finite")
            if loss.requires_grad:
                capture.backward(loss)
        return losses

    def loss(self, batch: Sequence[Sample]) -> Tensor:
        """Return the sum of the losses that the samples of a batch have alone.

        Args:
            batch: Samples that may go together.
        """

        def nothing(*_: Any) -> None:
            """Hand nothing out."""

        with Capture({}, len(batch), self.singles.pool.device, nothing) as capture:
            return self._summed(batch, capture)[0]

    def _summed(
        self, batch: Sequence[Sample], capture: Capture
    ) -> tuple[Tensor, Tensor | None]:
        """Return the sum of the samples' losses, and each of them if they are known."""
        model, size = self.singles.model, len(batch)
        config: Any = getattr(model, "config", None)
        pad_token = getattr(config, "pad_token_id", None) or 0
        inputs = stack(batch, pad_token, next(model.parameters()).device)
        loss = torch.as_tensor(self.singles.calibration.batch_loss(model, inputs))
        if loss.numel() == size:
            return loss.sum(), loss.detach().flatten()
        if self.is_mean:
            return loss * size, None
        if not capture.losses:
            return loss, None
        losses = torch.stack(capture.losses).sum(0)
        total = losses.sum()
        if total != 0:  # the loss may be the mean of two heads'
            losses = losses * (loss.detach() / total)
        return loss, losses


def size_of(batch: Sequence[Sample]) -> int:
    """Return a batch's tokens with padding, or its samples if they have no length."""
    return len(batch) * max(sample.length or 1 for sample in batch)
