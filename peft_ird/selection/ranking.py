"""A budget divided over groups of scores, and the best of each group."""

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_ird.selection.topk import TopK

__all__ = ["Ranking", "shares", "top_k"]


class Ranking:
    """Divide k over groups of parts and keep the extreme scores of each group.

    A group's share of k follows its available scores (`shares`); one group for all
    parts is a global budget. Within a group ties go as in `TopK`.

    Args:
        k: How many in all, from 0 to the sum of ``available``.
        available: How many scores each part will offer.
        groups: Number of each part's group, in the order of their first parts.
        largest: Whether the largest or the smallest scores are wanted.

    Raises:
        ValueError: If ``available`` and ``groups`` differ in length or ``k`` is out
            of range.
    """

    def __init__(
        self,
        k: int,
        available: Sequence[int],
        groups: Sequence[int],
        *,
        largest: bool = True,
    ) -> None:
        if len(available) != len(groups):
            raise ValueError(
                "`available` and `groups` must have one number per part, got "
                f"{len(available)} and {len(groups)}."
            )
        if not 0 <= k <= sum(available):
            raise ValueError(
                f"`k` must be from 0 to the {sum(available)} available, got {k}."
            )
        sizes = dict.fromkeys(groups, 0)
        for size, group in zip(available, groups, strict=True):
            sizes[group] += size
        budgets = shares(list(sizes.values()), k) if k else [0] * len(sizes)
        self._available = list(available)
        self._groups = list(groups)
        self._best = {
            group: TopK(budget, largest=largest)
            for group, budget in zip(sizes, budgets, strict=True)
        }
        self._empty: dict[int, Tensor] = {}  # of the parts offered so far

    def update(self, part: int, scores: Tensor) -> None:
        """Offer the scores of one part; a part with none available may be left out.

        Args:
            part: Number of the part; ascends within its group.
            scores: Finite scores. Shape ``[available[part]]``.

        Raises:
            ValueError: If ``scores`` has another shape, or ``part`` is out of order.
        """
        if tuple(scores.shape) != (self._available[part],):
            raise ValueError(
                f"`scores` of part {part} must have shape ({self._available[part]},) "
                f"as announced, got {tuple(scores.shape)}."
            )
        self._best[self._groups[part]].update(part, scores)
        self._empty[part] = scores.new_empty(0)

    def finish(self) -> list[tuple[Tensor, Tensor]]:
        """Return the winners of each part, k in all.

        Returns:
            For each part: the sorted positions of its winners, shape ``[w]``, int64,
            and their scores, shape ``[w]``, in the dtype that was offered (float32
            for a part left out); both on the device of the part. ``w`` may be 0.

        Raises:
            ValueError: If scores that were announced have not been offered.
        """
        winners: dict[int, tuple[Tensor, Tensor]] = {}
        for best in self._best.values():
            winners.update(best.finish())
        pairs = []
        for part, size in enumerate(self._available):
            if size and part not in self._empty:
                raise ValueError(f"Part {part} was not offered; call `update` with it.")
            empty = self._empty.get(part, torch.empty(0, dtype=torch.float32))
            pairs.append(winners.get(part, (empty.to(torch.int64), empty)))
        return pairs


def top_k(scores: Tensor, k: int, *, largest: bool = True) -> Tensor:
    """Return the positions of the k extreme scores; ties go to the lower position.

    Args:
        scores: Finite scores. Shape ``[n]``.
        k: How many, from 0 to n.
        largest: Whether the largest or the smallest scores are wanted.

    Returns:
        Sorted positions. Shape ``[k]``, int64.

    Raises:
        ValueError: If ``k`` is out of range or ``scores`` is not 1-D.
    """
    ranking = Ranking(k, [len(scores)], [0], largest=largest)
    ranking.update(0, scores)
    return ranking.finish()[0][0]


def shares(sizes: list[int], k: int) -> list[int]:
    """Divide a budget in proportion to sizes; the parts add up to it exactly.

    Args:
        sizes: Entries in each group.
        k: The budget, at most the sum of sizes.

    Returns:
        The budget of each group, at most its size (largest remainders, the earlier
        group first among equals).
    """
    total = sum(sizes)
    parts = [k * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(k * sizes[i] % total), i))
    for i in by_remainder[: k - sum(parts)]:
        parts[i] += 1
    return parts
