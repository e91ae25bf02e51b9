"""What a selection tells about itself, in numbers, text and pictures."""

import re
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_ird import Selection
from peft_ird.selection.places import split_names
from peft_ird.selection.schedule import PAPER, Cell, plan_cells
from peft_ird.sparse.storage import load_tensors, save_tensors

matplotlib = pytest.importorskip("matplotlib")
from peft_ird.search.plot import (  # noqa: E402
    draw_selection,
    draw_stages,
    plot_selection,
    plot_stages,
)

# Entry (row, column) or (position,) of each parameter, to be counted by hand.
LAYER = "bert.encoder.layer."
ENTRIES = {
    ("bert.embeddings.words", "weight"): ((5, 4), [(0, 0), (4, 3)]),
    (LAYER + "0.attention.query", "weight"): ((4, 4), [(0, 0), (0, 1), (0, 3)]),
    (LAYER + "0.attention.query", "bias"): ((4,), [(2,)]),
    (LAYER + "0.norm", "weight"): ((4,), [(0,), (3,)]),
    (LAYER + "10.attention.query", "bias"): ((4,), [(0,), (1,)]),
    (LAYER + "1.attention.query", "weight"): ((4, 4), [(0, 2), (1, 2), (2, 2), (3, 1)]),
    ("bert.conv", "weight"): ((2, 1, 3), [(1, 0, 2)]),
}


def build(entries=ENTRIES, **facts) -> Selection:
    indices, shapes = {}, {}
    for (module, name), (shape, positions) in entries.items():
        dense = torch.zeros(shape, dtype=torch.bool)
        for position in positions:
            dense[position] = True
        flat = dense.flatten().nonzero().flatten().int()
        indices.setdefault(module, {})[name] = flat
        shapes.setdefault(module, {})[name] = shape
    return Selection(indices=indices, shapes=shapes, **facts)


STAGES = {
    "stages": (Cell(32, 0.25), Cell(16, 0.25), Cell(16, 0.15)),
    "seconds": (12.345, 3.0, 0.126),
    "peak_bytes": (700 * 2**20, 700 * 2**20, 1800 * 2**20),
    "overlaps": (0.4, 1.0),
    "first_samples": (1, 4, 5),
    "num_candidates": 100,
}


@st.composite
def selections(draw):
    """Entries of three parameters in two modules; those without any are left out."""
    shapes = {("a", "weight"): (3, 4), ("a", "bias"): (3,), ("b", "weight"): (2, 2)}
    entries = {}
    for key, shape in shapes.items():
        numel = torch.Size(shape).numel()
        chosen = draw(st.sets(st.integers(0, numel - 1)))
        if chosen:
            flat = [torch.unravel_index(torch.tensor(i), shape) for i in chosen]
            entries[key] = shape, [tuple(int(x) for x in each) for each in flat]
    return entries


def as_set(entries):
    return {(*key, *at) for key, (_, positions) in entries.items() for at in positions}


@given(selections(), selections())
def test_overlap_is_the_common_share_of_the_smaller_set(one, two):
    mine, theirs = as_set(one), as_set(two)
    smaller = min(len(mine), len(theirs))
    if smaller:
        expected = len(mine & theirs) / smaller
    else:
        expected = 1.0 if mine == theirs else 0.0
    assert build(one).overlap(build(two)) == expected
    assert build(two).overlap(build(one)) == expected
    assert build(one).overlap(build(one)) == 1.0


def test_overlap_needs_the_same_shapes():
    other = build({(LAYER + "0.norm", "weight"): ((6,), [(1,)])})
    match = r"layer\.0\.norm\.weight' has shape \(6,\) there and \(4,\) here"
    with pytest.raises(ValueError, match=match):
        build().overlap(other)
    elsewhere = build({(LAYER + "7.norm", "weight"): ((6,), [(1,)])})
    assert build().overlap(elsewhere) == 0.0


def facts_of(place):
    return place.entries, place.share, place.density, place.rows, place.columns


def test_places_are_what_one_counts_by_hand():
    selection = build()
    assert len(selection) == 15
    query = LAYER + "0.attention.query"
    modules = {name: facts_of(p) for name, p in selection.places().items()}
    assert modules == {
        "bert.embeddings.words": (2, 2 / 15, 2 / 20, 2 / 5, 2 / 4),
        query: (4, 4 / 15, 4 / 20, 1 / 4, 3 / 4),
        LAYER + "0.norm": (2, 2 / 15, 2 / 4, None, None),
        LAYER + "1.attention.query": (4, 4 / 15, 4 / 16, 1.0, 2 / 4),
        LAYER + "10.attention.query": (2, 2 / 15, 2 / 4, None, None),
        "bert.conv": (1, 1 / 15, 1 / 6, None, None),
    }
    parameters = selection.places("parameter")
    assert facts_of(parameters[query + ".weight"]) == (3, 0.2, 3 / 16, 1 / 4, 3 / 4)
    assert facts_of(parameters[query + ".bias"]) == (1, 1 / 15, 1 / 4, None, None)
    kinds = {name: facts_of(p) for name, p in selection.places("kind").items()}
    assert kinds == {
        "embeddings.words": (2, 2 / 15, 2 / 20, 2 / 5, 2 / 4),
        "attention.query": (10, 10 / 15, 10 / 40, 5 / 8, 5 / 8),
        "norm": (2, 2 / 15, 2 / 4, None, None),
        "conv": (1, 1 / 15, 1 / 6, None, None),
    }
    layers = {name: facts_of(p) for name, p in selection.places("layer").items()}
    assert list(layers.items()) == [
        ("0", (6, 6 / 15, 6 / 24, 1 / 4, 3 / 4)),
        ("1", (4, 4 / 15, 4 / 16, 1.0, 2 / 4)),
        ("10", (2, 2 / 15, 2 / 4, None, None)),
        ("outside", (3, 3 / 15, 3 / 26, 2 / 5, 2 / 4)),
    ]


@given(selections())
def test_rows_and_columns_are_those_of_the_dense_mask(entries):
    places = build(entries).places("parameter")
    assert places.keys() == {f"{module}.{name}" for module, name in entries}
    for (module, name), (shape, positions) in entries.items():
        place = places[f"{module}.{name}"]
        assert place.density == len(positions) / torch.Size(shape).numel()
        if len(shape) == 2:
            assert place.rows == len({row for row, _ in positions}) / shape[0]
            assert place.columns == len({column for _, column in positions}) / shape[1]


def test_places_know_only_four_ways_to_sum():
    with pytest.raises(ValueError, match="must be one of 'parameter', 'module'"):
        build().places("head")
    assert build({}).places("layer") == {}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["encoder.block.0.layer.0.q", "decoder.block.2.layer.1.q", "shared"],
            [("encoder.layer.*.q", "0"), ("decoder.layer.*.q", "2"), "shared"],
        ),
        (
            ["model.layers.3.experts.0.up", "model.layers.3.experts.11.up", "lm_head"],
            [("experts.*.up", "3"), ("experts.*.up", "3"), "lm_head"],
        ),
        (
            ["model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1", "model.norm"],
            [("encoder.fc1", "0"), ("decoder.fc1", "0"), "norm"],
        ),
        (["transformer.h.0.ln_1", "transformer.ln_f"], [("ln_1", "0"), "ln_f"]),
        (["0", "2"], [("*", "0"), ("*", "2")]),
        (["bert.pooler.dense"], ["dense"]),
        (["layer1.0.conv1", "layer2.0.conv1"], [("layer1.conv1", "0"),
                                                ("layer2.conv1", "0")]),
    ],
)  # fmt: skip
def test_kinds_and_layers_of_other_models(names, expected):
    split = split_names(names)
    assert [split[name] for name in names] == [
        each if isinstance(each, tuple) else (each, "outside") for each in expected
    ]


def cells_of(line: str) -> list[str]:
    return re.split(r" {2,}", line)


def test_the_summary_has_the_numbers():
    head, stages, kinds, layers = build(**STAGES).summary().split("\n\n")
    assert head == "ird: 15 of 100 entries (15 %) in 6 modules"
    assert [cells_of(line) for line in stages.splitlines()] == [
        ["stage", "samples", "density", "seconds", "peak MiB", "overlap"],
        ["1", "32", "25 %", "12.35", "700", "-"],
        ["2", "16", "25 %", "3.00", "700", "40 %"],
        ["3", "16", "15 %", "0.13", "1,800", "100 %"],
    ]
    assert [cells_of(line) for line in kinds.splitlines()] == [
        ["kind of module", "entries", "share", "density", "rows", "columns"],
        ["attention.query", "10", "66.7 %", "25 %", "62.5 %", "62.5 %"],
        ["embeddings.words", "2", "13.3 %", "10 %", "40 %", "50 %"],
        ["norm", "2", "13.3 %", "50 %", "-", "-"],
        ["conv", "1", "6.67 %", "16.7 %", "-", "-"],
    ]
    found = [cells_of(line) for line in layers.splitlines()]
    assert [row[:2] for row in found[1:]] == [
        ["0", "6"], ["1", "4"], ["10", "2"], ["outside", "3"],
    ]  # fmt: skip
    widths = {len(line) for line in stages.splitlines()}
    assert len(widths) == 1


def test_the_summary_says_what_it_leaves_out():
    many = {(f"m.h.0.kind{i}", "weight"): ((40,), [(j,) for j in range(20 - i)])
            for i in range(15)}  # fmt: skip
    text = build(many).summary()
    assert "kind11" in text
    assert "kind12" not in text
    assert f"and {100 * (8 + 7 + 6) / 195:.3g} % of the entries in 3 more" in text


def test_a_selection_without_facts_has_a_summary_too():
    assert build({}).summary() == "ird: 0 entries in 0 modules"
    partial = build({}, stages=(Cell(0, 0.5),), method="bias").summary()
    assert cells_of(partial.splitlines()[-1]) == ["1", "0", "50 %", "-", "-", "-"]


def test_a_selection_prints_in_one_line():
    expected = "<Selection ird: 15 of 100 entries (15 %) in 6 modules>"
    assert repr(build(**STAGES)) == str(build(**STAGES)) == expected


NEW = ("peak_bytes", "overlaps", "first_samples")


def test_the_facts_of_the_stages_are_saved(tmp_path):
    selection = build(**STAGES)
    selection.save(tmp_path / "selection.safetensors")
    loaded = Selection.load(tmp_path / "selection.safetensors")
    for name in (*NEW, "stages", "seconds", "samples"):
        assert getattr(loaded, name) == getattr(selection, name)
    assert loaded.shapes == selection.shapes
    assert loaded.summary() == selection.summary()
    for by in ("parameter", "module", "kind", "layer"):
        mine, theirs = selection.places(by), loaded.places(by)
        assert list(mine.items()) == list(theirs.items())


def test_a_file_from_before_these_facts_is_read(tmp_path):
    path = tmp_path / "selection.safetensors"
    build(**STAGES).save(path)
    tensors, facts = load_tensors(path)
    for name in NEW:
        del facts[name]
    save_tensors(path, tensors, facts)
    loaded = Selection.load(path)
    assert [getattr(loaded, name) for name in NEW] == [(), (), ()]
    assert len(loaded) == 15


def labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_the_picture_has_a_cell_for_each_kind_and_layer():
    figure = draw_selection(build())
    axes, bar = figure.axes
    (right,) = axes.child_axes
    assert axes.get_title("left") == "Where the 15 selected entries lie"
    kinds = ["embeddings.words", "attention.query", "norm", "conv"]
    assert labels(axes.yaxis) == kinds
    assert labels(right.yaxis) == ["13 %", "67 %", "13 %", "6.7 %"]
    layers = ["0\n40 %", "1\n27 %", "10\n13 %", "outside\n20 %"]
    assert labels(axes.xaxis) == layers
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {
        (3, 0): "2", (0, 1): "4", (1, 1): "4", (2, 1): "2", (0, 2): "2", (3, 3): "1",
    }  # fmt: skip
    assert "rows" in bar.get_ylabel()


def test_colours_are_shares_of_rows_and_grey_without_rows():
    (axes, _) = draw_selection(build()).axes
    colours = {tuple(p.get_center()): p.get_facecolor()[:3] for p in axes.patches}
    viridis = matplotlib.colormaps["viridis"]
    assert colours[0, 1] == pytest.approx(viridis(0.25**0.5)[:3], abs=0.01)
    assert colours[1, 1] == pytest.approx(viridis(1.0)[:3], abs=0.01)
    assert colours[2, 1] == (0.9, 0.9, 0.9)


def test_a_picture_of_biases_has_no_scale():
    biases = {("a.0.x", "bias"): ((4,), [(1,)]), ("a.1.x", "bias"): ((4,), [(3,)])}
    figure = draw_selection(build(biases))
    assert len(figure.axes) == 1


def test_big_numbers_are_shortened():
    entries = {("m.0.x", "weight"): ((2_500, 1_000), [(...,)])}
    (axes, *_) = draw_selection(build(entries)).axes
    assert [text.get_text() for text in axes.texts] == ["2.5 M"]


def test_the_staircase_names_every_stage():
    (axes,) = draw_stages(build(**STAGES)).axes
    assert axes.get_title("left") == "ird: 3 stages, 15.5 s, peak 1,800 MiB"
    assert labels(axes.xaxis) == ["25", "15"]
    assert labels(axes.yaxis) == ["32", "16"]
    texts = {}
    for text in axes.texts:
        at = getattr(text, "xy", None) or text.get_position()
        texts.setdefault(at, []).append(text.get_text())
    assert texts == {
        (0, 0): ["1", "12.3 s"],
        (0, 1): ["2", "3.0 s\noverlap 40 %"],
        (1, 1): ["3", "0.13 s\noverlap 100 %"],
    }
    (legend,) = axes.figure.legends
    assert [t.get_text() for t in legend.texts] == ["fewer samples", "fewer entries"]


WALKS = {
    "paper": PAPER,
    "halving": plan_cells("halving", 128, None, 0.0007, 1e-6),
    "one sample": plan_cells("halving", 1, None, 0.002, 1e-6),
    "falls": [(64, 0.1), (32, 0.1), (16, 0.1), (8, 0.05), (4, 0.01), (1, 0.01)],
    "one": [(0, 0.5)],
}


@pytest.mark.parametrize("walk", WALKS)
def test_no_text_is_cut_or_covers_another(walk):
    cells = tuple(Cell(*cell) for cell in WALKS[walk])
    facts = {"seconds": (123.4,) * len(cells), "overlaps": (1.0,) * (len(cells) - 1)}
    figure = draw_stages(build(stages=cells, **facts))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    texts = [*axes.texts, *axes.xaxis.get_ticklabels(), *axes.yaxis.get_ticklabels()]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) > 2 * len(cells)
    for box in boxes:
        assert figure.bbox.containsx(box.x0)
        assert figure.bbox.containsx(box.x1)
        assert figure.bbox.containsy(box.y0)
        assert figure.bbox.containsy(box.y1)
    assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))


def test_pictures_are_written(tmp_path):
    plot_selection(build(), tmp_path / "selection.png")
    plot_stages(build(**STAGES), str(tmp_path / "stages.svg"))
    assert (tmp_path / "selection.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "stages.svg").read_text()


def test_nothing_is_not_drawn():
    with pytest.raises(ValueError, match="has no entries"):
        draw_selection(build({}))
    with pytest.raises(ValueError, match="has no stages"):
        draw_stages(build())
