"""Draw which columns of each matrix the quickstart's selected entries touch."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peft_ird.selection.places import layer_order, split_names

Record = dict[str, Any]


def draw(largest: Record, drawn: Record) -> Figure:
    """Draw the columns in use, by kind of module and layer, of two selections.

    Args:
        largest: The content of a result file; its first run is the selection, here of
            the largest entries.
        drawn: That of a selection that draws.
    """
    panels = {
        "the largest entries of each matrix": _places(largest),
        "drawn, the likelier the larger": _places(drawn),
    }
    split = split_names(_places(largest))
    kinds = list(dict.fromkeys(kind for kind, _ in split.values()))
    layers = sorted({layer for _, layer in split.values()}, key=layer_order)
    figure = Figure(figsize=(10.4, 3.7), layout="constrained")
    axes_of = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, places) in zip(axes_of, panels.items(), strict=True):
        cells = {split[name]: place for name, place in places.items()}
        _heat(axes, [[_percent(cells.get((k, n))) for n in layers] for k in kinds])
        axes.set_xticks(range(len(layers)), layers)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set_xlabel("layer")
        axes.set_title(title, loc="left", fontsize=10)
    figure.suptitle(_title(_places(drawn)), x=0.01, ha="left", fontsize=11)
    return figure


def _places(results: Record) -> dict[str, Record]:
    found: dict[str, Record] = results["runs"][0]["places"]
    return found


def _percent(place: Record | None) -> float:
    return np.nan if place is None else 100 * place["columns"]


def _heat(axes: Axes, percents: list[list[float]]) -> None:
    """Draw a number and its colour for each matrix."""
    axes.imshow(percents, cmap="Blues", vmin=0, vmax=115, aspect="auto")
    for row, line in enumerate(percents):
        for column, percent in enumerate(line):
            if not np.isnan(percent):
                axes.text(
                    column, row, f"{percent:.0f}", ha="center", va="center", size=9,
                    color="white" if percent > 60 else "black",
                )  # fmt: skip
    axes.set_xticks(np.arange(len(percents[0]) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(percents) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _title(places: dict[str, Record]) -> str:
    entries = sum(place["entries"] for place in places.values())
    weights = sum(place["entries"] / place["density"] for place in places.values())
    return (
        f"{entries:,} weights chosen by Fisher information, "
        f"{100 * entries / weights:.1f} % of these matrices: columns with one, %"
    )
