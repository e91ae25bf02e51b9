"""The picture of a search: what is drawn where."""

import importlib
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from peft_ird import IRDConfig, Outcome, SearchResult
from peft_ird.search.outcome import CellRecord, Failure
from peft_ird.selection.schedule import PAPER, Cell

matplotlib = pytest.importorskip("matplotlib")
from peft_ird.search.plot_search import draw_search, plot_search  # noqa: E402

FISH = [0.9220, 0.9186, 0.9174, 0.9128, 0.9106, 0.9128, 0.9083]
IRD = [0.9220, 0.9163, 0.9162, 0.9174, 0.9117, 0.9128, 0.9071]
BETTER, WORSE = {(16, 0.005), (16, 0.001)}, {(32, 0.025), (32, 0.005), (1, 0.0002)}


def result(scores, method="ird", cells=PAPER):
    """A search; None for a score that failed, a list for the scores of rungs."""
    records = []
    for cell, score in zip(cells, scores, strict=True):
        rungs = score if isinstance(score, list) else [score]
        outcomes = tuple(Outcome(s, s - 0.1) for s in rungs if s is not None)
        failure = Failure("RuntimeError", "no", "") if score is None else None
        records.append(CellRecord(Cell(*cell), 1, outcomes, failure))
    return SearchResult(Path(), IRDConfig(density=0.1, method=method), tuple(records))


def places(axes, cells=PAPER):
    """Return which cell a point of a matrix lies in."""
    columns = sorted({n for n, _ in cells})
    rows = sorted({d for _, d in cells})
    assert [t.get_text() for t in axes.get_xticklabels()] == [str(n) for n in columns]
    return lambda x, y: (columns[round(x)], rows[round(y)])


def marked(axes, name, cells=PAPER):
    """The cells with a frame or triangle of that name."""
    at = places(axes, cells)
    if name == "maximum":
        found = [p.get_center() for p in axes.patches if p.get_gid() == name]
    else:
        found = [p.get_xydata()[0] for p in axes.lines if p.get_gid() == name]
    return [at(*map(float, point)) for point in found]


def texts(axes, cells=PAPER):
    at = places(axes, cells)
    return {at(*t.get_position()): t.get_text() for t in axes.texts}


def colours(axes, cells=PAPER):
    """The colour that is on top in each cell."""
    at = places(axes, cells)
    filled = [p for p in axes.patches if p.get_fill()]
    return {at(*p.get_center()): p.get_facecolor()[:3] for p in filled}


def test_the_papers_example():
    figure = draw_search(result(IRD), result(FISH, "fish"))
    left, right = figure.axes
    assert [a.get_title("left") for a in (left, right)] == ["FISH mask", "IRD"]
    assert texts(left) == {c: f"{s:.4f}" for c, s in zip(PAPER, FISH, strict=True)}
    assert texts(right) == {c: f"{s:.4f}" for c, s in zip(PAPER, IRD, strict=True)}
    assert marked(left, "maximum") == marked(right, "maximum") == [(128, 0.025)]
    assert set(marked(right, "better")) == BETTER
    assert set(marked(right, "worse")) == WORSE
    assert not left.lines
    assert {line.get_marker() for line in right.lines} == {"^", "v"}
    assert left.get_ylim()[0] > left.get_ylim()[1]  # small densities on top
    assert [t.get_text() for t in left.get_yticklabels()] == [
        "0.02",
        "0.1",
        "0.5",
        "2.5",
    ]


def test_higher_scores_are_darker_and_what_was_not_visited_is_grey():
    (axes,) = draw_search(result(IRD)).axes
    found = colours(axes)
    assert len(found) == 16
    light = {cell: sum(colour) for cell, colour in found.items()}
    ranked = sorted(zip(IRD, PAPER, strict=True))
    assert all(
        light[one] > light[two] for (a, one), (b, two) in pairwise(ranked) if a < b
    )
    grey = {colour for cell, colour in found.items() if cell not in PAPER}
    assert len(grey) == 1
    assert len(set(*grey)) == 1
    assert all(green > red for red, green, _ in map(found.__getitem__, PAPER))


def test_one_frame_where_one_is_highest_and_every_frame_at_a_tie():
    (axes,) = draw_search(result([0.1, 0.3, 0.2, 0.3, 0.1, 0.1, 0.3])).axes
    assert marked(axes, "maximum") == [(32, 0.025), (16, 0.005), (1, 0.0002)]
    left, right = draw_search(result(IRD), result([0.5] * 7)).axes
    assert marked(left, "maximum") == []
    assert marked(right, "maximum") == [(128, 0.025)]


def test_a_failed_cell_is_marked_and_compared_with_nothing():
    left, right = draw_search(result([0.9, None, *IRD[2:]]), result(FISH)).axes
    assert texts(right)[32, 0.025] == "failed"
    assert any(p.get_hatch() for p in right.patches)
    assert not any(p.get_hatch() for p in left.patches)
    assert (32, 0.025) not in marked(right, "worse")


@pytest.mark.parametrize("reported", [float("nan"), float("inf")])
def test_a_reported_score_that_is_no_number_is_left_out(reported):
    (axes,) = draw_search(result([reported, *IRD[1:]]), by="reported").axes
    (failed,) = draw_search(result([None, *IRD[1:]]), by="reported").axes
    assert texts(axes) == {**texts(failed), (128, 0.025): "no score"}
    assert colours(axes) == colours(failed)
    assert marked(axes, "maximum") == [(16, 0.005)]


def test_with_halving_only_the_last_rung_can_be_highest():
    scores = [[0.9], [0.5, 0.7], [0.6, 0.6]]
    cells = [(8, 0.1), (4, 0.1), (4, 0.05)]
    (axes,) = draw_search(result(scores, cells=cells)).axes
    assert marked(axes, "maximum", cells) == [(4, 0.1)]


def test_with_halving_only_what_was_trained_to_the_end_is_compared():
    cells = [(8, 0.1), (4, 0.1), (4, 0.05)]
    halved = result([[0.9], [0.5, 0.7], [0.6, 0.8]], cells=cells)
    whole = result([0.8, 0.6, 0.9], cells=cells)
    other = result([[0.1, 0.9], [0.1, 0.6], [0.1]], cells=cells)
    for counterpart, worse in ((whole, [(4, 0.05)]), (other, [])):
        axes = draw_search(halved, counterpart).axes[1]
        assert marked(axes, "better", cells) == [(4, 0.1)]
        assert marked(axes, "worse", cells) == worse


def test_searches_of_other_cells_share_one_grid():
    other = [(64, 0.05), (128, 0.025)]
    figure = draw_search(result([0.5, 0.1], cells=other), result(FISH))
    cells = [*other, *PAPER]
    assert all(len(colours(axes, cells)) == 25 for axes in figure.axes)
    assert marked(figure.axes[1], "worse", cells) == [(128, 0.025)]
    assert not marked(figure.axes[1], "better", cells)


def test_titles_and_the_reported_score_can_be_drawn():
    figure = draw_search(
        result(IRD), result(FISH, "fish"), titles=("IRD", "in reverse"), by="reported"
    )
    left, right = figure.axes
    assert [a.get_title("left") for a in (left, right)] == ["IRD", "in reverse"]
    assert texts(right)[128, 0.025] == "0.8220"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"by": "loss"}, "`by` must be"), ({"titles": ["a", "b"]}, "one for each of 1")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        draw_search(result(IRD), **options)


@pytest.mark.parametrize("scores", [[0.5] * 7, [None] * 7, [-3.0] * 6 + [None]])
def test_any_scores_can_be_drawn(scores, tmp_path):
    plot_search(result(scores), tmp_path / "a.png", result(FISH))
    result(scores).plot(tmp_path / "b.svg")
    assert (tmp_path / "a.png").stat().st_size > 0
    assert (tmp_path / "b.svg").stat().st_size > 0


@pytest.mark.parametrize("name", ["plot", "plot_search"])
def test_without_matplotlib_it_is_said_how_to_get_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "peft_ird.search.drawing")
    monkeypatch.delitem(sys.modules, f"peft_ird.search.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError, match="run `pip install matplotlib`"):
        importlib.import_module(f"peft_ird.search.{name}")


@pytest.mark.slow
def test_the_package_does_not_import_matplotlib():
    code = "import sys, peft_ird; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
