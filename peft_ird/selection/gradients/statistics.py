"""What is summed over samples: squares, gradients, scores. Accumulators of a stream.

Sums over the samples of a batch are in the type of the gradients, sums over batches in
float64, so that they do not depend on the order of the batches or on who adds them.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from peft_ird.selection.gradients.forms import SampleGradients
from peft_ird.selection.gradients.where import Where
from peft_ird.selection.pool import Pool

__all__ = [
    "ACCUMULATOR_BYTES",
    "GradientSum",
    "Scores",
    "SquareSum",
    "SquareSumAt",
    "Statistic",
]

_CHUNK = 1 << 17  # entries that change their type at a time
ACCUMULATOR_BYTES = torch.float64.itemsize


class Statistic(Protocol):
    """Something summed over samples, for each parameter or each sample."""

    def update(
        self,
        part: int,
        gradients: SampleGradients,
        rows: Sequence[int],
        positions: Sequence[int],
    ) -> None:
        """Add the gradients of some samples with respect to one parameter.

        Args:
            part: The parameter's number.
            gradients: Gradients of the samples of a batch.
            rows: Which samples of the batch to add.
            positions: Their positions in the calibration data.
        """

    def tensors(self) -> list[Tensor]:
        """Return the sums so far."""


class SquareSum:
    r""":math:`\sum_n g_n[j]^2` for every entry of some parameters.

    Args:
        pool: The candidate entries.
        parts: Numbers of the parameters.
    """

    def __init__(self, pool: Pool, parts: Sequence[int]) -> None:
        self.totals = {part: _zeros(pool, part, pool.sizes[part]) for part in parts}
        self.seen: set[int] = set()
        self._dtype = pool.dtype

    def update(
        self,
        part: int,
        gradients: SampleGradients,
        rows: Sequence[int],
        positions: Sequence[int],  # noqa: ARG002 (the interface)
    ) -> None:
        """See `Statistic`."""
        self.seen.add(part)
        self.add_(self.totals[part], gradients, rows)

    def add_(
        self, total: Tensor, gradients: SampleGradients, rows: Sequence[int]
    ) -> None:
        """Add what is summed, of some samples."""
        gradients.add_squares_(total, rows)

    def mean(self, part: int, count: int) -> Tensor:
        """Return a parameter's mean over samples, in the memory of its sum.

        Args:
            part: The parameter's number.
            count: How many samples there were.
        """
        # Rounding can take an entry in which two uses cancel below zero.
        return self._mean(part, count).clamp_min_(0)

    def _mean(self, part: int, count: int) -> Tensor:
        total = self.totals.pop(part).div_(count)
        if total.dtype == self._dtype:
            return total
        mean = total.view(self._dtype)[: len(total)]
        for some, of in zip(mean.split(_CHUNK), total.split(_CHUNK), strict=True):
            some.copy_(of.clone())  # what is written over has been read
        return mean

    def tensors(self) -> list[Tensor]:
        """See `Statistic`."""
        return list(self.totals.values())


class GradientSum(SquareSum):
    r""":math:`\sum_n g_n[j]` for every entry of some parameters; as `SquareSum`."""

    def add_(
        self, total: Tensor, gradients: SampleGradients, rows: Sequence[int]
    ) -> None:
        """Add what is summed, of some samples."""
        gradients.add_sum_(total, rows)

    def mean(self, part: int, count: int) -> Tensor:
        """See `SquareSum`."""
        return self._mean(part, count)


class SquareSumAt:
    r""":math:`\sum_n g_n[j]^2` for chosen entries only.

    Args:
        pool: The candidate entries.
        chosen: Where they are, by parameter; without those that have none.
    """

    def __init__(self, pool: Pool, chosen: Mapping[int, Where]) -> None:
        self.chosen = chosen
        self.totals = {part: _zeros(pool, part, len(w)) for part, w in chosen.items()}

    def update(
        self,
        part: int,
        gradients: SampleGradients,
        rows: Sequence[int],
        positions: Sequence[int],  # noqa: ARG002 (the interface)
    ) -> None:
        """See `Statistic`."""
        self.totals[part].add_(gradients.squares_at(rows, self.chosen[part]))

    def tensors(self) -> list[Tensor]:
        """See `Statistic`."""
        return list(self.totals.values())


class Scores:
    r""":math:`\sum_{j \in P} g_n[j]^2` for every sample.

    Args:
        samples: Positions of the samples.
        chosen: The entries P, by parameter; None for all candidates.
    """

    def __init__(
        self, samples: Sequence[int], chosen: Mapping[int, Where] | None
    ) -> None:
        self.chosen = chosen
        self.totals = torch.zeros(len(samples), dtype=torch.float64)
        self._places = {position: n for n, position in enumerate(samples)}

    def update(
        self,
        part: int,
        gradients: SampleGradients,
        rows: Sequence[int],
        positions: Sequence[int],
    ) -> None:
        """See `Statistic`."""
        if self.chosen is None:
            found = gradients.squared_norms(rows)
        else:
            found = gradients.squared_norms_at(rows, self.chosen[part])
        places = torch.tensor([self._places[position] for position in positions])
        self.totals[places] += found.cpu()

    def tensors(self) -> list[Tensor]:
        """See `Statistic`."""
        return [self.totals]


def _zeros(pool: Pool, part: int, size: int) -> Tensor:
    device = pool.parameters[part].device
    return torch.zeros(size, dtype=torch.float64, device=device)
