"""Algorithm 1 with evaluation: which cell of the staircase is best."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from peft_ird.config import IRDConfig
from peft_ird.search.folder import SearchFolder
from peft_ird.search.halving import Rung, SuccessiveHalving, survivors
from peft_ird.search.outcome import Evaluate, Resumable, name_of
from peft_ird.search.result import SearchResult
from peft_ird.search.staircase import cell_config, find_cells, select_cells
from peft_ird.search.trial import Trial, weight_digest
from peft_ird.search.workers import Workers
from peft_ird.selection.calibration import Calibration
from peft_ird.selection.gradients.ranks import Ranks
from peft_ird.selection.schedule import Cell

__all__ = ["search"]

logger = logging.getLogger(__name__)

_WRITTEN_LATER = (
    "fingerprint", "format_version", "nnz_pattern", "peft_version", "provenance",
    "shape_pattern",
)  # fmt: skip


def search(
    model_init: Callable[[], nn.Module],
    config: IRDConfig,
    calibration: Calibration | Any | None,
    evaluate: Evaluate,
    output_dir: str | os.PathLike[str],
    *,
    halving: SuccessiveHalving | None = None,
    workers: int | None = None,
    devices: Sequence[str | torch.device] | None = None,
    memory_limit: int | None = None,
) -> SearchResult:
    """Evaluate every cell of the config's schedule, and say which is best.

    The staircase is walked once; methods that shrink nothing, as ``"fish"``, select at
    every cell by themselves. Each cell is written down when it is done: a search that
    was interrupted goes on where it was when it is called again with the same
    arguments, and cells that failed are tried again.

    Args:
        model_init: Makes the base model, head included, with the same weights each
            time.
        config: What is selected, and by which schedule.
        calibration: The data to select on. Default: the config's own.
        evaluate: Trains the model that it is given and returns a score, higher being
            better, or an `Outcome`; as a `TrainerEvaluate`. It starts from the same
            random state for every cell.
        output_dir: Folder of the search, for no other one.
        halving: Train all cells a little and only the best of them to the end.
        workers: Cells at a time, each in a process of its own with its share of the
            threads; a script that asks for them needs ``if __name__ == "__main__":``.
            Default: one for each device; without ``devices`` none, the cells are
            evaluated here, one after another.
        devices: Devices of these processes, as ``["cuda:0", "cuda:1"]``. Selection
            itself is done here, where ``model_init`` puts the model.
        memory_limit: As for `select_parameters`.

    Returns:
        The result; `SearchResult.load` reads it again.

    Raises:
        RuntimeError: If another search runs in the folder.
        ValueError: If the arguments do not fit each other, the folder holds a search
            with other settings, or ``model_init`` makes different models.
        TypeError: If the evaluation cannot be called, or halving is asked for and it
            cannot stop and go on.
    """
    if not callable(evaluate):
        raise TypeError(
            f"`evaluate` must be a function of a model or the like, got {evaluate!r}."
        )
    if halving is not None and not isinstance(evaluate, Resumable):
        raise TypeError(
            "`halving` needs an evaluation that can stop its training and go on, with "
            f"`total_steps` and `advance`, as TrainerEvaluate; got {evaluate!r}."
        )
    if Ranks().size > 1:
        raise ValueError(
            "A search is run by one process, but this is one of several. Start it "
            "without torchrun and pass `devices`."
        )
    crew = Workers(workers, devices)
    crew.check(model_init=model_init, evaluate=evaluate)
    data = config.calibration if calibration is None else Calibration.of(calibration)
    campaign = Campaign(
        SearchFolder(Path(output_dir)), model_init, config, data, evaluate, halving
    )
    try:
        cells = campaign.begin(memory_limit)
        for number, rung in enumerate(campaign.rungs):
            campaign.train(number, rung, cells, crew)
    finally:
        campaign.folder.release()
    return SearchResult.load(output_dir)


@dataclass
class Campaign:
    """A search under way: what it was asked for, is in its folder, and has failed."""

    folder: SearchFolder
    model_init: Callable[[], nn.Module]
    config: IRDConfig
    calibration: Calibration | None
    evaluate: Evaluate
    halving: SuccessiveHalving | None
    base: str = ""
    rungs: tuple[Rung, ...] = ()
    failed: set[int] = field(default_factory=set)

    def begin(self, memory_limit: int | None) -> tuple[Cell, ...]:
        """Take the folder and select, unless that is done; return the cells."""
        if self.config.selection is not None:
            raise ValueError(
                "`config` has a `selection`, but a search makes its own. Leave it out."
            )
        model = self.model_init()
        self.base = weight_digest(model)
        cells = find_cells(model, self.config, self.calibration)
        self.rungs = self._plan(len(cells))
        self.folder.claim(self._settings(cells))
        if not all(folder.is_selected for folder in self.folder.cells()):
            selections = select_cells(
                model, self.config, cells, self.calibration, memory_limit
            )
            self.folder.begin(cells, selections)
        return cells

    def train(
        self, number: int, rung: Rung, cells: Sequence[Cell], crew: Workers
    ) -> None:
        """Bring the best cells to a rung, and delete what nobody will need.

        The place of one that fails is taken by the next.
        """
        folders = self.folder.cells()
        label = "cells" if len(self.rungs) == 1 else f"rung {number + 1}"
        with tqdm(total=rung.cells, desc=label) as bar:
            while True:
                known = [folder.read() for folder in folders]
                alive = survivors(known, self.rungs[: number + 1], self.failed)
                trials = {
                    i: self._trial(i, cells, folders[i].path, number) for i in alive
                }
                due = {i: t for i, t in trials.items() if not self._is_done(t)}
                if not due:
                    break
                bar.update(len(alive) - len(due) - bar.n)
                for trial in crew.run([*due.values()]):
                    bar.update()
                    self._report(trial)
                self.failed |= {i for i in due if folders[i].read().failure}
        for folder in folders:
            done = folder.read().rung
            # What has come so far goes on, or takes the place of what fails. Where one
            # has failed, trying it again may change who goes on.
            waits = self.failed or done > number
            folder.drop_rungs(done - 1 if waits else None)

    def _plan(self, cells: int) -> tuple[Rung, ...]:
        if self.halving is None:
            return (Rung(cells, None),)
        assert isinstance(self.evaluate, Resumable)
        return self.halving.rungs(cells, self.evaluate.total_steps)

    def _settings(self, cells: Sequence[Cell]) -> dict[str, Any]:
        """Return all that has an influence on the result."""
        data, halving = self.calibration, self.halving
        describe = getattr(self.evaluate, "settings", None)
        config = self.config.to_dict()
        known = data and {
            "digest": data.digest(),
            "samples": len(data),
            "collate_fn": name_of(data.collate_fn),
            "loss": name_of(data.loss),
        }
        return {
            "config": {k: v for k, v in config.items() if k not in _WRITTEN_LATER},
            "cells": cells,
            "data": known or None,
            "base": self.base,
            "evaluate": {
                "name": name_of(self.evaluate),
                **(describe() if describe else {}),
            },
            "halving": halving and {"eta": halving.eta, "cost": halving.cost},
        }

    def _trial(self, i: int, cells: Sequence[Cell], path: Path, number: int) -> Trial:
        return Trial(
            model_init=self.model_init,
            evaluate=self.evaluate,
            config=cell_config(self.config, cells, i),
            path=path,
            base=self.base,
            rung=number,
            until=self.rungs[number].steps,
            is_last=number == len(self.rungs) - 1,
        )

    def _is_done(self, trial: Trial) -> bool:
        """Return whether a cell has come to the rung; one that has stopped does so."""
        record = trial.folder.read()
        if record.rung <= trial.rung and record.outcome and record.outcome.stopped:
            again = replace(record.outcome, seconds=0.0)
            trial.folder.write(replace(record, outcomes=(*record.outcomes, again)))
            return True
        return record.rung > trial.rung

    @staticmethod
    def _report(trial: Trial) -> None:
        record = trial.folder.read()
        if record.failure is not None:
            logger.warning(
                "The cell of %d samples and density %g failed: %s. Its traceback is in "
                "%s.", *record.cell, record.failure, trial.folder.record,
            )  # fmt: skip
