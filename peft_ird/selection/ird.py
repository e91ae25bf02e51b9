"""Iterative Range Decreasing: samples and entries shrink in turn (Algorithm 1)."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from peft_ird.selection.calibration import Calibration
from peft_ird.selection.criteria import NEEDS_DATA, data_free_scores
from peft_ird.selection.fisher import FisherEstimator, borrowed
from peft_ird.selection.pool import Pool
from peft_ird.selection.randomness import own_randomness
from peft_ird.selection.schedule import Cell, plan_cells
from peft_ird.selection.selection import Selection
from peft_ird.selection.topk import rank, top_k

__all__ = ["Settings", "Step", "select", "walk"]

DEFAULT_NUM_SAMPLES = 128


class Settings(Protocol):
    """What the selection reads of a configuration."""

    density: float | None
    budget: int | None
    method: str
    num_samples: int | None
    initial_density: float | None
    schedule: str | list[tuple[int, float]]
    nested: bool
    sample_score: str
    fisher: str
    scope: str
    seed: int


@dataclass(frozen=True)
class Step:
    """What is kept at one cell: samples, entries (flat, sorted) and their scores."""

    cell: Cell
    samples: tuple[int, ...]
    entries: Tensor
    scores: Tensor
    sample_scores: Tensor
    seconds: float


def select(
    model: nn.Module, pool: Pool, calibration: Calibration | None, settings: Settings
) -> Selection:
    """Choose entries of the pool; the model comes back as it was.

    Args:
        model: The model.
        pool: The candidate entries.
        calibration: Data, for the methods that need it.
        settings: The options of the selection.

    Returns:
        The entries at the last cell.

    Raises:
        ValueError: If there is no data or too little, or a budget or schedule that the
            pool cannot meet.
    """
    with own_randomness(settings.seed):
        steps = list(walk(model, pool, calibration, settings))
    last = steps[-1]
    indices = pool.split(last.entries)
    shapes = {
        (module, name): tuple(parameter.shape)
        for (module, name), parameter in zip(pool.names, pool.parameters, strict=True)
    }
    return Selection(
        indices=indices,
        shapes={m: {n: shapes[m, n] for n in names} for m, names in indices.items()},
        scores=pool.arrange(last.entries, last.scores),
        samples=last.samples,
        sample_scores=last.sample_scores,
        stages=tuple(step.cell for step in steps),
        seconds=tuple(step.seconds for step in steps),
        method=settings.method,
        seed=settings.seed,
        num_candidates=len(pool),
    )


def walk(
    model: nn.Module, pool: Pool, calibration: Calibration | None, settings: Settings
) -> Iterator[Step]:
    """Yield what is kept at each cell, from the first to the one asked for.

    Takes the arguments of `select` and raises what it raises.
    """
    if settings.method not in NEEDS_DATA:
        yield _choose_without_data(pool, settings)
        return
    k = _target(len(pool), len(pool), settings)
    if calibration is None:
        raise ValueError(
            f"method='{settings.method}' ranks entries on data and needs "
            "`calibration=Calibration(train_dataset, collate_fn)`. Or choose a method "
            "without data: 'magnitude', 'random' or 'bias'."
        )
    cells = _cells(pool, calibration, k, settings)
    samples = _draw(len(calibration), cells[0].num_samples, settings.seed)
    with borrowed(model, pool.parameters):
        estimator = FisherEstimator(
            model, pool, calibration, settings.fisher, settings.seed
        )
        counts = [*(_count(len(pool), cell.density) for cell in cells[:-1]), k]
        if settings.method == "gradient":
            yield _choose_by_gradient(estimator, samples, cells[0], k, settings)
        else:
            yield from _decrease(estimator, samples, cells, counts, settings)


def _decrease(
    estimator: FisherEstimator,
    samples: tuple[int, ...],
    cells: tuple[Cell, ...],
    counts: list[int],
    settings: Settings,
) -> Iterator[Step]:
    reverse = settings.method == "reverse_ird"
    nested = settings.nested or reverse
    bounds = _bounds(estimator.pool, settings)
    sample_scores = torch.empty(0, dtype=torch.float64)
    entries: Tensor | None = None
    for cell, count in zip(cells, counts, strict=True):
        start = time.perf_counter()
        if entries is not None and cell.num_samples < len(samples):
            over = entries if settings.sample_score == "selected" else None
            scores = estimator.sample_scores(samples, over)
            kept = top_k(scores, cell.num_samples, largest=not reverse)
            samples = tuple(samples[i] for i in kept.tolist())
            sample_scores = scores[kept]
        if entries is None or not nested:
            fisher = estimator.fisher(samples)
            entries = rank(fisher, count, bounds=bounds)
        elif count < len(entries):
            fisher = estimator.fisher(samples)
            entries = rank(
                fisher, count, bounds=bounds, within=entries, largest=not reverse
            )
        seconds = time.perf_counter() - start
        yield Step(cell, samples, entries, fisher[entries], sample_scores, seconds)


def _choose_by_gradient(
    estimator: FisherEstimator,
    samples: tuple[int, ...],
    cell: Cell,
    k: int,
    settings: Settings,
) -> Step:
    start = time.perf_counter()
    scores = estimator.mean_gradient(samples).abs_()
    entries = rank(scores, k, bounds=_bounds(estimator.pool, settings))
    return _one_step(cell, samples, entries, scores, start)


def _choose_without_data(pool: Pool, settings: Settings) -> Step:
    start = time.perf_counter()
    within = pool.bias_positions() if settings.method == "bias" else None
    available = len(pool) if within is None else len(within)
    k = _target(len(pool), available, settings)
    scores = data_free_scores(settings.method, pool, settings.seed)
    entries = rank(scores, k, bounds=_bounds(pool, settings), within=within)
    return _one_step(Cell(0, k / len(pool)), (), entries, scores, start)


def _one_step(
    cell: Cell, samples: tuple[int, ...], entries: Tensor, scores: Tensor, start: float
) -> Step:
    none = torch.empty(0, dtype=torch.float64)
    seconds = time.perf_counter() - start
    return Step(cell, samples, entries, scores[entries], none, seconds)


def _target(candidates: int, available: int, settings: Settings) -> int:
    """Return the number of entries asked for; all that are available by default."""
    if settings.density is not None:
        k = _count(candidates, settings.density)
    elif settings.budget is not None:
        k = settings.budget
    elif settings.method == "bias":
        k = available
    else:
        raise ValueError(
            "Pass either `density` or `budget`; neither is given. If the configuration "
            "had a `selection`, it has been used: pass it again."
        )
    if available == 0:
        raise ValueError(
            f"method='{settings.method}' finds nothing to choose from: no targeted "
            "module has a bias. Choose another method or other `target_modules`."
        )
    if k > available:
        raise ValueError(
            f"{k} entries are asked for, but method='{settings.method}' has "
            f"{available} of {candidates} candidates to choose from. Change `budget`, "
            "`density` or `target_modules`."
        )
    return k


def _count(candidates: int, density: float) -> int:
    return max(1, round(density * candidates))


def _cells(
    pool: Pool, calibration: Calibration, k: int, settings: Settings
) -> tuple[Cell, ...]:
    available = len(calibration)
    if available == 0:
        raise ValueError("`calibration` is empty; give at least one sample.")
    wanted = settings.num_samples or min(DEFAULT_NUM_SAMPLES, available)
    density = k / len(pool) if settings.density is None else settings.density
    tolerance = 0.5 / len(pool) if settings.density is None else 0.0
    if settings.method in {"fish", "gradient"}:
        cells: tuple[Cell, ...] = (Cell(wanted, density),)
    else:
        cells = plan_cells(
            settings.schedule, wanted, settings.initial_density, density, tolerance
        )
    if cells[0].num_samples > available:
        raise ValueError(
            f"{cells[0].num_samples} samples are asked for, but `calibration` has "
            f"{available}. Lower `num_samples`, change `schedule`, or give more data."
        )
    return cells


def _draw(available: int, wanted: int, seed: int) -> tuple[int, ...]:
    """Draw distinct samples, in ascending order."""
    if wanted == available:
        return tuple(range(available))
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        sorted(torch.randperm(available, generator=generator)[:wanted].tolist())
    )


def _bounds(pool: Pool, settings: Settings) -> list[int]:
    return pool.module_bounds() if settings.scope == "per_module" else [0, len(pool)]
