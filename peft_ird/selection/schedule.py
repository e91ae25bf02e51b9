"""Cells of range decreasing: how many samples and which density, step by step."""

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, NamedTuple

__all__ = ["PAPER", "Cell", "check_schedule", "plan_cells"]


class Cell(NamedTuple):
    """One cell of the staircase: samples kept and share of the candidates kept."""

    num_samples: int
    density: float


# The staircase of the paper's Table 3, samples first.
PAPER = tuple(
    Cell(n, percent / 100)
    for n, percent in [
        (128, 2.5), (32, 2.5), (32, 0.5), (16, 0.5), (16, 0.1), (1, 0.1), (1, 0.02),
    ]
)  # fmt: skip


def check_schedule(schedule: Any) -> str | list[tuple[int, float]]:
    """Return a schedule in its plain form.

    Args:
        schedule: ``"halving"``, ``"paper"`` or pairs of (num_samples, density).

    Returns:
        The name, or a list of pairs.

    Raises:
        ValueError: If the name is unknown, or the list is empty, malformed or grows.
    """
    if isinstance(schedule, str):
        if schedule not in {"halving", "paper"}:
            raise ValueError(
                "`schedule` must be 'halving', 'paper' or a list of (num_samples, "
                f"density), got {schedule!r}."
            )
        return schedule
    try:
        pairs = [(n, density) for n, density in schedule]
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`schedule` must be 'halving', 'paper' or a list of (num_samples, "
            f"density), got {schedule!r}."
        ) from error
    if not pairs:
        raise ValueError(
            "`schedule` is empty; give at least one (num_samples, density)."
        )
    for pair in pairs:
        are_numbers = isinstance(pair[0], Integral) and isinstance(pair[1], Real)
        if not are_numbers or pair[0] < 1 or not 0 < pair[1] <= 1:
            raise ValueError(
                "Each cell of `schedule` must be (num_samples, density) with "
                f"num_samples >= 1 and density in (0, 1], got {pair}."
            )
    for before, after in pairwise(pairs):
        if after[0] > before[0] or after[1] > before[1]:
            raise ValueError(
                f"`schedule` must not grow, but {after} follows {before}. Order the "
                "cells from large to small."
            )
    return [(int(n), float(density)) for n, density in pairs]


def plan_cells(
    schedule: str | Sequence[tuple[int, float]],
    num_samples: int,
    initial_density: float | None,
    density: float,
    tolerance: float,
) -> tuple[Cell, ...]:
    """Return the cells to walk, the last one at the density asked for.

    Args:
        schedule: A checked schedule.
        num_samples: Samples of the first cell, for ``"halving"``.
        initial_density: Density of the first cell, for ``"halving"``; None for 0.025,
            or four times ``density`` (at most 1) where ``density`` is not below that.
        density: The target.
        tolerance: Absolute difference at which two densities are the same.

    Returns:
        At least one cell.

    Raises:
        ValueError: If the schedule starts below ``density`` or does not meet it.
    """
    if schedule == "halving":
        return _halve(num_samples, initial_density, density)
    cells = PAPER if schedule == "paper" else [Cell(*pair) for pair in schedule]
    met = [
        i
        for i, cell in enumerate(cells)
        if math.isclose(cell.density, density, rel_tol=1e-9, abs_tol=tolerance)
    ]
    if schedule == "paper" and met:
        return tuple(cells[: met[0] + 1])
    if schedule != "paper" and met and met[-1] == len(cells) - 1:
        return tuple(cells)
    densities = sorted({cell.density for cell in cells}, reverse=True)
    raise ValueError(
        f"`schedule` must meet the density asked for at its end, {density:g}, but its "
        f"densities are {', '.join(f'{d:g}' for d in densities)}. Change `density` or "
        "`budget`, or use schedule='halving'."
    )


def _halve(n: int, initial: float | None, target: float) -> tuple[Cell, ...]:
    if initial is None:
        initial = 0.025 if target < 0.025 else min(1.0, 4 * target)
    if initial < target:
        raise ValueError(
            f"`initial_density` ({initial:g}) must not be below the density asked for "
            f"({target:g}); range decreasing starts large."
        )
    cells = [Cell(n, initial)]
    while cells[-1].density > target:
        n, density = cells[-1]
        if n > 1:
            cells.append(Cell(max(1, n // 2), density))
        cells.append(Cell(cells[-1].num_samples, max(density / 2, target)))
    return tuple(cells)
