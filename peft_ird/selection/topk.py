"""Exact top-k with deterministic ties, globally or with a budget per module."""

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["rank", "shares", "top_k"]


def top_k(scores: Tensor, k: int, *, largest: bool = True) -> Tensor:
    """Return the positions of the k extreme scores; ties go to the lower position.

    Args:
        scores: Finite scores. Shape ``[n]``.
        k: How many, from 0 to n.
        largest: Whether the largest or the smallest scores are wanted.

    Returns:
        Sorted positions. Shape ``[k]``, int64.
    """
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    threshold = torch.topk(scores, k, largest=largest, sorted=True).values[-1]
    better = scores > threshold if largest else scores < threshold
    tied = (scores == threshold).nonzero().flatten()
    chosen = better
    chosen[tied[: k - int(better.sum())]] = True
    return chosen.nonzero().flatten()


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


def rank(
    scores: Tensor,
    k: int,
    *,
    bounds: list[int],
    within: Tensor | None = None,
    largest: bool = True,
) -> Tensor:
    """Return the k extreme entries, with each group's share of the budget in it.

    Args:
        scores: Flat scores of all candidates. Shape ``[n]``.
        k: How many entries.
        bounds: Offsets of the groups, with both ends; ``[0, n]`` for one budget.
        within: Sorted positions to choose from; None for all.
        largest: Whether the largest or the smallest scores are wanted.

    Returns:
        Sorted flat positions. Shape ``[k]``, int64.
    """
    if within is None:
        ends = bounds
        chosen_from = scores
    else:
        cuts = torch.tensor(bounds, device=within.device)
        ends = torch.searchsorted(within, cuts).tolist()
        chosen_from = scores[within]
    sizes = [end - start for start, end in pairwise(ends)]
    picks = [
        start + top_k(chosen_from[start : start + size], part, largest=largest)
        for start, size, part in zip(ends, sizes, shares(sizes, k), strict=False)
    ]
    positions = torch.cat(picks)
    return positions if within is None else within[positions]
