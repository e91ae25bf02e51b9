"""What a configuration asks of a selection, and how much that is for a model."""

from typing import Protocol

import torch

from peft_ird.selection.schedule import Cell, plan_cells

__all__ = ["Settings", "drawn_samples", "entry_count", "planned_cells", "rounded"]

DEFAULT_NUM_SAMPLES = 128


class Settings(Protocol):
    """What the selection reads of a configuration."""

    density: float | None
    budget: int | None
    method: str
    num_samples: int | None
    num_ranked_samples: int | None
    initial_density: float | None
    schedule: str | list[tuple[int, float]]
    nested: bool
    sample_score: str
    sample_scaling: str
    trim_samples: float
    fisher: str
    scope: str
    temperature: float
    head_warmup_steps: int
    head_warmup_learning_rate: float
    seed: int


def entry_count(candidates: int, available: int, settings: Settings) -> int:
    """Return the number of entries asked for; for BitFit, all biases by default.

    Args:
        candidates: Number of candidates.
        available: Those of them that the method chooses from.
        settings: The options of the selection.

    Raises:
        ValueError: If no number is given, or more than are available.
    """
    if settings.density is not None:
        k = rounded(candidates, settings.density)
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


def rounded(candidates: int, density: float) -> int:
    """Return the number of entries at a density: the nearest, at least one."""
    return max(1, round(density * candidates))


def planned_cells(
    candidates: int, available: int, k: int, settings: Settings
) -> tuple[Cell, ...]:
    """Return the cells to walk.

    Args:
        candidates: Number of candidates.
        available: Number of calibration samples.
        k: The number of entries asked for.
        settings: The options of the selection.

    Raises:
        ValueError: If there are too few samples, or the schedule does not end at k.
    """
    if available == 0:
        raise ValueError("`calibration` is empty; give at least one sample.")
    wanted = settings.num_samples or min(DEFAULT_NUM_SAMPLES, available)
    density = k / candidates if settings.density is None else settings.density
    tolerance = 0.5 / candidates if settings.density is None else 0.0
    if settings.method in {"fish", "gradient"}:
        cells: tuple[Cell, ...] = (Cell(wanted, density),)
    else:
        cells = plan_cells(
            settings.schedule, wanted, settings.initial_density, density, tolerance
        )
    if cells[0].num_samples > available:
        is_free = cells[0].num_samples == wanted
        advice = "Lower `num_samples`" if is_free else "Change `schedule`"
        raise ValueError(
            f"{cells[0].num_samples} samples are asked for, but `calibration` has "
            f"{available}. {advice}, or give more data."
        )
    return cells


def drawn_samples(available: int, wanted: int, settings: Settings) -> tuple[int, ...]:
    """Draw distinct samples, ascending; more than wanted if they are ranked first.

    Args:
        available: Number of calibration samples.
        wanted: Samples of the first cell.
        settings: The options of the selection.

    Raises:
        ValueError: If more are to be ranked than there are.
    """
    drawn = max(wanted, settings.num_ranked_samples or 0)
    if drawn > available:
        raise ValueError(
            f"`num_ranked_samples` is {drawn}, but `calibration` has {available} "
            "samples. Lower it, or give more data."
        )
    if drawn == available:
        return tuple(range(available))
    generator = torch.Generator().manual_seed(settings.seed)
    return tuple(
        sorted(torch.randperm(available, generator=generator)[:drawn].tolist())
    )
