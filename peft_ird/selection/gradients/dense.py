"""Gradients of single samples as they are, for small parameters."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peft_ird.selection.gradients.entrywise import Entrywise, Pick
from peft_ird.selection.gradients.where import Where

__all__ = ["Dense", "rows_of"]

_CHUNK = 1 << 17  # entries at a time: the largest gradient has no copy


class Dense(Entrywise):
    """Gradients of a small parameter as they are.

    Args:
        values: Shape ``[n, numel]``, float32 or float64.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def add_squares_(self, total: Tensor, kept: Sequence[int]) -> None:
        """See `SampleGradients`."""
        for some, part in self._portions(total, kept):
            some.add_(part.square().sum(0))

    def add_sum_(self, total: Tensor, kept: Sequence[int]) -> None:
        """See `SampleGradients`."""
        for some, part in self._portions(total, kept):
            some.add_(part.sum(0))

    def _portions(
        self, total: Tensor, kept: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield some entries of a total, and of the samples: no copy of them all."""
        width = max(1, _CHUNK // len(kept))
        portions = rows_of(self.values, kept).split(width, 1)
        yield from zip(total.split(width), portions, strict=True)

    def squared_norms(self, kept: Sequence[int]) -> Tensor:
        """See `SampleGradients`."""
        values = rows_of(self.values, kept)
        total = values.new_zeros(len(kept), dtype=torch.float64)
        width = max(1, _CHUNK // len(kept))
        size = min(width, values.shape[1])
        room = values.new_empty(len(kept), size, dtype=torch.float64)
        for part in values.split(width, 1):
            total += room[:, : part.shape[1]].copy_(part).square_().sum(1)
        return total

    def at(self, rows: Sequence[int], where: Where) -> Tensor:
        """See `SampleGradients`."""
        return rows_of(self.values, rows)[:, where.flat]

    def only(self, _: Sequence[int], pick: Pick) -> "Dense":
        """See `SampleGradients`."""
        return Dense(pick(self.values))

    def tensors(self) -> Iterator[Tensor]:
        """See `SampleGradients`."""
        yield self.values


def rows_of(values: Tensor, kept: Sequence[int]) -> Tensor:
    """Return some samples of a tensor, without a copy if they are all there are."""
    return values if len(kept) == len(values) else values[list(kept)]
