"""From a configuration to chosen entries: the walk over the cells of a schedule."""

import hashlib
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import nn

from peft_ird.selection.calibration import Calibration
from peft_ird.selection.criteria import NEEDS_DATA, data_free_scores
from peft_ird.selection.decrease import Decrease, Step, only_step
from peft_ird.selection.defaults import on_device
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
)

__all__ = ["Walk", "walk"]


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
    with (
        on_device(torch.device("cpu")),
        own_randomness(settings.seed),
        ExitStack() as stack,
    ):
        if settings.method not in NEEDS_DATA:
            return Walk(pool, settings, [_choose_without_data(pool, settings)])
        ranks = Ranks()
        with ranks.raising_together():
            k = entry_count(len(pool), len(pool), settings)
            given = _needed(calibration, settings)
        ranks.agree(partial(_facts, pool, given, settings, memory_limit))
        cells = planned_cells(len(pool), len(given), k, settings)
        samples = drawn_samples(len(given), cells[0].num_samples, settings)
        stack.enter_context(borrowed(model))
        estimator = FisherEstimator(
            model, pool, given, settings.fisher, settings.seed, memory_limit
        )
        if steps := settings.head_warmup_steps:
            rate = settings.head_warmup_learning_rate
            stack.enter_context(estimator.head_warmed_up(head, samples, steps, rate))
        decrease = Decrease(estimator, settings, samples)
        found = Walk(pool, settings, list(decrease.steps(cells, k)))
        _warn_of_unlabelled(samples, estimator.unlabelled().intersection(samples))
        return found


def _needed(calibration: Calibration | None, settings: Settings) -> Calibration:
    if calibration is None:
        raise ValueError(
            f"method='{settings.method}' ranks entries on data and needs "
            "`calibration=Calibration(train_dataset, collate_fn)`. Or choose a "
            "method without data: 'magnitude', 'random' or 'bias'."
        )
    return calibration


def _warn_of_unlabelled(samples: Sequence[int], unlabelled: set[int]) -> None:
    if unlabelled and Ranks().rank == 0:
        warnings.warn(
            f"{len(unlabelled)} of {len(samples)} calibration samples have no label "
            f"that counts, as sample {min(unlabelled)}. They count as gradients of "
            "zero; in training they add nothing either.",
            stacklevel=5,
        )


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
        "candidates on each device": [
            (device.type, sum(p.numel() for p in alike))
            for device, alike in groupby(pool.parameters, lambda p: p.device)
        ],
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


def _choose_without_data(pool: Pool, settings: Settings) -> Step:
    start = time.perf_counter()
    available = list(pool.sizes)
    if settings.method == "bias":
        available = [n * pool.is_bias(i) for i, n in enumerate(pool.sizes)]
    k = entry_count(len(pool), sum(available), settings)
    stream = data_free_scores(settings.method, pool, settings.seed)
    lots = Lots.wanted(pool.sizes, settings)
    entries = Entries.best(pool, stream, k, settings.scope, available, lots)
    return only_step(Cell(0, k / len(pool)), (), entries, start)
