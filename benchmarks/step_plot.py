"""Draw what `step.py` measured."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from style import BLUE, RED, SKY, quieten
from titles import TITLES

Record = dict[str, Any]
COLOURS = {"ird": BLUE, "ird-random": SKY, "lora-8": RED}
LINES = {"ird": "-s", "ird-random": "-o", "lora-8": "--^"}
STEP = "step, over a frozen model's"


def draw(results: Record) -> Figure:
    """Draw steps over the frozen model's, and growth in time and kept bytes.

    Args:
        results: The content of a result file; parts that were not run are left out.
    """
    cells, growth = results.get("speed", []), results.get("growth", [])
    heights = [3.9] * bool(cells) + [4.6] * bool(growth)
    figure = Figure(figsize=(11.0, sum(heights) or 1.0), layout="constrained")
    parts = iter(figure.subfigures(len(heights) or 1, 1, height_ratios=heights or [1],
                                   squeeze=False)[:, 0])  # fmt: skip
    if cells:
        _speed(next(parts), cells)
    if growth:
        _growth(next(parts), growth)
    return figure


def _speed(part: SubFigure, cells: Sequence[Record]) -> None:
    """Draw one panel of bars per model; those of a contestant are level."""
    rows = [row for cell in cells for row in _timed(cell).values()]
    order = sorted(rows, key=lambda row: list(TITLES).index(row["name"]))
    names = list(dict.fromkeys(map(_title, order)))
    longest = max(map(_time, rows), default=1.0)
    panels = part.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    for place, cell in zip(panels, cells, strict=True):
        quieten(place)
        place.grid(visible=False)
        place.set_title(cell["shape"], loc="left", fontsize=10)
        for row in _timed(cell).values():
            _bar(place, names.index(_title(row)), row)
        place.axvline(1.0, color="black", linewidth=0.8)
        place.set_xlim(0, 1.12 * longest)
        place.locator_params(axis="x", nbins=5)
        place.set_xlabel(STEP, fontsize=9)
        place.spines["left"].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()


def _bar(place: Axes, at: int, row: Record) -> None:
    value = _time(row)
    place.barh(at, value, color=COLOURS.get(row["name"], "0.75"))
    place.text(
        max(value, 1.0) + 0.03, at, f"{value:.2f}", va="center", size=7, color="0.3"
    )


def _growth(part: SubFigure, growth: Sequence[Record]) -> None:
    """Draw time above kept bytes, one column per axis that grows."""
    axes = list(dict.fromkeys(cell["axis"] for cell in growth))
    grid = part.subplots(2, len(axes), sharex="col", sharey="row", squeeze=False)
    for column, axis in enumerate(axes):
        cells = [cell for cell in growth if cell["axis"] == axis]
        above, below = grid[:, column]
        _curves(above, cells, lambda row, _: _time(row))
        _curves(below, cells, lambda row, floor: (row["kept"] - floor["kept"]) / 2**20)
        at = sorted({cell["value"] for cell in cells})
        written = [f"{100 * v:g} %" if axis == "density" else f"{v:g}" for v in at]
        below.set_xticks(at, written)
        below.minorticks_off()
        below.set_xlabel(axis, fontsize=9)
    grid[0][0].set_ylabel(STEP, fontsize=9)
    grid[1][0].set_ylabel("kept beyond it, MiB", fontsize=9)
    grid[0][-1].legend(fontsize=8, frameon=False)


def _curves(
    place: Axes, cells: Sequence[Record], value: Callable[[Record, Record], float]
) -> None:
    quieten(place)
    place.set_xscale("log")
    for name, colour in COLOURS.items():
        points = [
            (cell["value"], value(row, cell["trainees"]["floor"]))
            for cell in cells
            for row in _timed(cell).values()
            if row["name"] == name
        ]
        if points:
            place.plot(
                *zip(*points, strict=True), LINES[name], markersize=4,
                color=colour, label=TITLES[name],
            )  # fmt: skip


def _timed(cell: Record) -> dict[str, Record]:
    """Return the contestants that ran beside the frozen model."""
    rows = cell["trainees"].items()
    return {label: row for label, row in rows if "floor" in row.get("over", {})}


def _title(row: Record) -> str:
    density = f" at {100 * row['density']:g} %" if row["density"] else ""
    return TITLES[row["name"]] + density


def _time(row: Record) -> float:
    return float(row["over"]["floor"]["step"])
