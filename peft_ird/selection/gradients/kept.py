"""Gradients kept of samples, so that later passes need not call the model."""

from collections.abc import Collection, Sequence

from torch import Tensor

from peft_ird.selection.gradients.forms import SampleGradients
from peft_ird.selection.gradients.statistics import Statistic

__all__ = ["KeptGradients", "holds_more"]


class KeptGradients:
    """The gradients of some batches, in the forms that backward passes left them.

    Attributes:
        everywhere: Positions of the samples that some process has, the same on all.
    """

    def __init__(self) -> None:
        self.everywhere: frozenset[int] = frozenset()
        self._batches: list[_Batch] = []

    def add(self, positions: Sequence[int]) -> Statistic:
        """Return a statistic that keeps the gradients of a batch.

        Args:
            positions: Its samples' positions in the calibration data.
        """
        batch = _Batch(tuple(positions))
        self._batches.append(batch)
        return batch

    def forget_all_but(self, samples: Sequence[int]) -> None:
        """Drop what is kept of other samples.

        A batch of which more than half is wanted stays as it is.

        Args:
            samples: Positions in the calibration data.
        """
        wanted = set(samples)
        self._batches = [b for b in self._batches if not wanted.isdisjoint(b.positions)]
        for batch in self._batches:
            rows = batch.rows(wanted)
            if 2 * len(rows) <= len(batch.positions):
                batch.shrink(rows)
        self.everywhere &= wanted

    def parts(self) -> set[int]:
        """Return the parameters that gradients of this process are kept of."""
        return {part for batch in self._batches for part in batch.gradients}

    def replay(
        self, samples: Sequence[int], parts: Sequence[int], statistic: Statistic
    ) -> None:
        """Hand what is kept to a statistic.

        Args:
            samples: Positions in the calibration data.
            parts: Numbers of the parameters.
            statistic: What the gradients are handed to.
        """
        wanted = set(samples)
        for batch in self._batches:
            rows = batch.rows(wanted)
            positions = [batch.positions[n] for n in rows]
            for part in parts if rows else ():
                if part in batch.gradients:
                    statistic.update(part, batch.gradients[part], rows, positions)


def holds_more(tensor: Tensor) -> bool:
    """Return whether a tensor keeps far more memory than its own alive."""
    return tensor.untyped_storage().nbytes() > 2 * tensor.nbytes


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone() if holds_more(tensor) else tensor


class _Batch:
    """A statistic that keeps the gradients themselves."""

    def __init__(self, positions: tuple[int, ...]) -> None:
        self.positions = positions
        self.gradients: dict[int, SampleGradients] = {}

    def rows(self, wanted: Collection[int]) -> list[int]:
        """Return which of the batch's samples are at some positions."""
        return [n for n, p in enumerate(self.positions) if p in wanted]

    def shrink(self, rows: Sequence[int]) -> None:
        """Keep some of the samples only.

        Layers that share their input have one tensor of it, before and after.
        """
        picked: dict[tuple[object, ...], Tensor] = {}

        def pick(tensor: Tensor) -> Tensor:
            key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
            if key not in picked:
                picked[key] = tensor[list(rows)]
            return picked[key]

        for part, gradients in self.gradients.items():
            self.gradients[part] = gradients.only(rows, pick)
        self.positions = tuple(self.positions[n] for n in rows)

    def update(
        self, part: int, gradients: SampleGradients, rows: Sequence[int], *_: object
    ) -> None:
        """See `Statistic`."""
        self.gradients[part] = gradients.only(rows, _own)

    def tensors(self) -> list[Tensor]:
        """See `Statistic`."""
        return []
