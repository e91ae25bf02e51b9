"""Sums over chosen entries, by reading them: a few samples at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from peft_ird.selection.gradients.where import Where

__all__ = ["Entrywise", "Pick"]

Pick = Callable[[Tensor], Tensor]  # some samples' rows of a tensor

_PORTION = 1 << 22  # entries of single samples that are looked at together


class Entrywise(ABC):
    """Gradients whose chosen entries are read first, then squared and summed."""

    @abstractmethod
    def at(self, rows: Sequence[int], where: Where) -> Tensor:
        """See `SampleGradients`."""

    def squared_norms_at(self, rows: Sequence[int], where: Where) -> Tensor:
        """See `SampleGradients`."""
        portions = _portions(rows, len(where))
        return torch.cat(
            [
                self.at(some, where).square_().sum(1, dtype=torch.float64)
                for some in portions
            ]
        )

    def squares_at(self, rows: Sequence[int], where: Where) -> Tensor:
        """See `SampleGradients`."""
        first, *others = _portions(rows, len(where))
        total = self.at(first, where).square_().sum(0)
        for some in others:
            total += self.at(some, where).square_().sum(0)
        return total


def _portions(rows: Sequence[int], entries: int) -> Iterator[Sequence[int]]:
    """Cut samples into portions whose entries fit into a small buffer."""
    size = max(1, _PORTION // max(1, entries))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
