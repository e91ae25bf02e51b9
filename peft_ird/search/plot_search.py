"""Pictures of a search: the score of every cell, beside those of another search."""

import math
import os
from collections.abc import Mapping, Sequence

from peft_ird.search.drawing import (
    QUIET,
    Axes,
    Figure,
    Line2D,
    LinearSegmentedColormap,
    Normalize,
    Patch,
    Rectangle,
    ScalarMappable,
    filled,
    quieten,
)
from peft_ird.search.outcome import CellRecord
from peft_ird.search.result import SearchResult
from peft_ird.selection.schedule import Cell

__all__ = ["draw_search", "plot_search"]

_NAMES = {
    "ird": "IRD", "reverse_ird": "Reverse IRD", "fish": "FISH mask",
    "random": "Random mask", "gradient": "Gradient", "magnitude": "Magnitude",
}  # fmt: skip
_GREENS = LinearSegmentedColormap.from_list("greens", ["#e3f2dd", "#7cc07f", "#12632f"])
_RED = "#d62728"
_EMPTY = "0.93"
_TRIANGLES = {"better": "^", "worse": "v"}


def plot_search(
    result: SearchResult,
    path: str | os.PathLike[str],
    counterpart: SearchResult | None = None,
    titles: Sequence[str] | None = None,
    by: str = "score",
) -> None:
    """Write the picture of `draw_search` to a file.

    Args:
        result: The search.
        path: The file; its ending says the format.
        counterpart: The search that it is compared with.
        titles: As for `draw_search`.
        by: As for `draw_search`.
    """
    draw_search(result, counterpart, titles, by).savefig(path, dpi=150)


def draw_search(
    result: SearchResult,
    counterpart: SearchResult | None = None,
    titles: Sequence[str] | None = None,
    by: str = "score",
) -> Figure:
    """Draw the scores of a search as a matrix, as the paper's Fig. 2.

    Samples grow to the right and densities downwards, so that the staircase leads from
    the lower right to the upper left. The darker the green, the higher the score, on
    one scale for both matrices; grey cells were not visited. A red frame marks the
    highest score of all. A triangle says that a cell of the right matrix is better or
    worse than the same cell of the left one. With halving both are only for the cells
    that were trained to the end.

    Args:
        result: The search; on the right if there is another one.
        counterpart: The search on the left, as one of FISH.
        titles: What stands above the matrices, from left to right. Default: the
            methods.
        by: What is drawn: ``"score"``, which cells are chosen by, or ``"reported"``.

    Returns:
        The figure, to be saved or changed.

    Raises:
        ValueError: If ``by`` is something else, or the titles are of another number.
    """
    if by not in {"score", "reported"}:
        raise ValueError(f"`by` must be 'score' or 'reported', got {by!r}.")
    results = [result] if counterpart is None else [counterpart, result]
    names = [_NAMES.get(r.method, r.method) for r in results]
    titles = names if titles is None else list(titles)
    if len(titles) != len(results):
        raise ValueError(
            f"`titles` must be one for each of {len(results)} matrices, got {titles}."
        )
    scores = [_scores(r, by) for r in results]
    cells = sorted({cell for r in results for cell in r.cells})
    columns = sorted({n for n, _ in cells})
    rows = sorted({density for _, density in cells})
    figure = Figure(
        figsize=(1.15 + len(results) * (0.3 + 0.92 * len(columns)),
                 1.55 + 0.66 * len(rows)),
        layout="constrained",
    )  # fmt: skip
    figure.get_layout_engine().set(wspace=0.05)  # type: ignore[union-attr, call-arg]
    matrices = figure.subplots(1, len(results), squeeze=False)[0]
    colours = _colours(scores)
    for axes, each, values, title in zip(
        matrices, results, scores, titles, strict=True
    ):
        _draw_matrix(axes, rows, columns, title)
        for record in each.records:
            place = columns.index(record.cell[0]), rows.index(record.cell[1])
            _draw_cell(axes, place, record, values.get(record.cell), colours)
    finals = [_finals(*pair) for pair in zip(results, scores, strict=True)]
    _frame_maxima(matrices, finals, rows, columns)
    signs = set()
    if counterpart is not None:
        signs = _compare(matrices[1], finals[0], finals[1], rows, columns)
    _explain(figure, signs, titles[0])
    return figure


def _scores(result: SearchResult, by: str) -> dict[Cell, float]:
    found = {
        record.cell: getattr(record.outcome, by)
        for record in result.records
        if record.failure is None and record.outcome is not None
    }
    return {c: s for c, s in found.items() if s is not None and math.isfinite(s)}


def _finals(result: SearchResult, scores: Mapping[Cell, float]) -> dict[Cell, float]:
    """Return the scores of what was trained furthest; without halving that is all."""
    furthest = max((record.rung for record in result.records), default=0)
    last = {r.cell for r in result.records if r.rung == furthest}
    return {cell: score for cell, score in scores.items() if cell in last}


def _colours(scores: Sequence[Mapping[Cell, float]]) -> ScalarMappable:
    values = [score for found in scores for score in found.values()] or [0.0]
    low, high = min(values), max(values)
    if low == high:
        low -= 1.0
    return ScalarMappable(Normalize(low, high), _GREENS)


def _draw_matrix(
    axes: Axes, rows: Sequence[float], columns: Sequence[int], title: str
) -> None:
    """Draw the grid of cells that nobody has visited yet."""
    for column in range(len(columns)):
        for row in range(len(rows)):
            axes.add_patch(_square(column, row, facecolor=_EMPTY, edgecolor="w"))
    axes.set_xlim(-0.52, len(columns) - 0.48)
    axes.set_ylim(len(rows) - 0.48, -0.52)
    axes.set_xticks(range(len(columns)), [f"{n:,}" for n in columns])
    axes.set_yticks(range(len(rows)), [f"{100 * d:.3g}" for d in rows])
    axes.set_xlabel("samples")
    axes.set_title(title, loc="left")
    quieten(axes)
    if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
        axes.set_ylabel("density, %")
    else:
        axes.tick_params(labelleft=False)


def _draw_cell(
    axes: Axes,
    place: tuple[int, int],
    record: CellRecord,
    score: float | None,
    colours: ScalarMappable,
) -> None:
    column, row = place
    if score is None:
        text = "failed" if record.failure else "no score"
        axes.add_patch(
            _square(column, row, facecolor=_EMPTY, edgecolor="0.7", hatch="////", lw=0)
        )
        axes.text(
            column, row, text, color="0.3", ha="center", va="center", size=8,
            bbox={"facecolor": _EMPTY, "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
        return
    colour, ink = filled(colours, score)
    axes.add_patch(_square(column, row, facecolor=colour, edgecolor="w"))
    axes.text(column, row, f"{score:.4f}", color=ink, ha="center", va="center", size=9)


def _frame_maxima(
    matrices: Sequence[Axes],
    finals: Sequence[Mapping[Cell, float]],
    rows: Sequence[float],
    columns: Sequence[int],
) -> None:
    """Frame the highest score."""
    highest = max((s for final in finals for s in final.values()), default=None)
    for axes, final in zip(matrices, finals, strict=True):
        for (samples, density), score in final.items():
            if score == highest:
                axes.add_patch(
                    _square(
                        columns.index(samples), rows.index(density), margin=0.035,
                        fill=False, edgecolor=_RED, linewidth=2.4, gid="maximum",
                    )
                )  # fmt: skip


def _compare(
    axes: Axes,
    left: Mapping[Cell, float],
    right: Mapping[Cell, float],
    rows: Sequence[float],
    columns: Sequence[int],
) -> set[str]:
    """Mark what is better or worse on the right; return which of these there are."""
    signs = set()
    for cell, score in right.items():
        if cell in left and score != left[cell]:
            sign = "better" if score > left[cell] else "worse"
            signs.add(sign)
            at = columns.index(cell.num_samples) + 0.36, rows.index(cell.density) - 0.34
            axes.plot(
                *at, _TRIANGLES[sign], color="w", markeredgecolor="0.15", gid=sign,
                markersize=6, markeredgewidth=0.8,
            )  # fmt: skip
    return signs


def _explain(figure: Figure, signs: set[str], left: str) -> None:
    handles: list[Patch | Line2D] = [
        Patch(fill=False, edgecolor=_RED, linewidth=2, label="highest score"),
        Patch(facecolor=_EMPTY, label="not visited"),
    ]
    handles += [
        Line2D([], [], marker=_TRIANGLES[sign], color="w", markeredgecolor="0.15",
               linestyle="", markersize=6, label=f"{sign} than {left}")
        for sign in _TRIANGLES if sign in signs
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False,
        fontsize=8, labelcolor=QUIET, handlelength=1.1, columnspacing=1.4,
    )  # fmt: skip


def _square(
    column: float, row: float, margin: float = 0.0, **style: object
) -> Rectangle:
    corner, side = (column - 0.5 + margin, row - 0.5 + margin), 1 - 2 * margin
    return Rectangle(corner, side, side, **style)  # type: ignore[arg-type]
