"""Pictures of a selection: where its entries lie, and the stages that led to it."""

import os
from itertools import pairwise

from peft_ird.search.drawing import (
    QUIET,
    Axes,
    Figure,
    PowerNorm,
    Rectangle,
    ScalarMappable,
    filled,
    quieten,
)
from peft_ird.selection.places import Place, find_places, split_names
from peft_ird.selection.selection import Selection

__all__ = ["draw_selection", "draw_stages", "plot_selection", "plot_stages"]

Point = tuple[int, int]

# Okabe and Ito's colours, which the colour-blind can tell apart
_STEPS = {
    "fewer samples": "#0072B2",
    "fewer entries": "#D55E00",
    "fewer of both": "#009E73",
}
_FALLS = [("fewer samples", "fewer samples"), ("fewer samples", "fewer of both")]


def plot_selection(selection: Selection, path: str | os.PathLike[str]) -> None:
    """Write the picture of `draw_selection` to a file.

    Args:
        selection: The selection.
        path: The file; its ending says the format.
    """
    draw_selection(selection).savefig(path, dpi=150)


def plot_stages(selection: Selection, path: str | os.PathLike[str]) -> None:
    """Write the picture of `draw_stages` to a file.

    Args:
        selection: The selection.
        path: The file; its ending says the format.
    """
    draw_stages(selection).savefig(path, dpi=150)


def draw_selection(selection: Selection) -> Figure:
    """Draw how many entries were selected, and how spread out, by kind and layer.

    A cell has the number of entries; its colour is the share of the rows of the weights
    that hold one, grey where no entry lies in a 2-D weight. The shares of the budget
    stand on the right and below.

    Args:
        selection: The selection.

    Returns:
        The figure, to be saved or changed.

    Raises:
        ValueError: If the selection is empty.
    """
    if not len(selection):
        raise ValueError("`selection` has no entries; there is nothing to draw.")
    split = split_names(selection.indices)
    cells = find_places(selection.indices, selection.shapes, lambda m, _: split[m])
    kinds, layers = selection.places("kind"), selection.places("layer")
    width, height = 4.8 + 0.75 * len(layers), max(2.6, 1.5 + 0.36 * len(kinds))
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    rows, columns = list(kinds), list(layers)
    colours = ScalarMappable(PowerNorm(0.5, 0, 100), "viridis")
    for (kind, layer), place in cells.items():
        _draw_cell(axes, columns.index(layer), rows.index(kind), place, colours)
    _label_cells(axes, kinds, layers)
    axes.set_title(f"Where the {len(selection):,} selected entries lie", loc="left")
    if any(place.rows is not None for place in cells.values()):
        bar = figure.colorbar(
            colours, ax=axes, ticks=[0, 5, 20, 50, 100], aspect=7 * height,
            fraction=0.3 / width, pad=0.15 / width,
        )  # fmt: skip
        bar.set_label("rows of the weight\nwith a selected entry, %")
        bar.outline.set_visible(False)
    return figure


def draw_stages(selection: Selection) -> Figure:
    """Draw the stages as a staircase, from many samples and entries to few.

    Each density has a column and each number of samples a row, evenly spaced. A stage
    has its number, its seconds and its overlap with the stage before, where known.

    Args:
        selection: The selection.

    Returns:
        The figure, to be saved or changed.

    Raises:
        ValueError: If the selection has no stages.
    """
    stages = selection.stages
    if not stages:
        raise ValueError("`selection` has no stages; there is nothing to draw.")
    samples = sorted({cell.num_samples for cell in stages}, reverse=True)
    densities = sorted({cell.density for cell in stages}, reverse=True)
    size = (2.0 + 0.95 * len(densities), 1.6 + 0.66 * len(samples))
    figure = Figure(figsize=(max(4.5, size[0]), size[1]), layout="constrained")
    axes = figure.add_subplot()
    points = [(densities.index(d), samples.index(n)) for n, d in stages]
    steps = [_step(before, after) for before, after in pairwise(points)]
    _draw_steps(axes, points, steps)
    for i, around in enumerate(pairwise(["", *steps, ""])):
        _draw_stage(axes, i + 1, points[i], around, _facts(selection, i))
    axes.set_xlim(-0.7, len(densities) - 0.3)
    axes.set_ylim(len(samples) - 0.3, -0.7)
    axes.set_xticks(range(len(densities)), [f"{100 * d:.3g}" for d in densities])
    axes.set_yticks(range(len(samples)), [f"{n:,}" for n in samples])
    axes.set_xlabel("density, %")
    axes.set_ylabel("samples")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    quieten(axes)
    if len(stages) > 1:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    axes.set_title(_stages_title(selection), loc="left")
    return figure


def _draw_cell(
    axes: Axes, column: int, row: int, place: Place, colours: ScalarMappable
) -> None:
    colour, ink = (0.9, 0.9, 0.9), "black"
    if place.rows is not None:
        colour, ink = filled(colours, 100 * place.rows)
    corner = (column - 0.5, row - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="w"))
    text = _short(place.entries)
    axes.text(column, row, text, color=ink, ha="center", va="center", size=8)


def _label_cells(axes: Axes, kinds: dict[str, Place], layers: dict[str, Place]) -> None:
    """Name rows and columns, each with its share of the budget."""
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    names = [f"{layer}\n{_percent(place.share)}" for layer, place in layers.items()]
    axes.set_xticks(range(len(layers)), names)
    axes.set_yticks(range(len(kinds)), list(kinds))
    axes.set_xlabel("layer, and its share of the entries")
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(kinds)), [_percent(p.share) for p in kinds.values()])
    for side in (axes, right):
        quieten(side)
    right.tick_params(colors=QUIET)
    right.set_ylabel("share of the entries", color=QUIET)


def _draw_steps(axes: Axes, points: list[Point], steps: list[str]) -> None:
    for i, ends in enumerate(pairwise(points)):
        step = steps[i]
        label = step if steps.index(step) == i else None  # once in the legend
        axes.plot(
            *zip(*ends, strict=True), color=_STEPS[step], linewidth=2, label=label
        )


def _step(before: Point, after: Point) -> str:
    if before[0] == after[0]:
        return "fewer samples"
    return "fewer entries" if before[1] == after[1] else "fewer of both"


def _draw_stage(
    axes: Axes, number: int, point: Point, steps: tuple[str, str], facts: str
) -> None:
    """Mark a stage; what is known of it stands where no line runs."""
    axes.plot(*point, "o", color="0.2", markersize=15)
    axes.text(*point, str(number), color="w", ha="center", va="center_baseline", size=8)
    came, goes = steps
    if came == "fewer of both" or (came, goes) in _FALLS:
        offset, across, along = (8, 6), "left", "bottom"
    elif came == "fewer samples":
        offset, across, along = (0, -11), "center", "top"
    else:
        offset, across, along = (0, 11), "center", "bottom"
    axes.annotate(
        facts, point, xytext=offset, textcoords="offset points", ha=across, va=along,
        size=8,
    )  # fmt: skip


def _facts(selection: Selection, i: int) -> str:
    lines = []
    if i < len(selection.seconds):
        lines.append(_duration(selection.seconds[i]))
    if 0 < i <= len(selection.overlaps):
        lines.append(f"overlap {_percent(selection.overlaps[i - 1])}")
    return "\n".join(lines)


def _stages_title(selection: Selection) -> str:
    number = len(selection.stages)
    parts = [f"{selection.method}: {number} stage{'s' if number > 1 else ''}"]
    if selection.seconds:
        parts.append(_duration(sum(selection.seconds)))
    if selection.peak_bytes:
        parts.append(f"peak {max(selection.peak_bytes) / 2**20:,.0f} MiB")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds:.2f} s"


def _short(number: int) -> str:
    """Write a number in at most seven characters, where it has under 13 digits."""
    for unit, name in ((10**9, "G"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else "100 %"
