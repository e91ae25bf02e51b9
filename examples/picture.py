"""The quickstart's picture: where the selected weights lie."""

import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

__all__ = ["draw_selection"]

Places = dict[str, dict[str, float]]
Cells = dict[tuple[int, int], dict[str, float]]


def draw_selection(places: Places, path: Path) -> None:
    """Draw how many entries were selected, and how spread out, by module and layer.

    Args:
        places: By module, the number of selected ``entries`` and the share of the
            weight's ``rows`` that holds one.
        path: The picture.
    """
    kinds, layers, cells = arrange(places)
    size = (3.6 + 0.75 * len(layers), 1.8 + 0.36 * len(kinds))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    shares = np.full((len(kinds), len(layers)), np.nan)
    for at, place in cells.items():
        shares[at] = 100 * place["rows"]
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="white")
    scale = PowerNorm(0.5, 0, 100)
    image = axes.imshow(shares, cmap=colours, norm=scale, aspect="auto")
    for (row, column), place in cells.items():
        colour = "black" if scale(100 * place["rows"]) > 0.6 else "white"
        text = f"{place['entries']:,.0f}"
        axes.text(column, row, text, color=colour, ha="center", va="center", size=8)
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    total = sum(place["entries"] for place in places.values())
    axes.set_title(f"Where the {total:,.0f} selected weights lie", loc="left")
    bar = figure.colorbar(image, ticks=[0, 5, 20, 50, 100])
    bar.set_label("rows of the weight with a selected entry, %")
    figure.savefig(path, dpi=150)


def arrange(places: Places) -> tuple[list[str], list[str], Cells]:
    """Arrange modules by kind and layer; those outside the layers have their own.

    Args:
        places: What is known of each module.

    Returns:
        Names of rows, names of columns, and what is known at (row, column).
    """
    named = {}
    for name, place in places.items():
        # bert.encoder.layer.3.attention.self.query -> layer 3, attention.self.query
        inside = re.search(r"\.(\d+)\.(.+)", name)
        layer, kind = inside.groups() if inside else ("outside", name.partition(".")[2])
        named[kind, layer] = place
    kinds, layers = (list(dict.fromkeys(names)) for names in zip(*named, strict=True))
    layers.sort(key=lambda layer: (layer == "outside", layer.zfill(4)))
    cells = {(kinds.index(k), layers.index(n)): v for (k, n), v in named.items()}
    return kinds, layers, cells
