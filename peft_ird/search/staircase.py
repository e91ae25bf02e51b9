"""The cells of a search and what is selected at each."""

import copy
import sys
from collections.abc import Sequence

from torch import nn

from peft_ird.adapter.targets import find_candidates, select_parameters, select_stages
from peft_ird.config import IRDConfig
from peft_ird.selection.calibration import Calibration
from peft_ird.selection.schedule import Cell
from peft_ird.selection.selection import Selection
from peft_ird.selection.settings import entry_count, planned_cells

__all__ = ["cell_config", "find_cells", "select_cells"]

WALKED = ("ird", "reverse_ird")


def find_cells(
    model: nn.Module, config: IRDConfig, calibration: Calibration | None
) -> tuple[Cell, ...]:
    """Return the cells that the config's schedule walks, whatever its method.

    A method without data has one cell for each density: samples are nothing to it.

    Args:
        model: The base model.
        config: The configuration; it is not changed.
        calibration: The data, if there is any.

    Raises:
        ValueError: If there are too few samples, the schedule does not end at the
            density asked for, or the method has no schedule.
    """
    if config.method == "bias":
        raise ValueError(
            "method='bias' trains every bias and has no cells to search; call "
            "get_peft_model and train."
        )
    candidates = len(find_candidates(model, config))
    k = entry_count(candidates, candidates, config)
    walked = copy.copy(config)
    walked.method = WALKED[0]
    has_data = calibration is not None and config.needs_data
    available = len(calibration) if has_data else sys.maxsize  # type: ignore[arg-type]
    cells = planned_cells(candidates, available, k, walked)
    if config.needs_data:
        return cells
    first: dict[float, Cell] = {}
    for cell in cells:
        first.setdefault(cell.density, cell)
    return tuple(first.values())


def cell_config(config: IRDConfig, cells: Sequence[Cell], number: int) -> IRDConfig:
    """Return the configuration that selects what a search has at one of its cells.

    Args:
        config: The configuration of the search; it is not changed.
        cells: Its cells.
        number: Which of them, from 0.
    """
    cell = cells[number]
    found = copy.deepcopy(config)
    if number < len(cells) - 1 or config.budget is None:
        found.density, found.budget = cell.density, None
    if config.method in WALKED:
        found.schedule = [(n, density) for n, density in cells[: number + 1]]
    else:
        found.num_samples = cell.num_samples
    return found


def select_cells(
    model: nn.Module,
    config: IRDConfig,
    cells: Sequence[Cell],
    calibration: Calibration | None,
    memory_limit: int | None,
) -> tuple[Selection, ...]:
    """Select at every cell: in one walk, or each by itself where nothing shrinks.

    Args:
        model: The base model; it comes back as it was.
        config: The configuration; it is not changed.
        cells: What `find_cells` returned.
        calibration: The data, where the method needs it.
        memory_limit: As for `select_parameters`.
    """
    if config.method in WALKED:
        return select_stages(model, config, calibration, memory_limit)
    return tuple(
        select_parameters(
            model, cell_config(config, cells, i), calibration, memory_limit
        )
        for i in range(len(cells))
    )
