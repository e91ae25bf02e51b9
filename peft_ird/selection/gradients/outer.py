r"""Gradients of single samples as products of factors, :math:`g_n = L_n^\top R_n`.

The gradient of a linear layer's weight is that: L holds the gradient of the output at
each token and R the input. It is formed for one sample at a time, tile by tile, or for
chosen entries only, or not at all.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from peft_ird.selection.gradients.dense import rows_of
from peft_ird.selection.gradients.entrywise import Entrywise, Pick
from peft_ird.selection.gradients.tiles import Room, grid, tiles
from peft_ird.selection.gradients.where import Where
from peft_ird.sparse.products import HALVES, by_block, computable

__all__ = ["Outer", "join_outers"]

# Bytes of gradients that are formed at once: on a GPU, or where few are wanted.
_BLOCK_BYTES = 256 << 20
# A sampled product takes as long as a dense one of so many entries, of this share of
# the matrix, and of this many entries for each of its own, together.
_SAMPLED_LEAST = 50_000
_SAMPLED_SHARE = 0.3
_SAMPLED_COST = 2


class Outer(Entrywise):
    r"""Gradients of a matrix as sums of outer products, :math:`g_n = L_n^\top R_n`.

    Args:
        left: Shape ``[n, t, o]``.
        right: Shape ``[n, t, i]``.
        unscale: Factor on the gradient.
    """

    def __init__(self, left: Tensor, right: Tensor, unscale: float = 1.0) -> None:
        self.left = left
        self.right = right
        self.unscale = unscale

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Where the tokens that contribute begin and end in each sample.

        On a GPU it takes as long to look as to multiply what is padding.
        """
        return _spans(_has_nonzero(self.left) & _has_nonzero(self.right))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.left.shape[-1], self.right.shape[-1]

    def factors(self, n: int) -> tuple[Tensor, Tensor]:
        """Return sample n's factors, from its first live token to its last."""
        start, stop = self.spans[n]
        left = computable(self.left[n, start:stop])
        if self.unscale != 1.0:
            left = left * self.unscale
        return left, computable(self.right[n, start:stop])

    def add_squares_(self, total: Tensor, kept: Sequence[int]) -> None:
        """See `SampleGradients`."""
        matrix = total.view(self.shape)
        if _is_wide(self.left.device):
            self._add_blocks(matrix, kept)
        elif live := [n for n in kept if self.spans[n][0] < self.spans[n][1]]:
            self._add_tiles(matrix, live)

    def _add_tiles(self, matrix: Tensor, kept: Sequence[int]) -> None:
        """Form one sample's gradient at a time, in tiles that stay in the cache."""
        pairs = [self.factors(n) for n in kept]
        several = [pair for pair in pairs if len(pair[0]) > 1]
        # With one token, the square of the product is the product of the squares.
        single = [pair for pair in pairs if len(pair[0]) == 1]
        squared = [torch.cat(side).square_() for side in zip(*single, strict=True)]
        product, squares = Room(pairs[0][0]), Room(pairs[0][0])
        for rows, columns in grid(*self.shape, pairs[0][0]):
            g, sums = product.of(rows, columns), squares.of(rows, columns)
            if squared:
                torch.mm(squared[0][:, rows].t(), squared[1][:, columns], out=sums)
            for number, (left, right) in enumerate(several):
                torch.mm(left[:, rows].t(), right[:, columns], out=g)
                if number == 0 and not squared:
                    torch.mul(g, g, out=sums)
                else:
                    sums.addcmul_(g, g)
            matrix[rows, columns].add_(sums)

    def _add_blocks(self, matrix: Tensor, kept: Sequence[int]) -> None:
        """Form the gradients of many samples at once, for a device with many cores."""
        rows, columns = self.shape
        row_bytes = columns * torch.float32.itemsize
        step = min(rows, max(1, _BLOCK_BYTES // row_bytes))
        size = max(1, _BLOCK_BYTES // (step * row_bytes))
        for tile, start in zip(matrix.split(step), range(0, rows, step), strict=True):
            sums = None
            for first in range(0, len(kept), size):
                some = kept[first : first + size]
                left = rows_of(self.left, some)[..., start : start + step]
                g = _products(left, rows_of(self.right, some))
                # One reading of what is formed, where squares and their sum take three.
                squares = torch.linalg.vector_norm(g, dim=0).square_()
                sums = squares if sums is None else sums.add_(squares)
            if sums is not None:
                tile.add_(sums, alpha=self.unscale**2)

    def add_sum_(self, total: Tensor, kept: Sequence[int]) -> None:
        """See `SampleGradients`."""
        pairs = [self.factors(n) for n in kept]
        left, right = (torch.cat(side) for side in zip(*pairs, strict=True))
        total.view(self.shape).add_(left.t() @ right)

    def squared_norms(self, kept: Sequence[int]) -> Tensor:
        """See `SampleGradients`."""
        rows, columns = self.shape
        tokens = max(self.spans[n][1] - self.spans[n][0] for n in kept)
        if tokens * (rows + columns) > rows * columns:  # more work than forming g_n
            formed = (left.t() @ right for left, right in map(self.factors, kept))
            return torch.stack([_squared_norm(gradient) for gradient in formed])
        left, right = (
            torch.bmm(side, side.transpose(1, 2)) for side in self._factors(kept)
        )
        return left.mul_(right).sum((1, 2), dtype=torch.float64)

    def at(self, rows: Sequence[int], where: Where) -> Tensor:
        """See `SampleGradients`."""
        if not _is_wide(self.left.device):
            is_sampled = self._is_sampled(where)
            return (self._sampled if is_sampled else self._compact)(rows, where)
        area = len(where.used[0]) * len(where.used[1])
        size = max(1, _BLOCK_BYTES // max(1, area * torch.float32.itemsize))
        return torch.cat(
            [
                self._block(rows[first : first + size], where)
                for first in range(0, len(rows), size)
            ]
        )

    def _compact(self, rows: Sequence[int], where: Where) -> Tensor:
        """Multiply one sample's used rows and columns at a time, in the cache."""
        used, columns, place = where.used
        pairs = map(self.factors, rows)
        return torch.stack(
            [by_block(left[:, used], right[:, columns], place) for left, right in pairs]
        )

    def _block(self, rows: Sequence[int], where: Where) -> Tensor:
        """As `_compact`, for many samples at once."""
        used, columns, place = where.used
        tokens = self._tokens(rows)
        left, right = (
            rows_of(side[:, tokens], rows)[..., wanted]
            for side, wanted in ((self.left, used), (self.right, columns))
        )
        return _products(left, right).flatten(1)[:, place].mul_(self.unscale)

    def squared_norms_at(self, rows: Sequence[int], where: Where) -> Tensor:
        """See `SampleGradients`."""
        if not self._is_tiled(where):
            return super().squared_norms_at(rows, where)
        norms = torch.zeros(len(rows), dtype=torch.float64)
        for tile in tiles(map(self.factors, rows), where):
            mask = torch.zeros_like(tile.buffer)
            mask.view(-1)[tile.places] = 1
            for n, product in enumerate(tile.products()):
                norms[n] += _squared_norm(product.mul_(mask))
        return norms

    def squares_at(self, rows: Sequence[int], where: Where) -> Tensor:
        """See `SampleGradients`."""
        if not self._is_tiled(where):
            return super().squares_at(rows, where)
        found = computable(self.left[:0]).new_empty(len(where))
        for tile in tiles(map(self.factors, rows), where):
            sums = torch.zeros_like(tile.buffer)
            for product in tile.products():
                sums.addcmul_(product, product)
            found[tile.entries] = sums.view(-1)[tile.places]
        return found

    def _is_tiled(self, where: Where) -> bool:
        """Return whether entries are squared before they are read."""
        return not (_is_wide(self.left.device) or self._is_sampled(where))

    def _is_sampled(self, where: Where) -> bool:
        """Return whether single dot products are cheaper than the block in use."""
        area = len(where.used[0]) * len(where.used[1])
        whole = self.shape[0] * self.shape[1]
        dense = _SAMPLED_LEAST + _SAMPLED_SHARE * whole + _SAMPLED_COST * len(where)
        return area > dense

    def _tokens(self, kept: Sequence[int]) -> slice:
        """Return from where to where any of some samples has live tokens."""
        spans = [self.spans[n] for n in kept]
        return slice(min(start for start, _ in spans), max(stop for _, stop in spans))

    def _factors(self, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the factors of some samples, all of the same length."""
        tokens = self._tokens(kept)
        left, right = (
            computable(rows_of(side[:, tokens], kept))
            for side in (self.left, self.right)
        )
        return left if self.unscale == 1.0 else left * self.unscale, right

    def _sampled(self, rows: Sequence[int], where: Where) -> Tensor:
        """Multiply what the entries need, one dot product each."""
        return torch.stack([where.sampling(*self.factors(n)) for n in rows])

    def rows_at(self, n: int, rows: Tensor) -> Tensor:
        """Return whole rows of sample n's gradient. Shape ``[len(rows), i]``."""
        left, right = self.factors(n)
        return left[:, rows].t() @ right

    def only(self, _: Sequence[int], pick: Pick) -> "Outer":
        """See `SampleGradients`."""
        return Outer(pick(self.left), pick(self.right), self.unscale)

    def tensors(self) -> Iterator[Tensor]:
        """See `SampleGradients`."""
        yield from (self.left, self.right)


def join_outers(uses: Sequence[Outer]) -> Outer:
    """Sum the gradients from several uses: their tokens stand side by side."""
    if len(uses) == 1:
        return uses[0]
    left, right = (
        torch.cat([getattr(use, side) for use in uses], 1) for side in ("left", "right")
    )
    return Outer(left, right, uses[0].unscale)


def _has_nonzero(side: Tensor) -> Tensor:
    """Return which tokens are not all zero; one look at most of them is enough."""
    live = side[..., :8].ne(0).any(-1)
    if not bool(live.all()):
        live[~live] = side[~live].ne(0).any(-1)
    return live


def _spans(live: Tensor) -> list[tuple[int, int]]:
    """Return where the live tokens of each sample begin and end."""
    length = live.shape[1]
    if not length:
        return [(0, 0)] * len(live)
    flags = live.to(torch.uint8)
    first = flags.argmax(1)
    stop = length - flags.flip(1).argmax(1)
    stop = torch.where(live.any(1), stop, first)
    return list(zip(first.tolist(), stop.tolist(), strict=True))


def _is_wide(device: torch.device) -> bool:
    return device.type != "cpu"


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Return L^T R of each sample in float32 or better. Shape ``[n, o, i]``."""
    # Under autocast the two may differ: outputs are low, inputs may be float32.
    if left.is_cuda and left.dtype == right.dtype and left.dtype in HALVES:
        return torch.bmm(left.transpose(1, 2), right, out_dtype=torch.float32)
    return torch.bmm(computable(left).transpose(1, 2), computable(right))


def _squared_norm(matrix: Tensor) -> Tensor:
    """Return the sum of squares in float64; one float32 sum can be off by 1e-3."""
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=1)
    return norms.double().square().sum()
