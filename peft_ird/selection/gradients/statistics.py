"""What is summed over samples: squares, gradients, scores. Accumulators of a stream.

Sums over all entries are in float32 (float64 for a float64 model) and are added in the
order of the batches; those of few numbers are in float64, in any order.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from peft_ird.selection.gradients.forms import SampleGradients
from peft_ird.selection.gradients.ordered import OrderedSums
from peft_ird.selection.gradients.ranks import Ranks
from peft_ird.selection.gradients.where import Where
from peft_ird.selection.pool import Pool

__all__ = [
    "CHOSEN_BYTES",
    "GradientSum",
    "Receiver",
    "Scores",
    "SquareSum",
    "SquareSumAt",
    "Statistic",
]

# Of a chosen entry: its sum, and the place in the parameter that it is of.
CHOSEN_BYTES = torch.float64.itemsize + torch.int64.itemsize


class Receiver(Protocol):
    """Something that gradients are handed to."""

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


class Statistic(Receiver, Protocol):
    """Something summed over samples, for each parameter or each sample.

    Of several processes each hands its own samples to a statistic of its own.
    """

    def end_round(self, parts: Sequence[int]) -> None:
        """Go on to the next batches; all processes must call it alike.

        Args:
            parts: Numbers of the parameters that were asked for.
        """

    def end(self) -> list[Tensor]:
        """Return the sums over the samples of all processes."""


class SquareSum:
    r""":math:`\sum_n g_n[j]^2` for every entry of some parameters.

    Args:
        pool: The candidate entries.
        parts: Numbers of the parameters.
        ranks: The processes.
    """

    def __init__(self, pool: Pool, parts: Sequence[int], ranks: Ranks) -> None:
        self.totals = OrderedSums(pool, parts, ranks)
        self.seen: set[int] = set()

    def update(
        self,
        part: int,
        gradients: SampleGradients,
        rows: Sequence[int],
        positions: Sequence[int],  # noqa: ARG002 (the interface)
    ) -> None:
        """See `Statistic`."""
        self.seen.add(part)
        self.add_(self.totals.of(part), gradients, rows)

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
        return self.totals.pop(part).div_(count)

    def end_round(self, parts: Sequence[int]) -> None:
        """See `Statistic`."""
        self.totals.end_round(parts)

    def end(self) -> list[Tensor]:
        """See `Statistic`."""
        return self.totals.end()


class GradientSum(SquareSum):
    r""":math:`\sum_n g_n[j]` for every entry of some parameters; as `SquareSum`."""

    def add_(
        self, total: Tensor, gradients: SampleGradients, rows: Sequence[int]
    ) -> None:
        """Add what is summed, of some samples."""
        gradients.add_sum_(total, rows)


class SquareSumAt:
    r""":math:`\sum_n g_n[j]^2` for chosen entries only.

    Args:
        pool: The candidate entries.
        chosen: Where they are, by parameter; without those that have none.
        ranks: The processes.
    """

    def __init__(self, pool: Pool, chosen: Mapping[int, Where], ranks: Ranks) -> None:
        self.chosen = chosen
        self.totals = {
            part: torch.zeros(
                len(where), dtype=torch.float64, device=pool.parameters[part].device
            )
            for part, where in chosen.items()
        }
        self._ranks = ranks
        self._dtype = pool.dtype

    def update(
        self,
        part: int,
        gradients: SampleGradients,
        rows: Sequence[int],
        positions: Sequence[int],  # noqa: ARG002 (the interface)
    ) -> None:
        """See `Statistic`."""
        self.totals[part].add_(gradients.squares_at(rows, self.chosen[part]))

    def mean(self, part: int, count: int) -> Tensor:
        """Return a parameter's means over samples, and let go of its sums.

        Args:
            part: The parameter's number.
            count: How many samples there were.
        """
        return self.totals.pop(part).div_(count).to(self._dtype)

    def end_round(self, parts: Sequence[int]) -> None:
        """See `Statistic`."""

    def end(self) -> list[Tensor]:
        """See `Statistic`."""
        return self._ranks.sums(self.totals.values())


class Scores:
    r""":math:`\sum_{j \in P} g_n[j]^2` for every sample.

    Args:
        samples: Positions of the samples.
        chosen: The entries P, by parameter; None for all candidates.
        ranks: The processes.
    """

    def __init__(
        self, samples: Sequence[int], chosen: Mapping[int, Where] | None, ranks: Ranks
    ) -> None:
        self.chosen = chosen
        self._ranks = ranks
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

    def end_round(self, parts: Sequence[int]) -> None:
        """See `Statistic`."""

    def end(self) -> list[Tensor]:
        """See `Statistic`."""
        return self._ranks.sums([self.totals])
