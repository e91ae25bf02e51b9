"""Products of factors in tiles that stay in a CPU's cache."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_ird.selection.gradients.where import Where

__all__ = ["Tile", "rows_of_a_tile", "tiles"]

_TILE_BYTES = 4 << 20  # what stays in the cache while it is squared and added


@dataclass(frozen=True)
class Tile:
    """A part of the block of used rows and columns.

    Args:
        places: Flat positions of its entries. Shape ``[k]``, int64.
        rows: Which of the used rows these are.
        pairs: The used rows and columns of each sample's factors.
        buffer: Where products are formed. Shape ``[rows, columns]``.
    """

    places: Tensor
    rows: slice
    pairs: Sequence[tuple[Tensor, Tensor]]
    buffer: Tensor

    def products(self) -> Iterator[Tensor]:
        """Yield the product of each sample; the next one overwrites it."""
        for left, right in self.pairs:
            yield torch.mm(left[:, self.rows].t(), right, out=self.buffer)


def rows_of_a_tile(columns: int, like: Tensor) -> int:
    """Return how many rows fit.

    Args:
        columns: Length of a row.
        like: A tensor of its dtype.
    """
    return max(1, _TILE_BYTES // max(1, columns * like.element_size()))


def tiles(factors: Iterable[tuple[Tensor, Tensor]], where: Where) -> Iterator[Tile]:
    r"""Yield the block of used rows and columns of products, tile by tile.

    Args:
        factors: L and R of each sample, shapes ``[t, o]`` and ``[t, i]``, on the CPU;
            its product is :math:`L^\top R`.
        where: The entries.
    """
    used, columns, place = where.used
    pairs = [
        (left.index_select(1, used), right.index_select(1, columns))
        for left, right in factors
    ]
    width = len(columns)
    step = rows_of_a_tile(width, pairs[0][0])
    buffer = pairs[0][0].new_empty(min(step, len(used)), width)
    for start in range(0, len(used), step):
        rows = slice(start, min(start + step, len(used)))
        bounds = torch.tensor([rows.start, rows.stop]) * width
        first, last = torch.searchsorted(place, bounds).tolist()
        places = place[first:last] - start * width
        yield Tile(places, rows, pairs, buffer[: rows.stop - start])
