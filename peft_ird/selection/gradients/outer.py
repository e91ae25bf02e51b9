r"""Gradients of single samples as products of factors, :math:`g_n = L_n^\top R_n`.

The gradient of a linear layer's weight is that: L holds the gradient of the output at
each token and R the input. It is formed for one sample at a time, tile by tile, or for
chosen entries only, or not at all.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peft_ird.selection.gradients.dense import rows_of
from peft_ird.selection.gradients.where import Where
from peft_ird.sparse.products import by_block, by_sampling

__all__ = ["Outer", "join_outers"]

# A tile of g_n stays in the cache while it is squared and added.
_TILE_BYTES = 4 << 20
# Bytes of gradients that are formed at once: on a GPU, or where few are wanted.
_BLOCK_BYTES = 256 << 20
# A sampled product takes as long as a dense one of this share of the matrix, and as
# this many entries of a dense one for each entry.
_SAMPLED_SHARE = 0.2
_SAMPLED_COST = 4


class Outer:
    r"""Gradients of a matrix as sums of outer products, :math:`g_n = L_n^\top R_n`.

    Args:
        left: Shape ``[n, t, o]``.
        right: Shape ``[n, t, i]``.
        live: Tokens that contribute; the others have a zero row. Shape ``[n, t]``.
        unscale: Factor on the gradient.
    """

    def __init__(
        self, left: Tensor, right: Tensor, live: Tensor, unscale: float = 1.0
    ) -> None:
        self.left = left
        self.right = right
        self.unscale = unscale
        self.spans = _spans(live)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.left.shape[-1], self.right.shape[-1]

    def factors(self, n: int) -> tuple[Tensor, Tensor]:
        """Return sample n's factors, from its first live token to its last."""
        start, stop = self.spans[n]
        left = _computable(self.left[n, start:stop])
        if self.unscale != 1.0:
            left = left * self.unscale
        return left, _computable(self.right[n, start:stop])

    def add_squares_(self, total: Tensor, kept: Sequence[int]) -> None:
        """See `SampleGradients`."""
        kept = [n for n in kept if self.spans[n][0] < self.spans[n][1]]
        matrix = total.view(self.shape)
        if kept and _is_wide(self.left.device):
            self._add_blocks(matrix, kept)
        elif kept:
            self._add_tiles(matrix, kept)

    def _add_tiles(self, matrix: Tensor, kept: Sequence[int]) -> None:
        """Form one sample's gradient at a time, in tiles that stay in the cache."""
        pairs = [self.factors(n) for n in kept]
        several = [pair for pair in pairs if len(pair[0]) > 1]
        # With one token, the square of the product is the product of the squares.
        single = [pair for pair in pairs if len(pair[0]) == 1]
        squared = [torch.cat(side).square_() for side in zip(*single, strict=True)]
        rows, columns = self.shape
        step = max(1, _TILE_BYTES // (columns * pairs[0][0].element_size()))
        product = pairs[0][0].new_empty(min(step, rows), columns)
        squares = torch.empty_like(product)
        for tile, start in zip(matrix.split(step), range(0, rows, step), strict=True):
            g, sums = product[: len(tile)], squares[: len(tile)]
            chosen = slice(start, start + step)
            if squared:
                torch.mm(squared[0][:, chosen].t(), squared[1], out=sums)
            for number, (left, right) in enumerate(several):
                torch.mm(left[:, chosen].t(), right, out=g)
                if number == 0 and not squared:
                    torch.mul(g, g, out=sums)
                else:
                    sums.addcmul_(g, g)
            tile.add_(sums)

    def _add_blocks(self, matrix: Tensor, kept: Sequence[int]) -> None:
        """Form the gradients of many samples at once, for a device with many cores."""
        rows, columns = self.shape
        row_bytes = columns * torch.float32.itemsize
        step = min(rows, max(1, _BLOCK_BYTES // row_bytes))
        size = max(1, _BLOCK_BYTES // (step * row_bytes))
        for tile, start in zip(matrix.split(step), range(0, rows, step), strict=True):
            for first in range(0, len(kept), size):
                some = kept[first : first + size]
                left = rows_of(self.left, some)[..., start : start + step]
                g = _products(left, rows_of(self.right, some))
                tile.add_(g.square_().sum(0), alpha=self.unscale**2)

    def add_sum_(self, total: Tensor, kept: Sequence[int]) -> None:
        """See `SampleGradients`."""
        pairs = [self.factors(n) for n in kept]
        left, right = (torch.cat(side) for side in zip(*pairs, strict=True))
        total.view(self.shape).add_(left.t() @ right)

    def squared_norm(self, n: int) -> Tensor:
        """See `SampleGradients`."""
        left, right = self.factors(n)
        rows, columns = self.shape
        if len(left) * (rows + columns) <= rows * columns:  # less work than forming g_n
            gram = (left @ left.t()).mul_(right @ right.t())
            return gram.sum(dtype=torch.float64)
        # One float32 norm over a large g_n would be off by up to 1e-3.
        norms = torch.linalg.vector_norm(left.t() @ right, dim=1)
        norm: Tensor = norms.double().square().sum()
        return norm

    def at(self, rows: Sequence[int], where: Where) -> Tensor:
        """See `SampleGradients`."""
        used, columns, _ = where.used
        area, whole = len(used) * len(columns), self.shape[0] * self.shape[1]
        if not _is_wide(self.left.device):
            sampled = _SAMPLED_SHARE * whole + _SAMPLED_COST * len(where)
            return (self._sampled if area > sampled else self._compact)(rows, where)
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
        spans = [self.spans[n] for n in rows]
        tokens = slice(min(start for start, _ in spans), max(stop for _, stop in spans))
        left, right = (
            rows_of(side[:, tokens], rows)[..., wanted]
            for side, wanted in ((self.left, used), (self.right, columns))
        )
        return _products(left, right).flatten(1)[:, place].mul_(self.unscale)

    def _sampled(self, rows: Sequence[int], where: Where) -> Tensor:
        """Multiply what the entries need, one dot product each."""
        pairs = map(self.factors, rows)
        return torch.stack(
            [by_sampling(left, right, where.flat) for left, right in pairs]
        )

    def rows_at(self, n: int, rows: Tensor) -> Tensor:
        """Return whole rows of sample n's gradient. Shape ``[len(rows), i]``."""
        left, right = self.factors(n)
        return left[:, rows].t() @ right

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
    live = [left.new_zeros(use.left.shape[:2], dtype=torch.bool) for use in uses]
    for use, mask in zip(uses, live, strict=True):
        for n, (start, stop) in enumerate(use.spans):
            mask[n, start:stop] = True
    return Outer(left, right, torch.cat(live, 1), uses[0].unscale)


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
    return device.type == "cuda"


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Return L^T R of each sample in float32 or better. Shape ``[n, o, i]``."""
    if left.is_cuda and left.dtype in {torch.bfloat16, torch.float16}:
        return torch.bmm(left.transpose(1, 2), right, out_dtype=torch.float32)
    return torch.bmm(_computable(left).transpose(1, 2), _computable(right))


def _computable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
