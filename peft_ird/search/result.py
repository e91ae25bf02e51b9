"""The result of a search: what every cell came to, and the best of them."""

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft_ird.config import IRDConfig
from peft_ird.search.folder import CellFolder, SearchFolder
from peft_ird.search.outcome import CellRecord, Failure, Outcome
from peft_ird.search.staircase import cell_config
from peft_ird.selection.schedule import Cell
from peft_ird.selection.selection import Selection
from peft_ird.selection.table import aligned

__all__ = ["SearchResult"]


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found; everything is in its folder.

    Args:
        output_dir: The folder.
        config: The configuration of the search, without its data.
        records: What is known of each cell, in the order of the walk.
        data: Digest of the calibration data; None without any.
    """

    output_dir: Path
    config: IRDConfig
    records: tuple[CellRecord, ...]
    data: str | None = None

    @classmethod
    def load(cls, output_dir: str | os.PathLike[str]) -> "SearchResult":
        """Read the result of a search, finished or not.

        Args:
            output_dir: Its folder.

        Returns:
            The result; cells that have not been evaluated have no outcome.

        Raises:
            ValueError: If there is no search in the folder, or its cells have not been
                selected yet.
        """
        folder = SearchFolder(Path(output_dir))
        settings = folder.settings
        cells = folder.cells()
        if not all(cell.is_selected for cell in cells):
            raise ValueError(
                f"The search in '{output_dir}' was interrupted before its cells were "
                "selected. Run it again with the same arguments."
            )
        names = {field.name for field in fields(IRDConfig)} - {"peft_type"}
        given = {k: v for k, v in settings["config"].items() if k in names}
        data = settings["data"] and settings["data"]["digest"]
        records = tuple(cell.read() for cell in cells)
        return cls(folder.path, IRDConfig(**given), records, data)

    def __repr__(self) -> str:
        scored = sum(outcome is not None for outcome in self.outcomes)
        return (
            f"<SearchResult {self.method}: {scored} of {len(self.records)} cells "
            f"scored, in '{self.output_dir}'>"
        )

    @property
    def method(self) -> str:
        """How entries were chosen."""
        return self.config.method

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Samples and density of each cell."""
        return tuple(record.cell for record in self.records)

    @property
    def outcomes(self) -> tuple[Outcome | None, ...]:
        """The last outcome of each cell; None where there is none."""
        return tuple(record.outcome for record in self.records)

    @property
    def scores(self) -> tuple[float | None, ...]:
        """The last score of each cell; None where there is none."""
        return tuple(None if o is None else o.score for o in self.outcomes)

    @property
    def selections(self) -> tuple[Selection, ...]:
        """The entries of each cell, read from the folder."""
        return tuple(folder.selection for folder in self._folders)

    @property
    def errors(self) -> dict[Cell, Failure]:
        """The error of each cell whose last training failed."""
        return {r.cell: r.failure for r in self.records if r.failure is not None}

    @property
    def total_steps(self) -> int:
        """Training steps of all cells together."""
        return sum(outcome.steps for outcome in self.outcomes if outcome)

    @property
    def best(self) -> CellRecord:
        """The cell with the best score, of those that were trained furthest.

        Of equal scores the smaller density wins, then the fewer samples.

        Raises:
            ValueError: If no cell has a score.
        """
        return self.records[self._best]

    @property
    def best_selection(self) -> Selection:
        """The entries of the best cell."""
        return self._folders[self._best].selection

    @property
    def best_adapter(self) -> Path:
        """The folder of the best cell's trained adapter, for `from_pretrained`.

        Raises:
            ValueError: If the evaluation left the adapter untrained.
        """
        path = self._folders[self._best].adapter
        if not path.is_dir():
            raise ValueError(
                "There is no trained adapter: `evaluate` scored the models without "
                "changing their trainable parameters. Train one with best_config()."
            )
        return path

    def best_config(self) -> IRDConfig:
        """Return the configuration of the best cell, with its entries.

        ``get_peft_model`` takes it as it is; without its ``selection`` it selects the
        same entries from the same data.
        """
        config = cell_config(self.config, self.cells, self._best)
        config.selection = self.best_selection
        return config

    def table(self) -> str:
        """Say what every cell came to.

        Returns:
            Text of several lines; the best cell has a star.
        """
        head = ["", "samples", "density", "entries", "score", "reported", "steps",
                "seconds"]  # fmt: skip
        scored = any(record.outcomes for record in self.records)
        best = self.best if scored else None
        rows = [[("*" if r is best else ""), *_row(r)] for r in self.records]
        if len({record.rung for record in self.records if record.outcomes}) > 1:
            head.append("rung")
            for row, record in zip(rows, self.records, strict=True):
                row.append(str(record.rung or "-"))
        return aligned([head, *rows])

    def plot(
        self,
        path: str | os.PathLike[str],
        counterpart: "SearchResult | None" = None,
        titles: Sequence[str] | None = None,
        by: str = "score",
    ) -> None:
        """Write the picture of `draw_search`, as the paper's Fig. 2; needs matplotlib.

        Args:
            path: The file; its ending says the format.
            counterpart: The search that it is compared with, as one of FISH.
            titles: What stands above the matrices. Default: the methods.
            by: What is drawn, ``"score"`` or ``"reported"``.
        """
        drawing = importlib.import_module("peft_ird.search.plot_search")
        drawing.plot_search(self, path, counterpart, titles, by)

    @property
    def _folders(self) -> list[CellFolder]:
        return SearchFolder(self.output_dir).cells()

    @property
    def _best(self) -> int:
        furthest = max((record.rung for record in self.records), default=0)
        if furthest == 0:
            failures = list(self.errors.values())
            why = f" The first error: {failures[0].message}" if failures else ""
            raise ValueError(f"No cell has a score.{why}")
        there = [i for i, r in enumerate(self.records) if r.rung == furthest]
        numbers = [i for i in there if self.records[i].failure is None] or there
        return max(numbers, key=lambda i: self.records[i].merit())


def _row(record: CellRecord) -> list[str]:
    outcome = record.outcome
    return [
        f"{record.cell.num_samples:,}",
        f"{100 * record.cell.density:.3g} %",
        f"{record.entries:,}",
        "failed" if record.failure else _number(outcome and outcome.score),
        _number(outcome and outcome.reported),
        f"{outcome.steps:,}" if outcome and outcome.steps else "-",
        f"{record.seconds:,.1f}" if outcome else "-",
    ]


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"
