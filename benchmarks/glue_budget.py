"""Draw where the budget of each method goes in the GLUE experiments."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from experiment import Experiment
from glue_table import chosen
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Result = dict[str, Any]

DENSITY = 0.001
MOST_KINDS = 8


def draw(results: Sequence[Result]) -> Figure:
    """Draw each method's shares of the budget, by layer and by kind of module.

    Shares are means over tasks and seeds; only methods that select are drawn.

    Args:
        results: All runs of an experiment.

    Raises:
        ValueError: If there are no results.
    """
    if not results:
        raise ValueError("There are no results; run benchmarks/glue_runs.py.")
    experiment = Experiment.load(results[0]["job"]["experiment"])
    found = chosen(experiment, DENSITY, [r for r in results if r["selection"]])
    rows = [*found]
    shares = {
        by: {row: _shares(found[row].values(), by) for row in rows}
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
    most = {name: max(e.get(name, 0) for e in shares.values()) for name in names}
    return sorted(names, key=lambda name: (-most[name], name))[:MOST_KINDS]


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
    short = [n.removeprefix("attention.self.").removesuffix(".dense") for n in names]
    axes.set_xticks(range(len(names)), short, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(shares)), [row.replace("`", "") for row in shares])
    axes.set_title(f"share of the budget by {title}, %", loc="left", fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
