"""Draw which part of each matrix the quickstart's selected entries touch."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peft_ird.selection.places import layer_order, split_names

Record = dict[str, Any]
SIDES = {"rows": "rows with a selected entry, %", "columns": "columns with one, %"}


def draw(chosen: Record, at_random: Record) -> Figure:
    """Draw the rows and columns in use, by kind of module and layer.

    Args:
        chosen: The content of a result file; its first run is the selection.
        at_random: That of a random mask of the same size, for the title.
    """
    places = _places(chosen)
    split = split_names(places)
    kinds = list(dict.fromkeys(kind for kind, _ in split.values()))
    layers = sorted({layer for _, layer in split.values()}, key=layer_order)
    cells = {split[name]: place for name, place in places.items()}
    figure = Figure(figsize=(10.4, 3.7), layout="constrained")
    panels = figure.subplots(1, len(SIDES), sharey=True)
    for axes, side in zip(panels, SIDES, strict=True):
        _heat(
            axes, [[_percent(cells.get((k, n)), side) for n in layers] for k in kinds]
        )
        axes.set_xticks(range(len(layers)), layers)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set_xlabel("layer")
        axes.set_title(SIDES[side], loc="left", fontsize=10)
    figure.suptitle(_title(places, _places(at_random)), x=0.01, ha="left", fontsize=11)
    return figure


def _places(results: Record) -> dict[str, Record]:
    found: dict[str, Record] = results["runs"][0]["places"]
    return found


def _percent(place: Record | None, side: str) -> float:
    return np.nan if place is None else 100 * place[side]


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


def _title(places: dict[str, Record], at_random: dict[str, Record]) -> str:
    entries = sum(place["entries"] for place in places.values())
    weights = sum(place["entries"] / place["density"] for place in places.values())
    shares = [100 * place[side] for place in at_random.values() for side in SIDES]
    return (
        f"{entries:,} weights chosen by IRD, {100 * entries / weights:.1f} % of these "
        "matrices, and what they touch; "
        f"at random they would touch {min(shares):.0f} to {max(shares):.0f} %"
    )
