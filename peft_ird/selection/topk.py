"""Exact top-k over a stream of scores, with deterministic ties and no concatenation."""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["TopK"]

_CHUNK = 1 << 19  # entries scanned at a time: bounds the temporaries
_ROW = 256  # entries that are passed over together if none of them may win
_SAMPLE = 1 << 14  # survivors sorted to bracket an order statistic


class TopK:
    """Keep the k extreme scores of a stream of parts.

    Ties go to the earlier part, then to the lower position. Holds at most 2k
    candidates and a chunk of one part; what was offered may be overwritten or freed.

    Args:
        k: How many, 0 or more.
        largest: Whether the largest or the smallest scores are wanted.

    Raises:
        ValueError: If ``k`` is negative.
    """

    def __init__(self, k: int, *, largest: bool = True) -> None:
        if k < 0:
            raise ValueError(f"`k` must be 0 or more, got {k}.")
        self._k = k
        self._largest = largest
        self._beats = torch.gt if largest else torch.lt
        # columns of candidates in the order of the stream, `count` of them in use
        self._positions = torch.empty(0, dtype=torch.int32)
        self._values = torch.empty(0)
        self._count = 0
        # part -> its candidates, and where and in which dtype it was offered
        self._held: dict[int, int] = {}
        self._offered: dict[int, tuple[torch.device, torch.dtype]] = {}
        # k scores offered beat it, or reach it before what comes next
        self._bound: Tensor | None = None

    def update(self, part: int, scores: Tensor) -> None:
        """Offer the scores of one part.

        Parts may differ in device and floating dtype; they compare exactly.

        Args:
            part: Number of the part, above those offered before.
            scores: Finite scores. Shape ``[n]``.

        Raises:
            ValueError: If ``part`` comes out of order or ``scores`` is not 1-D.
        """
        last = next(reversed(self._offered), None)
        if last is not None and part <= last:
            raise ValueError(
                f"`part` must ascend, got {part} after {last}. Offer each part once."
            )
        if scores.ndim != 1:
            raise ValueError(
                f"`scores` must be 1-D, got shape {tuple(scores.shape)}. Flatten it."
            )
        self._offered[part] = scores.device, scores.dtype
        self._held[part] = 0
        if self._k == 0:
            return
        scores = scores.detach()
        if self._bound is None and len(scores) > 2 * self._k:
            self._bound = self._guess_bound(scores, len(scores))
        for start in range(0, len(scores), _CHUNK):
            chosen = self._filter(scores[start : start + _CHUNK])
            self._hold(part, chosen + start, scores)
            if self._count > 2 * self._k:
                held = self._values[: self._count]
                self._prune(self._guess_bound(held, self._k + self._k // 2))

    def finish(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the winners, ``min(k, offered)`` in all.

        Returns:
            For each part that has winners: their sorted positions in it, shape
            ``[w]``, int64, and their scores in this order, shape ``[w]``, in the dtype
            that was offered; both on the device of the part.
        """
        if self._count > self._k:
            self._prune(None)
        winners = {part: held for part, held in self._held.items() if held}
        if not winners:
            return {}
        counts = list(winners.values())
        positions = torch.split(self._positions[: self._count], counts)
        values = torch.split(self._values[: self._count], counts)
        return {
            part: (
                where.to(device, torch.int64, copy=True),
                what.to(device, dtype, copy=True),
            )
            for part, where, what in zip(winners, positions, values, strict=True)
            for device, dtype in [self._offered[part]]
        }

    def _filter(self, chunk: Tensor) -> Tensor:
        """Return where the chunk may still win."""
        if self._bound is None:
            return torch.arange(len(chunk), device=chunk.device)
        dtype = torch.promote_types(chunk.dtype, self._bound.dtype)
        chunk, bound = chunk.to(dtype), self._bound.to(chunk.device, dtype)
        whole = len(chunk) // _ROW * _ROW
        rows = chunk[:whole].view(-1, _ROW)
        best = rows.amax(1) if self._largest else rows.amin(1)
        alive = self._beats(best, bound).nonzero().flatten()
        if 4 * len(alive) > len(rows):
            return self._beats(chunk, bound).nonzero().flatten()
        found = self._beats(rows.index_select(0, alive).flatten(), bound)
        where = found.nonzero().flatten()
        moved = alive - torch.arange(len(alive), device=alive.device)  # rows left out
        where += moved.mul_(_ROW).index_select(0, where // _ROW)
        rest = self._beats(chunk[whole:], bound).nonzero().flatten()
        return torch.cat([where, rest + whole])

    def _hold(self, part: int, positions: Tensor, scores: Tensor) -> None:
        """Append candidates, in columns that grow and widen as needed."""
        end = self._count + len(positions)
        device = self._values.device if self._count else scores.device
        dtype = torch.int32 if len(scores) < 1 << 31 else torch.int64
        self._positions = self._with_room(self._positions, end, device, dtype)
        self._values = self._with_room(self._values, end, device, scores.dtype)
        self._positions[self._count : end] = positions
        self._values[self._count : end] = scores.index_select(0, positions)
        self._held[part] += len(positions)
        self._count = end

    def _with_room(
        self, column: Tensor, end: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Return the column, or a copy that is longer or of a wider dtype."""
        if self._count:
            dtype = torch.promote_types(column.dtype, dtype)
        if end <= len(column) and (column.device, column.dtype) == (device, dtype):
            return column
        length = max(end, min(2 * self._count, 2 * self._k + _CHUNK))
        roomy = torch.empty(length, dtype=dtype, device=device)
        roomy[: self._count] = column[: self._count]
        return roomy

    def _guess_bound(self, scores: Tensor, most: int) -> Tensor | None:
        """Return a bound that k to ``most`` of the scores beat, None if unlucky."""
        sample = _sample(scores)
        rank = self._k * len(sample) // len(scores)
        rank += 4 * math.isqrt(rank) + 4  # standard deviations
        if rank >= len(sample):
            return None
        bound = sample[-1 - rank if self._largest else rank]
        count = 0
        for chunk in torch.split(scores, _CHUNK):
            count += int(self._beats(chunk, bound).count_nonzero())
        return bound if self._k <= count <= most else None

    def _prune(self, bound: Tensor | None) -> None:
        """Keep the candidates that beat the bound, or the best k; in place."""
        ends = torch.tensor([0, *self._held.values()], device=self._values.device)
        ends = ends.cumsum(0)
        cuts = torch.zeros_like(ends)
        count = 0
        for start, kept in self._choose(bound):
            for column in (self._positions, self._values):
                kept_here = column[start:].index_select(0, kept)
                column[count : count + len(kept)] = kept_here
            cuts += torch.searchsorted(kept, ends - start)
            count += len(kept)
        self._count = count
        kept_of = (end - start for start, end in pairwise(cuts.tolist()))
        self._held = dict(zip(self._held, kept_of, strict=True))

    def _choose(self, bound: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """Yield where the candidates to keep are, by chunk."""
        values = self._values[: self._count]
        missing = 0  # how many of those that equal the bound are kept
        if bound is None:
            rank = len(values) - self._k + 1 if self._largest else self._k
            bound = _order_statistic(values, rank)
            missing = self._k - int(self._beats(values, bound).count_nonzero())
        self._bound = bound
        for start in range(0, len(values), _CHUNK):
            chunk = values[start : start + _CHUNK]
            kept = self._beats(chunk, bound)
            if missing:
                tied = (chunk == bound).nonzero().flatten()[:missing]
                kept[tied] = True
                missing -= len(tied)
            yield start, kept.nonzero().flatten()


def _sample(scores: Tensor) -> Tensor:
    """Return some of the scores, sorted."""
    return scores[:: -(-len(scores) // _SAMPLE)].sort().values


def _order_statistic(values: Tensor, rank: int) -> Tensor:
    """Return the value of that rank, 1 for the smallest.

    Only what lies between two bounds from a sorted sample is selected from; counting
    proves the bounds, and where they fail everything is selected from.
    """
    sample = _sample(values)
    middle = rank * len(sample) // len(values)
    slack = 2 * math.isqrt(len(sample)) + 1  # 4 standard deviations at the median
    low = sample[middle - slack] if middle >= slack else values.min()
    high = sample[middle + slack] if middle + slack < len(sample) else values.max()
    below = int((values < low).count_nonzero())
    between = values[(values >= low) & (values <= high)]
    if below < rank <= below + len(between):
        if low == high:
            return low
        values = between
        rank -= below
    return values.kthvalue(rank).values
