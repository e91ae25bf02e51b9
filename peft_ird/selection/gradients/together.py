"""A batch of samples, taken through the model together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_ird.selection.gradients.batching import Sample, rows_of_batch, stack, widths
from peft_ird.selection.gradients.capture import Capture
from peft_ird.selection.gradients.recorder import Observer, Recorder
from peft_ird.selection.gradients.singles import Singles

__all__ = ["Passed", "Together", "size_of"]


@dataclass(frozen=True)
class Passed:
    """What a batch went through with.

    Args:
        loss: Sum of the samples' losses.
        losses: The loss of each sample, ``[n]``, where it seems to be known.
        misfits: Parameters for which this batch hands out nothing, or not all.
    """

    loss: Tensor
    losses: Tensor | None
    misfits: frozenset[int]


class Together:
    """Takes batches through the model and hands out what each sample gives alone.

    Args:
        singles: The samples, their model and their loss.
    """

    def __init__(self, singles: Singles) -> None:
        self.singles = singles

    def run(
        self, batch: Sequence[Sample], parts: Sequence[int], observe: Observer
    ) -> Passed:
        """Run forward and backward.

        Args:
            batch: Samples that may go together.
            parts: Numbers of the parameters whose gradients are wanted; for none, there
                is no backward pass.
            observe: Called with each one's number and gradients.

        Returns:
            The losses and what did not fit.

        Raises:
            FloatingPointError: If the loss is not finite; nothing was handed out.
        """
        pool = self.singles.pool
        parameters = {part: pool.parameters[part] for part in parts}
        model, size = self.singles.model, len(batch)
        config: Any = getattr(model, "config", None)
        pad_token = getattr(config, "pad_token_id", None) or 0
        inputs = stack(batch, pad_token, next(model.parameters()).device)
        own = (*model.parameters(), *model.buffers())
        dense = (tensor for tensor in own if tensor.layout == torch.strided)
        tables = {tensor.untyped_storage().data_ptr() for tensor in dense}
        recorder = Recorder(
            parameters, size, widths(inputs), pool.device, observe, self.singles.scale,
            tables, rows_of_batch(inputs),
        )  # fmt: skip
        with Capture(recorder) as capture:
            loss = torch.as_tensor(self.singles.calibration.batch_loss(model, inputs))
            is_by_sample = loss.numel() == size
            losses = loss.detach().flatten() if is_by_sample else None
            if recorder.losses and not is_by_sample:
                losses = torch.stack(recorder.losses).sum(0)
            loss = loss.sum()
            if not bool(loss.isfinite()):
                raise FloatingPointError("the loss is not finite")
            if parts and loss.requires_grad:
                capture.backward(loss)
        unlabelled = (batch[n].position for n in recorder.unlabelled)
        self.singles.unlabelled.update(unlabelled)
        misfits = set(parts) if recorder.mixes_losses else recorder.refused
        return Passed(loss, losses, frozenset(misfits))


def size_of(batch: Sequence[Sample]) -> int:
    """Return a batch's tokens with padding, or its samples if they have no length."""
    return len(batch) * max(sample.tokens or 1 for sample in batch)
