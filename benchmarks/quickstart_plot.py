"""Draw what the quickstart's masks come to, and which columns they touch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peft_ird.selection.places import layer_order, split_names

Record = dict[str, Any]


def draw(
    drawn: Sequence[Record], largest: Sequence[Record], random: Sequence[Record]
) -> Figure:
    """Draw accuracies, and the columns in use by kind of module and layer.

    Args:
        drawn: The results of each seed where entries are drawn; LoRA's are there, too.
        largest: Those of a selection of the largest entries.
        random: Those of a random mask.
    """
    figure = Figure(figsize=(11.4, 3.7), layout="constrained")
    scores, *maps = figure.subplots(1, 3, width_ratios=(2.2, 3, 3))
    _dots(
        scores,
        {
            "random mask": _accuracies(random, "RANDOM"),
            "IRD, drawn, t = 4": _accuracies(drawn, "IRD"),
            "LoRA": _accuracies(drawn, "LoRA"),
            "IRD, largest": _accuracies(largest, "IRD"),
        },
    )
    panels = {
        "columns in use, drawn, %": _places(drawn[0]),
        "columns in use, largest, %": _places(largest[0]),
    }
    split = split_names(_places(largest[0]))
    kinds = list(dict.fromkeys(kind for kind, _ in split.values()))
    layers = sorted({layer for _, layer in split.values()}, key=layer_order)
    for axes, (title, places) in zip(maps, panels.items(), strict=True):
        cells = {split[name]: place for name, place in places.items()}
        _heat(axes, [[_percent(cells.get((k, n))) for n in layers] for k in kinds])
        axes.set_xticks(range(len(layers)), layers)
        axes.set_yticks(range(len(kinds)), kinds if axes is maps[0] else [])
        axes.set_xlabel("layer")
        axes.set_title(title, loc="left", fontsize=10)
    figure.suptitle(_title(_places(drawn[0])), x=0.01, ha="left", fontsize=11)
    return figure


def _accuracies(results: Sequence[Record], method: str) -> list[float]:
    """Return a method's accuracy in percent, one for each seed."""
    runs = [run for each in results for run in each["runs"]]
    return [100 * run["after"] for run in runs if run["method"] == method]


def _dots(axes: Axes, rows: dict[str, list[float]]) -> None:
    """Draw a line of seeds for each method, and their mean."""
    for place, values in enumerate(rows.values()):
        axes.plot(values, [place] * len(values), "o", color=style.BLUE, alpha=0.6)
        axes.plot(np.mean(values), place, "|", color="black", markersize=18)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(right=100)
    axes.set_xlabel("accuracy on new words, %")
    axes.set_title("seeds and their mean", loc="left", fontsize=10)
    style.quieten(axes)


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
        f"Trained with {entries:,} of a model's own weights, "
        f"{100 * entries / weights:.1f} % of its linear layers, or a LoRA of that size"
    )
