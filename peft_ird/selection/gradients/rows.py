"""Gradients of single samples that are zero but for a few rows, as of an embedding."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peft_ird.selection.gradients.entrywise import Entrywise, Pick
from peft_ird.selection.gradients.where import Where

__all__ = ["Rows", "join_rows"]


class Rows(Entrywise):
    """Gradients of a matrix that are zero but for a few rows, as of an embedding.

    Args:
        sample: Sample of each row, ascending. Shape ``[m]``, int64.
        row: Its place in the matrix; distinct for a sample. Shape ``[m]``, int64.
        values: The rows. Shape ``[m, i]``, float32 or float64.
        size: Number of samples.
    """

    def __init__(self, sample: Tensor, row: Tensor, values: Tensor, size: int) -> None:
        self.sample = sample
        self.row = row
        self.values = values
        bounds = torch.arange(size + 1, device=sample.device)
        self.starts: list[int] = torch.searchsorted(sample, bounds).tolist()

    @classmethod
    def of_tokens(cls, ids: Tensor, grads: Tensor) -> "Rows":
        """Sum the gradients of equal tokens of a sample.

        Args:
            ids: Shape ``[n, t]``, int64.
            grads: Shape ``[n, t, i]``, float32 or float64.
        """
        size, length = ids.shape
        owner = torch.arange(size, device=ids.device).repeat_interleave(length)
        width = int(ids.max()) + 1 if ids.numel() else 1
        key, place = (owner * width + ids.reshape(-1)).unique(return_inverse=True)
        values = grads.new_zeros(len(key), grads.shape[-1])
        values.index_add_(0, place, grads.reshape(-1, grads.shape[-1]))
        return cls(key // width, key % width, values, size)

    def part(self, n: int) -> tuple[Tensor, Tensor]:
        """Return the rows of sample n, and where they belong."""
        chosen = slice(self.starts[n], self.starts[n + 1])
        return self.row[chosen], self.values[chosen]

    def _kept(self, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
        if len(kept) == len(self.starts) - 1:
            return self.row, self.values
        parts = [self.part(n) for n in kept]
        row, values = (torch.cat(side) for side in zip(*parts, strict=True))
        return row, values

    def add_squares_(self, total: Tensor, kept: Sequence[int]) -> None:
        """See `SampleGradients`."""
        row, values = self._kept(kept)
        _add_once_(total, row, values.square())

    def add_sum_(self, total: Tensor, kept: Sequence[int]) -> None:
        """See `SampleGradients`."""
        _add_once_(total, *self._kept(kept))

    def squared_norms(self, kept: Sequence[int]) -> Tensor:
        """See `SampleGradients`."""
        parts = (self.part(n)[1] for n in kept)
        return torch.stack([values.double().square().sum() for values in parts])

    def at(self, rows: Sequence[int], where: Where) -> Tensor:
        """See `SampleGradients`."""
        found = self.values.new_zeros(len(rows), len(where))
        row, values = self._kept(rows)
        device = row.device
        sample = self._samples(rows)
        first, count = where.starts[row], where.starts[row + 1] - where.starts[row]
        mine = torch.arange(len(row), device=device).repeat_interleave(count)
        before = count.cumsum(0) - count
        place = torch.arange(len(mine), device=device) + (first - before)[mine]
        found[sample[mine], place] = values[mine, where.column[place]]
        return found

    def only(self, rows: Sequence[int], _: Pick) -> "Rows":
        """See `SampleGradients`."""
        row, values = self._kept(rows)
        return Rows(self._samples(rows), row, values, len(rows))

    def _samples(self, rows: Sequence[int]) -> Tensor:
        """Return which of some samples each of their rows is of."""
        device = self.row.device
        counts = [self.starts[n + 1] - self.starts[n] for n in rows]
        numbers = torch.arange(len(rows), device=device)
        return numbers.repeat_interleave(torch.tensor(counts, device=device))

    def tensors(self) -> Iterator[Tensor]:
        """See `SampleGradients`."""
        yield from (self.sample, self.row, self.values)


def _add_once_(total: Tensor, row: Tensor, values: Tensor) -> None:
    """Add rows to a matrix, those of the same place in one addition."""
    distinct, place = row.unique(return_inverse=True)
    sums = values.new_zeros(len(distinct), values.shape[-1])
    sums.index_add_(0, place, values)
    total.view(-1, values.shape[-1]).index_add_(0, distinct, sums.to(total.dtype))


def join_rows(uses: Sequence[Rows]) -> Rows:
    """Sum the gradients from several uses."""
    if len(uses) == 1:
        return uses[0]
    size = len(uses[0].starts) - 1
    width = 1 + max(int(use.row.max()) for use in uses if len(use.row))
    keys = torch.cat([use.sample * width + use.row for use in uses])
    key, place = keys.unique(return_inverse=True)
    values = torch.cat([use.values for use in uses])
    total = values.new_zeros(len(key), values.shape[-1]).index_add_(0, place, values)
    return Rows(key // width, key % width, total, size)
