"""Figures of the GLUE experiments: score against density, and where the budget goes."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from glue_runs import Experiment, load_results
from glue_table import TITLES, chosen, reported
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw_budget", "draw_density"]

Result = dict[str, Any]

# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "0.4")
MARKERS = "osD^vPX"
MOST_KINDS = 8


def draw_density(experiment: Experiment, rows: Sequence[str]) -> Figure:
    """Draw the score against the density, one panel per task, a line per method.

    Bars are standard deviations over seeds.

    Args:
        experiment: The list.
        rows: The methods to draw.

    Raises:
        ValueError: If there are no results.
    """
    densities = sorted({r["job"]["density"] for r in load_results(experiment.name)})
    found = {density: chosen(experiment, density) for density in densities}
    tasks = [
        task
        for task in TITLES
        if sum(
            any(task == key[0] for row in rows for key in found[d].get(row, {}))
            for d in densities
        )
        > 1
    ]
    if not tasks:
        raise ValueError("No task has results at two densities yet.")
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


def draw_budget(experiment: Experiment, density: float, rows: Sequence[str]) -> Figure:
    """Draw each method's shares of the budget, by layer and by kind of module.

    Shares are means over tasks and seeds.

    Args:
        experiment: The list.
        density: The budget.
        rows: The methods to draw.

    Raises:
        ValueError: If there are no results.
    """
    found = chosen(experiment, density)
    shares = {
        by: {row: _shares(found[row].values(), by) for row in rows if row in found}
        for by in ("layer", "kind")
    }
    if not shares["layer"]:
        raise ValueError("None of the methods has results yet.")
    layers = _in_order(shares["layer"])
    kinds = _largest(shares["kind"])
    figure = Figure(
        figsize=(4.2 + 0.55 * (len(layers) + len(kinds)), 1.8 + 0.34 * len(rows)),
        layout="constrained",
    )
    left, right = figure.subplots(
        1, 2, sharey=True, width_ratios=[len(layers), len(kinds)]
    )
    _draw_shares(left, shares["layer"], layers, "layer")
    _draw_shares(right, shares["kind"], kinds, "kind of module")
    return figure


def _shares(results: Any, by: str) -> dict[str, float]:
    """Return the mean share of each part over runs."""
    found: dict[str, list[float]] = defaultdict(list)
    runs = [result["selection"][by] for result in results]
    for run in runs:
        for name, (_, share) in run.items():
            found[name].append(share)
    return {name: sum(each) / len(runs) for name, each in found.items()}


def _in_order(shares: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = {name for each in shares.values() for name in each}
    return sorted(names, key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else n))


def _largest(shares: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = {name for each in shares.values() for name in each}
    by_size = sorted(names, key=lambda n: -max(e.get(n, 0) for e in shares.values()))
    return by_size[:MOST_KINDS]


def _draw_shares(
    axes: Axes,
    shares: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
    title: str,
) -> None:
    table = np.array([[each.get(n, 0.0) for n in names] for each in shares.values()])
    axes.imshow(table**0.5, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (y, x), share in np.ndenumerate(table):
        text = f"{100 * share:.0f}" if share >= 0.005 else "·"
        colour = "white" if share > 0.45 else "0.2"
        axes.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
    short = [n.removeprefix("attention.").replace(".dense", "") for n in names]
    axes.set_xticks(range(len(names)), short, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(shares)), [row.replace("`", "") for row in shares])
    axes.set_title(f"share of the budget by {title}, %", loc="left", fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def write_figures(experiment: Experiment, rows: Sequence[str], folder: Path) -> None:
    """Write both figures at 0.1 %.

    Args:
        experiment: The list.
        rows: The methods to draw.
        folder: Where to.
    """
    draw_density(experiment, rows).savefig(folder / "glue-density.png", dpi=150)
    draw_budget(experiment, 0.001, rows).savefig(folder / "glue-budget.png", dpi=150)
