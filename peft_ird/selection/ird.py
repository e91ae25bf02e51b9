"""Iterative Range Decreasing: samples and entries shrink in turn (Algorithm 1)."""

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from peft_ird.selection.calibration import Calibration
from peft_ird.selection.criteria import NEEDS_DATA, data_free_scores
from peft_ird.selection.entries import Entries
from peft_ird.selection.fisher import FisherEstimator
from peft_ird.selection.gradients.lending import borrowed
from peft_ird.selection.gradients.ranks import Ranks
from peft_ird.selection.lots import Lots
from peft_ird.selection.pool import Pool
from peft_ird.selection.randomness import own_randomness
from peft_ird.selection.schedule import Cell
from peft_ird.selection.selection import Selection
from peft_ird.selection.settings import (
    Settings,
    drawn_samples,
    entry_count,
    planned_cells,
    rounded,
)
from peft_ird.selection.topk import top_k

if sys.platform != "win32":
    import resource

__all__ = ["Walk", "walk"]


@dataclass(frozen=True)
class Step:
    """What is kept at one cell: samples and entries, and what it took."""

    cell: Cell
    samples: tuple[int, ...]
    entries: Entries
    sample_scores: Tensor
    seconds: float
    peak_bytes: int


def walk(
    model: nn.Module,
    pool: Pool,
    calibration: Calibration | None,
    settings: Settings,
    head: Sequence[nn.Parameter] = (),
    memory_limit: int | None = None,
) -> "Walk":
    """Choose entries of the pool, cell by cell; the model comes back as it was.

    Args:
        model: The model.
        pool: The candidate entries.
        calibration: Data, for the methods that need it.
        settings: The options of the selection.
        head: Parameters that are trained whole beside the entries.
        memory_limit: Bytes beyond the model, as for `FisherEstimator`.

    Returns:
        What is kept at each cell; one cell for methods that do not shrink anything.

    Raises:
        ValueError: If there is no data or too little, or a budget or schedule that the
            pool cannot meet.
    """
    with own_randomness(settings.seed), ExitStack() as stack:
        if settings.method not in NEEDS_DATA:
            return Walk(pool, settings, [_choose_without_data(pool, settings)])
        k = entry_count(len(pool), len(pool), settings)
        if calibration is None:
            raise ValueError(
                f"method='{settings.method}' ranks entries on data and needs "
                "`calibration=Calibration(train_dataset, collate_fn)`. Or choose a "
                "method without data: 'magnitude', 'random' or 'bias'."
            )
        Ranks().agree(partial(_facts, pool, calibration, settings, memory_limit))
        cells = planned_cells(len(pool), len(calibration), k, settings)
        samples = drawn_samples(len(calibration), cells[0].num_samples, settings)
        stack.enter_context(borrowed(model))
        estimator = FisherEstimator(
            model, pool, calibration, settings.fisher, settings.seed, memory_limit
        )
        if steps := settings.head_warmup_steps:
            rate = settings.head_warmup_learning_rate
            stack.enter_context(estimator.head_warmed_up(head, samples, steps, rate))
        decrease = Decrease(estimator, settings, samples)
        return Walk(pool, settings, list(decrease.steps(cells, k)))


def _facts(
    pool: Pool,
    calibration: Calibration,
    settings: Settings,
    memory_limit: int | None,
) -> dict[str, Any]:
    """Return what all processes must have alike, by name."""
    parameters = [
        (pool.name(i), tuple(p.shape), p.dtype) for i, p in enumerate(pool.parameters)
    ]
    return {
        **{name: getattr(settings, name) for name in Settings.__annotations__},
        "memory_limit": memory_limit,
        "batch_size": calibration.batch_size,
        "number of samples": len(calibration),
        "samples in the same order": calibration.digest(),
        "number of candidates": len(pool),
        "candidate parameters": hashlib.sha256(repr(parameters).encode()).hexdigest(),
    }


@dataclass(frozen=True)
class Walk:
    """The cells of a range decreasing, and what is kept at each."""

    pool: Pool
    settings: Settings
    steps: Sequence[Step]

    def selection(self, cells: int | None = None) -> Selection:
        """Return what is kept at a cell, and how those up to it went.

        Args:
            cells: How many cells to go. Default: all of them.
        """
        pool, steps = self.pool, self.steps[:cells]
        last = steps[-1]
        indices = pool.indices(last.entries.positions)
        shapes: dict[str, dict[str, tuple[int, ...]]] = {m: {} for m in indices}
        for (module, name), parameter in zip(pool.names, pool.parameters, strict=True):
            if name in indices.get(module, ()):
                shapes[module][name] = tuple(parameter.shape)
        return Selection(
            indices=indices,
            shapes=shapes,
            scores=pool.tree(last.entries.scores),
            samples=last.samples,
            sample_scores=last.sample_scores,
            stages=tuple(step.cell for step in steps),
            seconds=tuple(step.seconds for step in steps),
            peak_bytes=tuple(step.peak_bytes for step in steps),
            overlaps=tuple(
                after.entries.shared_with(before.entries)
                for before, after in pairwise(steps)
            ),
            first_samples=steps[0].samples,
            method=self.settings.method,
            seed=self.settings.seed,
            num_candidates=len(pool),
        )


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
        self.lots = _lots(estimator.pool, settings)
        self.samples = samples
        self.sample_scores = torch.empty(0, dtype=torch.float64)
        self.entries: Entries | None = None

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
        counts = [*(rounded(candidates, cell.density) for cell in cells[:-1]), count]
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
        return _one_step(cell, self.samples, entries, start)

    def _drop_samples(self, wanted: int) -> None:
        """Keep the samples with the larger scores; in reverse, the smaller ones."""
        chosen = None
        if self.entries is not None and self.settings.sample_score == "selected":
            chosen = self.entries.positions
        outliers = int(self.settings.trim_samples * len(self.samples))
        outliers = min(outliers, len(self.samples) - wanted)
        is_plain = self.settings.sample_scaling == "none" and not self.is_reverse
        count = wanted + outliers if is_plain else None
        scores = self.estimator.sample_scores(self.samples, chosen, count)
        scores = self._scaled(scores)
        ranked = list(range(len(scores)))
        if outliers:
            inliers = top_k(scores, len(scores) - outliers, largest=self.is_reverse)
            ranked = inliers.tolist()
        kept = top_k(scores[ranked], wanted, largest=not self.is_reverse)
        places = [ranked[i] for i in kept.tolist()]
        self.samples = tuple(self.samples[place] for place in places)
        self.sample_scores = scores[places]
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
        pool, scope = self.estimator.pool, self.settings.scope
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
        if fewer is None:
            stream = self.estimator.fisher(self.samples)
            fewer = Entries.best(pool, stream, count, scope, lots=self.lots)
        self.entries = fewer


def _choose_without_data(pool: Pool, settings: Settings) -> Step:
    start = time.perf_counter()
    available = list(pool.sizes)
    if settings.method == "bias":
        available = [n * pool.is_bias(i) for i, n in enumerate(pool.sizes)]
    k = entry_count(len(pool), sum(available), settings)
    stream = data_free_scores(settings.method, pool, settings.seed)
    lots = _lots(pool, settings)
    entries = Entries.best(pool, stream, k, settings.scope, available, lots)
    return _one_step(Cell(0, k / len(pool)), (), entries, start)


def _lots(pool: Pool, settings: Settings) -> Lots | None:
    """Return the chance that rankings are mixed with, if any."""
    if settings.temperature == 0:
        return None
    return Lots(pool.sizes, settings.temperature, settings.seed)


def _one_step(
    cell: Cell, samples: tuple[int, ...], entries: Entries, start: float
) -> Step:
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
