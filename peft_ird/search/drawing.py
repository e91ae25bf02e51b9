"""What pictures share: matplotlib, if it is there, and how cells and axes look."""

from typing import Any

import numpy as np

try:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "Pictures need matplotlib; run `pip install matplotlib`."
    ) from error

__all__ = [
    "QUIET",
    "Axes",
    "Figure",
    "Line2D",
    "LinearSegmentedColormap",
    "Normalize",
    "Patch",
    "PowerNorm",
    "Rectangle",
    "ScalarMappable",
    "filled",
    "quieten",
]

QUIET = "0.45"  # the colour of what is not to catch the eye
Colour = tuple[float, float, float]


def filled(colours: ScalarMappable, value: float) -> tuple[Colour, str]:
    """Return the colour of a value, and one that text is read in on it.

    Args:
        colours: The scale.
        value: The value.
    """
    red, green, blue, _ = colours.to_rgba(np.array([value]))[0].tolist()
    is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5  # perceived brightness
    return (red, green, blue), "white" if is_dark else "black"


def quieten(axes: Any) -> None:
    """Take the ticks and the frame away.

    Args:
        axes: Axes, also those of a second side.
    """
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
