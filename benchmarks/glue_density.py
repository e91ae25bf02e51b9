"""Scores of the GLUE experiments against the density: a figure and a table."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiment import Experiment
from glue_table import TITLES, Key, cell, chosen, headed, line, reported
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Result = dict[str, Any]

# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "0.4")
MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Densities:
    """The rows and tasks that were run at several densities, each at its rate.

    Args:
        densities: All densities, ascending.
        rows: The rows.
        tasks: The tasks.
        seeds: How many seeds there are to be.
        runs: By density and row, the runs by task and seed.
    """

    densities: Sequence[float]
    rows: Sequence[str]
    tasks: Sequence[str]
    seeds: int
    runs: Mapping[float, Mapping[str, Mapping[Key, Result]]]

    @classmethod
    def of(cls, results: Sequence[Result]) -> "Densities":
        """Find them among all runs of an experiment.

        Args:
            results: The runs.

        Raises:
            ValueError: If nothing was run at several densities.
        """
        if not results:
            raise ValueError("There are no results; run benchmarks/glue_runs.py.")
        experiment = Experiment.load(results[0]["job"]["experiment"])
        densities = sorted({result["job"]["density"] for result in results})
        runs = {density: chosen(experiment, density, results) for density in densities}

        def is_shown(row: str, task: str | None = None) -> bool:
            tasks = [{name for name, _ in runs[d].get(row, ())} for d in densities]
            return sum(task in t if task else bool(t) for t in tasks) > 1

        rows = [row for row in experiment.rows if is_shown(row)]
        tasks = [task for task in TITLES if any(is_shown(row, task) for row in rows)]
        if not tasks:
            raise ValueError("Nothing has found its rate at several densities yet.")
        return cls(densities, rows, tasks, len(experiment.seeds), runs)

    def scores(self, density: float, row: str) -> dict[Key, float]:
        """Return the reported scores of a row by task and seed, in points."""
        runs = self.runs[density].get(row, {})
        return {key: reported(result) for key, result in runs.items()}

    def entries(self, row: str) -> list[int]:
        """Return how many entries a row trains at each density that it has."""
        found = (self.runs[density].get(row, {}) for density in self.densities)
        return [max(r["entries"] for r in runs.values()) for runs in found if runs]


def draw(results: Sequence[Result]) -> Figure:
    """Draw the score against the density, one panel per task, a line per method.

    Bars are standard deviations over seeds.

    Args:
        results: All runs of an experiment.

    Raises:
        ValueError: If there is nothing to draw.
    """
    found = Densities.of(results)
    figure = Figure(figsize=(3.1 * len(found.tasks) + 0.4, 3.4), layout="constrained")
    panels = figure.subplots(1, len(found.tasks), squeeze=False)[0]
    for axes, task in zip(panels, found.tasks, strict=True):
        for i, row in enumerate(found.rows):
            scores = {d: found.scores(d, row).items() for d in found.densities}
            values = {d: [v for (t, _), v in s if t == task] for d, s in scores.items()}
            _draw_row(axes, i, row, values)
        _label(axes, task, found.densities)
    panels[0].set_ylabel("score, points")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def table(results: Sequence[Result]) -> str:
    """Return a line per method: the mean over tasks, by density.

    Args:
        results: All runs of an experiment.

    Raises:
        ValueError: If nothing was run at several densities.
    """
    found = Densities.of(results)
    head = ["", *(f"{100 * density:g} %" for density in found.densities)]
    lines = headed(head)
    for row in found.rows:
        means = [
            _seed_means(found.scores(d, row), found.tasks) for d in found.densities
        ]
        lines.append(line([row, *(cell(each, found.seeds) for each in means)]))
    sizes = {row: ", ".join(f"{n:,}" for n in found.entries(row)) for row in found.rows}
    most = statistics.mode(sizes.values())
    others = "".join(f"; {row}: {n}" for row, n in sizes.items() if n != most)
    tasks = ", ".join(TITLES[task] for task in found.tasks)
    note = (
        f"Mean of {tasks}, ± standard deviation over {found.seeds} seeds, or as many "
        f"as stand in brackets. Entries: {most}{others}. The rest is as above, with a "
        "rate for each density."
    )
    return "\n".join([*lines, "", note, ""])


def _seed_means(scores: Mapping[Key, float], tasks: Sequence[str]) -> list[float]:
    """Return the mean over tasks of each seed that has all of them."""
    whole = {s for _, s in scores if all((task, s) in scores for task in tasks)}
    return [statistics.mean(scores[task, s] for task in tasks) for s in sorted(whole)]


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
