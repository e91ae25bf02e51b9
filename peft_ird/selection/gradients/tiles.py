"""Products of factors in tiles that stay in a CPU's cache, one for each thread.

A thread that forms and squares the product of a sample by itself waits for no other, as
all would at each of several times as many smaller steps.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, isqrt, prod

import torch
from torch import Tensor

from peft_ird.selection.gradients.where import Where

__all__ = ["Factors", "Room", "Tile", "grid", "multiply", "portions", "tiles"]

# Left and right ones of a few samples, shapes ``[p, t, o]`` and ``[p, t, i]``.
Factors = tuple[Tensor, Tensor]

# What stays in the cache while it is squared and added: of a thread, and of all.
_TILE_BYTES = 4 << 20
_TILES_BYTES = 8 << 20
_LEAST_BYTES = 1 << 20  # of a thread; a product of less takes longer


class Room:
    """Memory for a tile, which the next one takes over.

    Args:
        like: A tensor of its dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        self._flat = like.new_empty(0)

    def of(self, samples: int, rows: slice, columns: slice) -> Tensor:
        """Return matrices of that size; what was there before is lost."""
        shape = samples, rows.stop - rows.start, columns.stop - columns.start
        size = prod(shape)
        if self._flat.numel() < size:
            self._flat = self._flat.new_empty(size)
        return self._flat[:size].view(shape)


@dataclass(frozen=True)
class Tile:
    """A part of the block of used rows and columns.

    Args:
        entries: Which of the entries lie in it. Shape ``[k]``, int64.
        places: Their flat positions in it. Shape ``[k]``, int64.
        factors: What it is the product of, a few samples at a time.
        buffer: Where products are formed. Shape ``[p, rows, columns]``.
    """

    entries: Tensor
    places: Tensor
    factors: Sequence[Factors]
    buffer: Tensor

    def products(self) -> Iterator[Tensor]:
        """Yield the products of a few samples each; the next ones overwrite them."""
        for each in self.factors:
            yield multiply(each, self.buffer)


def portions(samples: Sequence[int]) -> list[Sequence[int]]:
    """Divide samples into portions of one for each thread."""
    size = torch.get_num_threads()
    return [samples[first : first + size] for first in range(0, len(samples), size)]


def multiply(factors: Factors, buffer: Tensor) -> Tensor:
    r"""Form :math:`L_n^\top R_n` of a few samples at the beginning of a buffer."""
    left, right = factors
    return torch.bmm(left.transpose(1, 2), right, out=buffer[: len(left)])


def grid(rows: int, columns: int, like: Tensor) -> Iterator[tuple[slice, slice]]:
    """Divide a matrix into tiles of about the same size, as rows and columns of it.

    They are at most twice as wide as they are tall: with few tokens, the product of a
    wide tile takes up to four times as long.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        like: A tensor of its dtype.
    """
    share = max(_LEAST_BYTES, _TILES_BYTES // torch.get_num_threads())
    area = max(1, min(share, _TILE_BYTES) // like.element_size())
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


def tiles(factors: Iterable[Factors], where: Where) -> Iterator[Tile]:
    r"""Yield the block of used rows and columns of products, tile by tile.

    Args:
        factors: L and R of a few samples each, on the CPU; the products are
            :math:`L_n^\top R_n`.
        where: The entries.
    """
    used, columns, place = where.used
    chosen = [
        (left.index_select(2, used), right.index_select(2, columns))
        for left, right in factors
    ]
    row, column = place // len(columns), place % len(columns)
    room, most = Room(chosen[0][0]), len(chosen[0][0])
    for rows, chunk in grid(len(used), len(columns), chosen[0][0]):
        first, last = torch.searchsorted(
            row, torch.tensor([rows.start, rows.stop])
        ).tolist()
        here = column[first:last]
        entries = ((here >= chunk.start) & (here < chunk.stop)).nonzero().flatten()
        entries += first
        buffer = room.of(most, rows, chunk)
        below, right_of = row[entries] - rows.start, column[entries] - chunk.start
        yield Tile(
            entries,
            below * buffer.shape[2] + right_of,
            [(left[..., rows], right[..., chunk]) for left, right in chosen],
            buffer,
        )
