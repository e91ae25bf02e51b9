"""One calibration sample at a time: read, checked, and differentiated alone."""

import copy
import math
from collections import UserDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from peft_ird.selection.calibration import Calibration
from peft_ird.selection.gradients.batching import Sample, cut
from peft_ird.selection.gradients.capture import Capture
from peft_ird.selection.gradients.lending import requiring_grad
from peft_ird.selection.gradients.recorder import Recorder
from peft_ird.selection.pool import Pool
from peft_ird.selection.randomness import own_randomness
from peft_ird.selection.sampling import check_labels, with_sampled_labels

__all__ = ["Singles"]

_REMEMBERED = 8192


class Singles:
    """The samples of a calibration set, each alone; what is slow and surely right.

    Args:
        model: The model; use it inside `borrowed`.
        pool: The candidate entries.
        calibration: The samples.
        fisher_type: ``"empirical"`` or ``"sampled"`` labels.
        seed: Seed of the sampled labels; a sample's labels do not depend on the order.

    Attributes:
        unlabelled: Positions of samples found to have a loss over no label at all.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: Pool,
        calibration: Calibration,
        fisher_type: str,
        seed: int,
    ) -> None:
        self.model = model
        self.pool = pool
        self.calibration = calibration
        self.fisher_type = fisher_type
        self.seed = seed
        # Of the loss, so that low-precision gradients do not underflow.
        self.scale = 1.0
        self.unlabelled: set[int] = set()
        self._remembered: dict[tuple[int, str], object] = {}

    def sample(self, position: int, is_cut: bool) -> Sample:
        """Return a sample for a batch, its labels checked or drawn.

        Args:
            position: Position in the calibration data.
            is_cut: Whether padding that came with it is cut off.

        Raises:
            ValueError: If its labels are missing or out of range.
        """
        inputs = self._inputs(position)
        return Sample(position, cut(inputs) if is_cut else inputs)

    @contextmanager
    def labelled(self) -> Iterator[None]:
        """Take the labels of the data for a while, where others are drawn."""
        before, self.fisher_type = self.fisher_type, "empirical"
        try:
            yield
        finally:
            self.fisher_type = before

    def _inputs(self, position: int) -> object:
        """Return a sample; of the first of them the same, though a collator draws."""
        key = position, self.fisher_type
        if key in self._remembered:
            return self._remembered[key]
        is_drawn = self.fisher_type == "sampled"
        inputs = self._drawn(position) if is_drawn else self._collated(position)
        if len(self._remembered) < _REMEMBERED:
            self._remembered[key] = inputs
        return inputs

    def _drawn(self, position: int) -> object:
        with self.labelled():
            inputs = self._moved(self._inputs(position))
        generator = torch.Generator().manual_seed(self._seed_of(position))
        return with_sampled_labels(inputs, self.model, generator)

    def _collated(self, position: int) -> object:
        # A collator's masks do not depend on the order.
        seed = self._seed_of(position)
        with own_randomness(seed), _seeded(self.calibration.collate_fn, seed):
            inputs = self.calibration.batch(position, self.model)
        if self.calibration.loss is None:
            check_labels(inputs, self.model, position)
        return inputs

    def _seed_of(self, position: int) -> int:
        return hash((self.seed, position)) & (2**63 - 1)

    def _moved(self, inputs: Any) -> Any:
        if isinstance(inputs, UserDict):  # a tokenizer's, which torch does not open
            moved = copy.copy(inputs)
            moved.data = self._moved(inputs.data)
            return moved
        device = next(self.model.parameters()).device
        return tree_map_only(Tensor, lambda t: t.to(device), inputs)

    def gradients(
        self, position: int, parts: Sequence[int]
    ) -> tuple[float, dict[int, Tensor]]:
        """Return a sample's loss and gradients by the ordinary backward pass.

        Args:
            position: Position in the calibration data.
            parts: Numbers of the parameters in the pool.

        Returns:
            The loss, and by parameter its gradient, 1-D, float32 or float64;
            parameters that the loss does not depend on are left out.

        Raises:
            ValueError: If the loss or a gradient is not finite; the sample is named.
        """
        parameters = [self.pool.parameters[i] for i in parts]
        with requiring_grad(parameters):
            loss = self._loss(position)
            if not loss.requires_grad:
                return loss.item(), {}
            scaled = loss if self.scale == 1.0 else loss.float() * self.scale
            found = _differentiated(scaled, parameters)
        gradients = {}
        for i, gradient in zip(parts, found, strict=True):
            if gradient is None:
                continue
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            gradients[i] = dense.reshape(-1).to(self.pool.dtype)
            if self.scale != 1.0:
                gradients[i] = gradients[i] / self.scale
            if not _is_finite(gradients[i]):
                if self.lower_scale():
                    return self.gradients(position, parts)
                raise ValueError(
                    f"The gradient of '{self.pool.name(i)}' is not finite on "
                    f"calibration sample {position}. Remove that sample, or load "
                    "the model in float32."
                )
        return loss.item(), gradients

    def lower_scale(self) -> bool:
        """Lower the scale after an overflow; return whether it was above one."""
        was_above = self.scale > 1.0
        self.scale = max(1.0, self.scale / 32)
        return was_above

    def _loss(self, position: int) -> Tensor:
        inputs = self._moved(self._inputs(position))
        loss = torch.as_tensor(self.calibration.batch_loss(self.model, inputs))
        if bool(loss.isnan().any()):
            # It may be a mean over no label; a capture has that be zero.
            recorder = Recorder({}, 1, (), self.pool.device, lambda *_: None)
            with Capture(recorder):
                loss = torch.as_tensor(self.calibration.batch_loss(self.model, inputs))
            if recorder.unlabelled:
                self.unlabelled.add(position)
        if loss.numel() != 1 or not math.isfinite(loss.item()):
            raise ValueError(
                f"The loss of calibration sample {position} must be one finite number, "
                f"got {loss.tolist()}. Look at that sample and its labels."
            )
        return loss.reshape(())


@contextmanager
def _seeded(collate_fn: Any, seed: int) -> Iterator[None]:
    """Lend a collator that draws by a generator of its own, or is to, another one."""
    before = getattr(collate_fn, "generator", None)
    makes_one = getattr(collate_fn, "seed", None) is not None
    is_torch = getattr(collate_fn, "return_tensors", "pt") == "pt"
    if not isinstance(before, torch.Generator) and not (makes_one and is_torch):
        yield
        return
    collate_fn.generator = torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        collate_fn.generator = before


def _differentiated(
    loss: Tensor, parameters: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(loss, parameters, allow_unused=True)
    except (AssertionError, RuntimeError) as problem:
        if "training mode" not in str(problem):
            raise
        raise ValueError(
            f"{problem} Gradients are taken in eval mode, without dropout, and this "
            "model has no backward pass in it. Choose a method that needs none: "
            "'magnitude', 'random' or 'bias'."
        ) from problem


def _is_finite(tensor: Tensor) -> bool:
    # A sum is one pass without temporaries; only one that overflows needs a look.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
