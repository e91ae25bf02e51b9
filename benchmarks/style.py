"""What the figures have in common: colours, and axes that keep quiet."""

from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind can tell apart
BLUE, SKY, GREEN, ORANGE, RED = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00"
QUIET = "0.6"


def quieten(axes: Axes) -> None:
    """Leave only the left and the lower edge, and a faint grid behind the lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(length=0, labelsize=8, colors="0.3")
    axes.grid(color="0.93", linewidth=0.8)
    axes.set_axisbelow(True)
