"""Iterative Range Decreasing: samples and entries shrink in turn (Algorithm 1)."""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_ird.selection.entries import Entries
from peft_ird.selection.fisher import FisherEstimator
from peft_ird.selection.lots import Lots
from peft_ird.selection.ranking import top_k
from peft_ird.selection.schedule import Cell
from peft_ird.selection.settings import Settings, rounded
from peft_ird.selection.shortlist import Shortlist

if sys.platform != "win32":
    import resource

__all__ = ["Decrease", "Step", "only_step"]


@dataclass(frozen=True)
class Step:
    """What is kept at one cell: samples and entries, and what it took."""

    cell: Cell
    samples: tuple[int, ...]
    entries: Entries
    sample_scores: Tensor
    seconds: float
    peak_bytes: int


class Decrease:
    """The range decreasing: what is kept now, and how it becomes less.

    Args:
        estimator: Fisher information and sample scores.
        settings: The options of the selection.
        samples: The samples to start from, at least those of the first cell.
    """

    def __init__(
        self,
        estimator: FisherEstimator,
        settings: Settings,
        samples: tuple[int, ...],
    ) -> None:
        self.estimator = estimator
        self.settings = settings
        self.is_reverse = settings.method == "reverse_ird"
        self.lots = Lots.wanted(estimator.pool.sizes, settings)
        self.samples = samples
        self.sample_scores = torch.empty(0, dtype=torch.float64)
        self.entries: Entries | None = None
        self.shortlist: Shortlist | None = None
        self._has_bounds = settings.scope != "balanced"

    def steps(self, cells: Sequence[Cell], count: int) -> Iterator[Step]:
        """Yield what is kept at each cell.

        Args:
            cells: The cells.
            count: The number of entries at the last one.
        """
        if self.settings.method == "gradient":
            yield self._by_gradient(cells[0], count)
            return
        candidates = len(self.estimator.pool)
        counts = [max(count, rounded(candidates, c.density)) for c in cells[:-1]]
        counts.append(count)
        for number, (cell, wanted) in enumerate(zip(cells, counts, strict=True)):
            start = time.perf_counter()
            has_fewer_samples = cell.num_samples < len(self.samples)
            if has_fewer_samples:
                self._drop_samples(cell.num_samples)
            if number == 0 and len(cells) > 1:
                self.estimator.remember(self.samples)
            self._rank_entries(wanted, has_fewer_samples)
            assert self.entries is not None
            seconds = time.perf_counter() - start
            yield Step(
                cell, self.samples, self.entries, self.sample_scores, seconds,
                _peak_bytes(self.entries.pool.device),
            )  # fmt: skip

    def _by_gradient(self, cell: Cell, count: int) -> Step:
        """Return the entries with the largest mean gradient."""
        start = time.perf_counter()
        if cell.num_samples < len(self.samples):
            self._drop_samples(cell.num_samples)
        gradients = self.estimator.mean_gradient(self.samples)
        stream = ((part, gradient.abs_()) for part, gradient in gradients)
        pool, scope = self.estimator.pool, self.settings.scope
        entries = Entries.best(pool, stream, count, scope, lots=self.lots)
        return only_step(cell, self.samples, entries, start)

    def _drop_samples(self, wanted: int) -> None:
        """Keep the samples with the larger scores; in reverse, the smaller ones."""
        chosen = None
        if self.entries is not None and self.settings.sample_score == "selected":
            chosen = self.entries.positions
        # 0.29 * 100 is a little below 29.
        outliers = int(self.settings.trim_samples * len(self.samples) + 1e-9)
        outliers = min(outliers, len(self.samples) - wanted)
        is_plain = self.settings.sample_scaling == "none" and not self.is_reverse
        count = wanted + outliers if is_plain else None
        scores = self.estimator.sample_scores(self.samples, chosen, count)
        scores = self._scaled(scores)
        if self.is_reverse:  # samples without labels would stay to the end
            unlabelled = self.estimator.unlabelled()
            rows = [i for i, s in enumerate(self.samples) if s in unlabelled]
            scores[rows] = math.inf
        inliers = top_k(scores, len(scores) - outliers, largest=self.is_reverse)
        kept = inliers[top_k(scores[inliers], wanted, largest=not self.is_reverse)]
        self.samples = tuple(self.samples[place] for place in kept.tolist())
        self.sample_scores = scores[kept]
        self.estimator.forget_all_but(self.samples)

    def _scaled(self, scores: Tensor) -> Tensor:
        """Divide scores by what the settings say: tokens, or the loss squared."""
        if self.settings.sample_scaling == "length":
            return scores / self.estimator.lengths(self.samples)
        if self.settings.sample_scaling == "loss":
            losses = self.estimator.losses(self.samples)
            return scores / losses.square().clamp_min(torch.finfo(torch.float32).tiny)
        return scores

    def _rank_entries(self, count: int, has_fewer_samples: bool) -> None:
        scope = self.settings.scope
        is_nested = self.settings.nested or self.is_reverse
        if self.entries is not None and is_nested:
            if count < len(self.entries):
                stream = self.estimator.fisher_at(self.samples, self.entries.positions)
                self.entries = self.entries.best_of(
                    stream, count, scope, not self.is_reverse, self.lots
                )
            return
        fewer = None
        if self.entries is not None and not has_fewer_samples:
            fewer = self.entries.fewer(count, scope)
        self.entries = fewer or self._best_listed(count) or self._best(count)

    def _best(self, count: int) -> Entries:
        """Return the best of all candidates."""
        scope = self.settings.scope
        stream = self.estimator.fisher(self.samples)
        found = Entries.best(self.estimator.pool, stream, count, scope, lots=self.lots)
        if self._has_bounds:
            self.shortlist = Shortlist(found, len(self.samples), scope, self.lots)
        return found

    def _best_listed(self, count: int) -> Entries | None:
        """Return them without a look at all candidates, where that is possible."""
        listed = self.shortlist
        if listed is None or count >= len(listed.entries):
            return None
        if not self.estimator.has_kept(self.samples):  # then each look takes a pass
            return None
        stream = self.estimator.fisher_at(self.samples, listed.entries.positions)
        found = listed.best(stream, len(self.samples), count)
        if found is None:  # with fewer samples it is hardly more likely
            self.shortlist, self._has_bounds = None, False
        return found


def only_step(
    cell: Cell, samples: tuple[int, ...], entries: Entries, start: float
) -> Step:
    """Return the step of a method that has only one.

    Args:
        cell: Its cell.
        samples: The samples that entries were ranked on.
        entries: What is kept.
        start: When it began, by `time.perf_counter`.
    """
    none = torch.empty(0, dtype=torch.float64)
    seconds = time.perf_counter() - start
    return Step(cell, samples, entries, none, seconds, _peak_bytes(entries.pool.device))


def _peak_bytes(device: torch.device) -> int:
    """Return the most memory that the device, or this process, has used so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
