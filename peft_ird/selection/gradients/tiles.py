"""Products of factors in tiles that stay in a CPU's cache."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, isqrt

import torch
from torch import Tensor

from peft_ird.selection.gradients.where import Where

__all__ = ["Room", "Tile", "grid", "tiles"]

_TILE_BYTES = 4 << 20  # what stays in the cache while it is squared and added


class Room:
    """Memory for a tile, which the next one takes over.

    Args:
        like: A tensor of its dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        self._flat = like.new_empty(0)

    def of(self, rows: slice, columns: slice) -> Tensor:
        """Return a matrix of that size; what was there before is lost."""
        shape = rows.stop - rows.start, columns.stop - columns.start
        size = shape[0] * shape[1]
        if self._flat.numel() < size:
            self._flat = self._flat.new_empty(size)
        return self._flat[:size].view(shape)


@dataclass(frozen=True)
class Tile:
    """A part of the block of used rows and columns.

    Args:
        entries: Which of the entries lie in it. Shape ``[k]``, int64.
        places: Their flat positions in it. Shape ``[k]``, int64.
        pairs: The factors of each sample that it is the product of.
        buffer: Where products are formed. Shape ``[rows, columns]``.
    """

    entries: Tensor
    places: Tensor
    pairs: Sequence[tuple[Tensor, Tensor]]
    buffer: Tensor

    def products(self) -> Iterator[Tensor]:
        """Yield the product of each sample; the next one overwrites it."""
        for left, right in self.pairs:
            yield torch.mm(left.t(), right, out=self.buffer)


def grid(rows: int, columns: int, like: Tensor) -> Iterator[tuple[slice, slice]]:
    """Divide a matrix into tiles of about the same size, as rows and columns of it.

    They are at most twice as wide as they are tall: with few tokens, the product of a
    wide tile takes up to four times as long.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        like: A tensor of its dtype.
    """
    area = max(1, _TILE_BYTES // like.element_size())
    width = _evenly(columns, min(2 * rows, isqrt(area)))
    height = _evenly(rows, area // max(1, width))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield (
                slice(top, min(top + height, rows)),
                slice(left, min(left + width, columns)),
            )


def _evenly(size: int, most: int) -> int:
    """Return the size of the fewest parts that are about equal."""
    return max(1, ceil(size / max(1, ceil(size / max(1, most)))))


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
    row, column = place // len(columns), place % len(columns)
    room = Room(pairs[0][0])
    for rows, chunk in grid(len(used), len(columns), pairs[0][0]):
        first, last = torch.searchsorted(
            row, torch.tensor([rows.start, rows.stop])
        ).tolist()
        here = column[first:last]
        entries = ((here >= chunk.start) & (here < chunk.stop)).nonzero().flatten()
        entries += first
        buffer = room.of(rows, chunk)
        below, right_of = row[entries] - rows.start, column[entries] - chunk.start
        yield Tile(
            entries,
            below * buffer.shape[1] + right_of,
            [(left[:, rows], right[:, chunk]) for left, right in pairs],
            buffer,
        )
