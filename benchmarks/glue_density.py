"""Draw the scores of the GLUE experiments against the density."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiment import Experiment
from glue_table import TITLES, chosen, reported
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Result = dict[str, Any]

# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "0.4")
MARKERS = "osD^vPX"


def draw(results: Sequence[Result]) -> Figure:
    """Draw the score against the density, one panel per task, a line per method.

    Bars are standard deviations over seeds. Methods with one density are left out once
    others have more.

    Args:
        results: All runs of an experiment.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not results:
        raise ValueError("There are no results; run benchmarks/glue_runs.py.")
    experiment = Experiment.load(results[0]["job"]["experiment"])
    densities = sorted({result["job"]["density"] for result in results})
    found = {density: chosen(experiment, density, results) for density in densities}
    rows = [row for row in experiment.rows if any(row in found[d] for d in densities)]
    if several := [row for row in rows if sum(row in found[d] for d in densities) > 1]:
        rows = several
    keys = {key for d in densities for row in rows for key in found[d].get(row, {})}
    tasks = [task for task in TITLES if any(task == name for name, _ in keys)]
    if not tasks:
        raise ValueError("No method has found its rate yet.")
    figure = Figure(figsize=(3.1 * len(tasks) + 0.4, 3.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for i, row in enumerate(rows):
            _draw_row(
                axes, i, row, {d: _values(found[d], row, task) for d in densities}
            )
        _label(axes, task, densities)
    panels[0].set_ylabel("score, points")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def _values(found: Mapping[str, Any], row: str, task: str) -> list[float]:
    runs = found.get(row, {})
    return [reported(result) for (name, _), result in runs.items() if name == task]


def _draw_row(
    axes: Axes, i: int, row: str, values: Mapping[float, list[float]]
) -> None:
    points = [(100 * d, v) for d, v in values.items() if v]
    shift = 1 + 0.05 * (i - 2)  # error bars beside each other
    axes.errorbar(
        [d * shift for d, _ in points],
        [statistics.mean(v) for _, v in points],
        [statistics.stdev(v) if len(v) > 1 else 0 for _, v in points],
        color=COLOURS[i % len(COLOURS)],
        marker=MARKERS[i % len(MARKERS)],
        markersize=5,
        capsize=2,
        linewidth=1.3,
        label=row.replace("`", ""),
    )


def _label(axes: Axes, task: str, densities: Sequence[float]) -> None:
    axes.set_title(TITLES[task], loc="left", fontsize=10)
    axes.set_xscale("log")
    axes.set_xticks([100 * d for d in densities], [f"{100 * d:g}" for d in densities])
    axes.minorticks_off()
    axes.set_xlabel("trained weights, %")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
