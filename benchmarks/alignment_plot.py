"""Draw what `sample_alignment.py` measured."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter
from style import BLUE, GREEN, ORANGE, QUIET, RED, quieten

Record = dict[str, Any]
LINES = {
    "random": ("random", QUIET, "o"),
    "largest": ("largest scores of the pool (IRD)", BLUE, "s"),
    "trimmed": ("the largest, without the first tenth", ORANGE, "D"),
    "along the leading": ("along the leading eigenvector", GREEN, "^"),
    "along another": ("along another eigenvector", RED, "v"),
}
ROWS = {
    None: "inputs alone,\nas in the paper",
    "right": "gradients,\nall labels right",
    "wrong anywhere": "gradients, one label\nin twenty wrong",
}
COLUMNS = {
    "scaled_variance": "variance",
    "scaled_bias": "squared bias",
    "angle": "angle to the leading eigenvector",
    "overlap": "share of the true mask found",
}


def draw(results: Record) -> Figure:
    """Draw variance, bias, angle and mask over the number of samples.

    Args:
        results: The content of the result file.
    """
    figure = Figure(figsize=(12.0, 7.2), layout="constrained")
    grid = figure.subplots(len(ROWS), len(COLUMNS), sharex=True, sharey="col")
    for places, labels in zip(grid, ROWS, strict=True):
        rows = [row for row in results["rows"] if row["labels"] == labels]
        for place, name in zip(places, COLUMNS, strict=True):
            for choice in LINES:
                _line(place, [row for row in rows if row["choice"] == choice], name)
            _dress(place, name, results)
        places[0].set_ylabel(ROWS[labels], fontsize=10, labelpad=10)
    for place, title in zip(grid[0], COLUMNS.values(), strict=True):
        place.set_title(title, loc="left", fontsize=10, pad=12)
    for place in grid[-1]:
        place.set_xlabel("samples", fontsize=9)
    _legend(figure, grid)
    return figure


def _line(place: Axes, rows: list[Record], name: str) -> None:
    if not rows:
        return
    label, colour, marker = LINES[rows[0]["choice"]]
    xs = [row["n"] for row in rows]
    ys = [max(0.0, row["mean"][name]) for row in rows]  # chance puts bias below 0
    place.plot(
        xs, ys, marker=marker, markersize=4, color=colour, label=label, clip_on=False
    )


def _dress(place: Axes, name: str, results: Record) -> None:
    quieten(place)
    place.set_xscale("log", base=2)
    place.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
    place.xaxis.set_minor_locator(NullLocator())
    if name == "scaled_variance":
        place.set_yscale("log")
    elif name == "angle":
        place.set_ylim(0, 90)
        place.set_yticks([0, 30, 60, 90], ["0°", "30°", "60°", "90°"])
    else:
        place.set_ylim(0, 1)
        place.set_yticks([0, 0.25, 0.5, 0.75, 1])
    if name == "overlap":
        settings = results["settings"]
        chance = settings["kept"] / settings["size"]
        place.axhline(chance, color=QUIET, linestyle=":", label="a mask at random")
        place.yaxis.set_major_formatter(PercentFormatter(1))


def _legend(figure: Figure, grid: Any) -> None:
    handles = {
        label: line
        for places in grid
        for line, label in zip(*places[-1].get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=3, frameon=False
    )
