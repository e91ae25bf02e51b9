"""Gradients kept of samples, so that later passes need not call the model."""

from collections.abc import Collection, Iterator, Sequence, Set

from torch import Tensor

from peft_ird.selection.gradients.forms import SampleGradients
from peft_ird.selection.gradients.statistics import Receiver

__all__ = ["KeptGradients", "holds_more"]


class KeptGradients:
    """The gradients of some batches, in the forms that backward passes left them.

    Of several processes each has one batch, or none, of every round.
    """

    def __init__(self) -> None:
        self._rounds: list[tuple[frozenset[int], _Batch]] = []

    @property
    def everywhere(self) -> frozenset[int]:
        """Positions of the samples that some process has, the same on all."""
        return frozenset().union(*(positions for positions, _ in self._rounds))

    def add(self, everyones: Collection[int], positions: Sequence[int]) -> Receiver:
        """Return what keeps the gradients of a batch.

        Args:
            everyones: Positions of the samples of a round in the calibration data.
            positions: Those of this process's batch.
        """
        batch = _Batch(tuple(positions))
        self._rounds.append((frozenset(everyones), batch))
        return batch

    def forget_all_but(self, samples: Sequence[int]) -> None:
        """Drop what is kept of other samples.

        A batch of which more than half is wanted stays as it is.

        Args:
            samples: Positions in the calibration data.
        """
        wanted = frozenset(samples)
        rounds = ((everyones & wanted, batch) for everyones, batch in self._rounds)
        self._rounds = [(left, batch) for left, batch in rounds if left]
        for _, batch in self._rounds:
            rows = batch.rows(wanted)
            if 2 * len(rows) <= len(batch.positions):
                batch.shrink(rows)

    def parts(self) -> set[int]:
        """Return the parameters that gradients of this process are kept of."""
        return {part for _, batch in self._rounds for part in batch.gradients}

    def batches(self, samples: Set[int]) -> Iterator["_Batch"]:
        """Yield this process's batch of each round that has some of the samples.

        Args:
            samples: Positions in the calibration data.
        """
        for everyones, batch in self._rounds:
            if not everyones.isdisjoint(samples):
                yield batch


def holds_more(tensor: Tensor) -> bool:
    """Return whether a tensor keeps far more memory than its own alive."""
    return tensor.untyped_storage().nbytes() > 2 * tensor.nbytes


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone() if holds_more(tensor) else tensor


class _Batch:
    """A receiver that keeps the gradients themselves."""

    def __init__(self, positions: tuple[int, ...]) -> None:
        self.positions = positions
        self.gradients: dict[int, SampleGradients] = {}

    def rows(self, wanted: Set[int]) -> list[int]:
        """Return which of the batch's samples are at some positions."""
        return [n for n, p in enumerate(self.positions) if p in wanted]

    def shrink(self, rows: Sequence[int]) -> None:
        """Keep some of the samples only.

        Layers that share their input have one tensor of it, before and after.
        """
        if not rows:
            self.gradients = {}
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
        """See `Receiver`."""
        self.gradients[part] = gradients.only(rows, _own)

    def hand_out(
        self, samples: Set[int], parts: Sequence[int], receiver: Receiver
    ) -> None:
        """Hand out what is kept of some samples.

        Args:
            samples: Positions in the calibration data.
            parts: Numbers of the parameters.
            receiver: What the gradients are handed to.
        """
        rows = self.rows(samples)
        positions = [self.positions[n] for n in rows]
        for part in parts if rows else ():
            if part in self.gradients:
                receiver.update(part, self.gradients[part], rows, positions)
