"""Draw what `step.py` measured.

python benchmarks/step_plot.py      # results/step.json -> results/step.png
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from record import RESULTS
from trainees import TITLES

COLOURS = {"ird": "#0072B2", "ird-random": "#56B4E9", "lora-8": "#D55E00"}
QUIET = "0.6"
Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Read a result file and write its figure.

    Args:
        argv: Arguments of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "step.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "step.png")
    options = parser.parse_args(argv)
    results = json.loads(options.results.read_text(encoding="utf-8"))
    draw(results).savefig(options.output, dpi=150)


def draw(results: Record) -> Figure:
    """Draw steps over the frozen model's, and growth in time and kept bytes.

    Args:
        results: The content of a result file; parts that were not run stay empty.
    """
    cells, growth = results.get("speed", []), results.get("growth", [])
    axes_of_growth = list(dict.fromkeys(cell["axis"] for cell in growth))
    columns = max(len(cells), len(axes_of_growth), 1)
    height = 3 if growth else 1
    figure = Figure(figsize=(3.6 * columns, 3.2 * height), layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False)
    for place in grid.flat:
        place.set_visible(False)
    for place, cell in zip(grid[0], cells, strict=False):
        _bars(place, cell)
    for column, axis in enumerate(axes_of_growth):
        points = [cell for cell in growth if cell["axis"] == axis]
        _curves(grid[1][column], points, "step, over a frozen model's", _time)
        _curves(grid[2][column], points, "kept beyond it, MiB", _kept)
    return figure


def _bars(place: Axes, cell: Record) -> None:
    rows = {
        label: row for label, row in cell["trainees"].items() if "floor" in _over(row)
    }
    place.set_visible(True)
    names = [
        TITLES[row["name"]]
        + (f", {100 * row['density']:g} %" if row["density"] else "")
        for row in rows.values()
    ]
    values = [row["over"]["floor"]["step"] for row in rows.values()]
    colours = [COLOURS.get(row["name"], QUIET) for row in rows.values()]
    place.barh(names, values, color=colours)
    place.axvline(1.0, color="black", linewidth=0.8)
    place.invert_yaxis()
    place.set_title(cell["shape"], fontsize=9)
    place.set_xlabel("step, over a frozen model's", fontsize=8)
    place.tick_params(labelsize=7)


def _over(row: Record) -> Record:
    found: Record = row.get("over", {})
    return found


def _time(rows: Record, label: str) -> float:
    return float(rows[label]["over"]["floor"]["step"])


def _kept(rows: Record, label: str) -> float:
    return float(rows[label]["kept"] - rows["floor"]["kept"]) / 2**20


def _curves(place: Axes, points: list[Record], title: str, value: Any) -> None:
    place.set_visible(True)
    for name, colour in COLOURS.items():
        xs, ys = [], []
        for cell in points:
            rows = cell["trainees"]
            for label, row in rows.items():
                if row["name"] == name and {"floor", label} <= set(_over(row)):
                    xs.append(cell["value"])
                    ys.append(value(rows, label))
        if xs:
            place.plot(xs, ys, marker="o", color=colour, label=TITLES[name])
            place.legend(fontsize=6)
    place.set_xscale("log")
    at = sorted({cell["value"] for cell in points})
    place.set_xticks(at, [f"{value:g}" for value in at])
    place.minorticks_off()
    place.set_xlabel(points[0]["axis"], fontsize=8)
    place.set_ylabel(title, fontsize=8)
    place.tick_params(labelsize=7)


if __name__ == "__main__":
    main()
