"""Chosen entries of a pool: ranked among all, among those chosen before, compared."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_ird.selection.lots import Lots
from peft_ird.selection.pool import Pool
from peft_ird.selection.ranking import Ranking, shares
from peft_ird.selection.topk import TopK

__all__ = ["SCOPES", "Entries", "Stream"]

_CHUNK = 1 << 17  # scores in float64 at a time

SCOPES = ("global", "per_module", "balanced")

Stream = Iterable[tuple[int, Tensor]]


@dataclass(frozen=True)
class Entries:
    """Entries of a pool and what they were ranked by.

    Args:
        pool: The candidates.
        positions: Sorted positions in each parameter, int64.
        scores: Their scores.
    """

    pool: Pool
    positions: Sequence[Tensor]
    scores: Sequence[Tensor]

    @classmethod
    def best(
        cls,
        pool: Pool,
        stream: Stream,
        k: int,
        scope: str = "global",
        available: Sequence[int] | None = None,
        lots: Lots | None = None,
    ) -> "Entries":
        """Choose the k entries with the largest scores.

        Args:
            pool: The candidates.
            stream: Parameter numbers and scores of their entries, in order.
            k: How many.
            scope: ``"global"``, ``"per_module"`` or ``"balanced"`` (as "global", each
                module's scores divided by their mean).
            available: Scores that each parameter has; None for all its entries.
            lots: Chance that scores are mixed with; None for none.
        """
        if scope == "balanced":
            stream = _balanced(pool, stream)
        if lots is not None:
            stream = lots.keys(stream)
        sizes = pool.sizes if available is None else available
        ranking = Ranking(k, sizes, _groups(pool, scope))
        return cls._from(pool, ranking, stream)

    @classmethod
    def _from(cls, pool: Pool, ranking: Ranking, stream: Stream) -> "Entries":
        for part, scores in stream:
            ranking.update(part, scores)
            del scores  # before the next are made
        pairs = ranking.finish()
        home = pool.device
        return cls(
            pool,
            [positions.to(home) for positions, _ in pairs],
            [scores.to(home) for _, scores in pairs],
        )

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def counts(self) -> list[int]:
        """Number of entries in each parameter."""
        return [positions.numel() for positions in self.positions]

    def best_of(
        self,
        stream: Stream,
        k: int,
        scope: str,
        largest: bool = True,
        lots: Lots | None = None,
    ) -> "Entries":
        """Choose the k of these entries with the extreme scores.

        Args:
            stream: Parameter numbers and scores of these entries, in order; parameters
                without entries are left out.
            k: How many.
            scope: As for `best`; shares follow these entries.
            largest: Whether the largest or the smallest scores are wanted.
            lots: As for `best`.
        """
        if scope == "balanced":
            stream = _balanced(self.pool, stream)
        if lots is not None:
            stream = lots.keys(stream, self.positions, largest)
        groups = _groups(self.pool, scope)
        ranking = Ranking(k, self.counts, groups, largest=largest)
        picked = self._from(self.pool, ranking, stream)
        positions = [
            p[i] for p, i in zip(self.positions, picked.positions, strict=True)
        ]
        return Entries(self.pool, positions, picked.scores)

    def rescored(self, stream: Stream, lots: Lots | None = None) -> "Entries":
        """Return the same entries with other scores.

        Args:
            stream: Parameter numbers and scores of these entries; parameters without
                entries may be left out.
            lots: As for `best`.
        """
        if lots is not None:
            stream = lots.keys(stream, self.positions)
        scores = list(self.scores)
        for part, found in stream:
            scores[part] = found.to(self.pool.device)
        return Entries(self.pool, self.positions, scores)

    def least(self, scope: str) -> list[float]:
        """Return the least score in each group of a scope; infinite without entries."""
        groups = _groups(self.pool, scope)
        found = [math.inf] * (groups[-1] + 1)
        for group, scores in zip(groups, self.scores, strict=True):
            if scores.numel():
                found[group] = min(found[group], float(scores.min()))
        return found

    def fewer(self, k: int, scope: str) -> "Entries | None":
        """Return what `best` would choose by the same scores for a smaller k.

        Args:
            k: How many.
            scope: As for `best`.

        Returns:
            The entries; None where a module's share of the smaller budget is larger,
            as shares can be by one entry.
        """
        groups = _groups(self.pool, scope)
        sizes, held = ([0] * (groups[-1] + 1) for _ in range(2))
        for group, size, count in zip(
            groups, self.pool.sizes, self.counts, strict=True
        ):
            sizes[group] += size
            held[group] += count
        budgets = shares(sizes, k)
        if any(budget > count for budget, count in zip(budgets, held, strict=True)):
            return None
        ranked = [TopK(budget) for budget in budgets]
        for part, (group, scores) in enumerate(zip(groups, self.scores, strict=True)):
            ranked[group].update(part, scores)
        found = {part: pair for best in ranked for part, pair in best.finish().items()}
        none = torch.empty(0, dtype=torch.int64, device=self.pool.device)
        picked = [
            found[part][0] if part in found else none
            for part in range(len(self.positions))
        ]
        return Entries(
            self.pool,
            [p[i] for p, i in zip(self.positions, picked, strict=True)],
            [s[i] for s, i in zip(self.scores, picked, strict=True)],
        )

    def shared_with(self, other: "Entries") -> float:
        """Return the share of these entries that another choice has too."""
        common = sum(
            int(torch.isin(mine, theirs, assume_unique=True).sum())
            for mine, theirs in zip(self.positions, other.positions, strict=True)
        )
        return common / len(self)


def _groups(pool: Pool, scope: str) -> list[int]:
    return pool.modules() if scope == "per_module" else [0] * len(pool.sizes)


def _balanced(pool: Pool, stream: Stream) -> Iterator[tuple[int, Tensor]]:
    """Divide each module's scores by their mean over the module."""
    modules = pool.modules()
    pending: list[tuple[int, Tensor]] = []
    for part, scores in stream:
        if pending and modules[pending[0][0]] != modules[part]:
            yield from _by_their_mean(pending)
            pending = []
        pending.append((part, scores))
    yield from _by_their_mean(pending)


def _by_their_mean(parts: Sequence[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    some = (each for _, scores in parts for each in scores.split(_CHUNK))
    total = sum(float(each.double().sum()) for each in some)
    mean = total / max(1, sum(scores.numel() for _, scores in parts))
    for part, scores in parts:
        yield part, scores / mean if mean > 0 else scores
