"""The benchmarks run on a tiny model, and their contestants agree."""

import argparse
import importlib
import json
import re
from types import ModuleType

import pytest

from tests.conftest import BENCHMARKS


@pytest.fixture
def selection_speed(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("selection_speed")


@pytest.mark.slow
def test_the_speed_table_has_every_part_that_was_run(selection_speed, tmp_path):
    path = tmp_path / "speed.json"
    parts = ["--only", "plain", "engine", "loop", "unpadded", "accuracy"]
    cells = ["--shapes", "tiny", "--lengths", "16", "mixed", "--repeats", "2"]
    selection_speed.main([*parts, *cells, "--samples", "4", "--output", str(path)])
    results = json.loads(path.read_text("utf-8"))
    table = selection_speed.table(results)
    assert "| time, in plain passes, T = 16 |" in table
    assert "one-sample loop, T = 32 to 128, padded to 128 |" in table
    assert "| the same, T = 32 to 128, not padded |" in table
    assert "Opacus" not in table
    assert results["accuracy"]["float64"]["entrywise"] < 1e-9
    assert [cell["samples"] for cell in results["speed"]] == [4, 4]


def test_what_misses_its_bar_is_bold(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bars = importlib.import_module("bars")
    row = bars.rated("title", {"a": 1.2, "b": 1.0}, "{:.1f}", most=1.1)
    assert row == ("title", {"a": "**1.2**", "b": "1.0"}, "≤ 1.1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opacus", "backpack"])
@pytest.mark.filterwarnings("ignore")  # theirs
def test_peers_compute_the_same(selection_speed, name):
    pytest.importorskip(name)
    found = selection_speed.check_peer(name, 0)
    assert all(found[s]["agrees"] for s in selection_speed.PEERS[name].scopes)


@pytest.fixture
def step(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("step")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # peers'
def test_the_step_table_has_every_contestant_and_what_is_refused(step, tmp_path):
    path = tmp_path / "step.json"
    shapes = ["--shapes", "tiny", "tiny-gpt2", "--repeats", "2"]
    step.main([*shapes, "--parts", "speed", "switch", "--output", str(path)])
    results = json.loads(path.read_text("utf-8"))
    bert, gpt2 = (cell["trainees"] for cell in results["speed"])
    assert not [label for label, row in bert.items() if "error" in row]
    failed = {row["name"] for row in gpt2.values() if "error" in row}
    assert failed == {"shira", "supertuning"}  # they know no Conv1D
    entries = bert["ird 0.5 %"]["trained"]
    assert bert["shira 0.5 %"]["trained"] == entries
    assert bert["supertuning 0.5 %"]["trained"] == entries
    assert bert["floor"]["trained"] == 0
    assert bert["floor"]["kept"] < bert["full"]["kept"]
    assert bert["floor"]["kept"] < bert["lora-8"]["kept"]
    assert bert["ird 0.5 %"]["state_bytes"]["all"] >= 4 * 4
    table = step.table(results)
    for mask in ("clustered", "random"):
        assert f"| step, IRD, {mask} mask, 0.5 %, over SHiRA |" in table
    assert "times faster to activate another than LoRA" in table
    step_table = importlib.import_module("step_table")
    only = ["floor", "ird", "lora-8"]
    step.main([
        *shapes, "--parts", "speed", "--densities", "0.02", "--only", *only,
        "--output", str(tmp_path / "more.json"),
    ])  # fmt: skip
    more = json.loads((tmp_path / "more.json").read_text("utf-8"))
    both = step_table.joined(results, more)
    assert set(both["speed"][0]["trainees"]) == {*bert, "ird 2 %"}
    assert both["speed"][0]["trainees"]["floor"] == bert["floor"]
    assert "| step, IRD, clustered mask, 2 %, over LoRA, r = 8 |" in step.table(both)
    plot = importlib.import_module("step_plot")
    plot.draw(results).savefig(tmp_path / "step.png")


@pytest.mark.filterwarnings("ignore")  # peers'
@pytest.mark.parametrize("shape", ["tiny", "tiny-llama"])
@pytest.mark.usefixtures("step")
def test_all_contestants_train_the_same_targets(shape):
    shapes, trainees = (importlib.import_module(n) for n in ("shapes", "trainees"))
    for name in set(trainees.BUILDERS) - {"floor", "bitfit"}:
        model = shapes.build(shapes.SHAPES[shape], 0)
        wanted = set(shapes.targets(model))
        built = trainees.Trainee(name, 0.02).build(model)
        trained = [
            n.removeprefix("base_model.model.")
            for n, p in built.named_parameters()
            if p.requires_grad and p.numel()
        ]
        assert {w for w in wanted for n in trained if n.startswith(f"{w}.")} == wanted
        assert all(any(n.startswith(f"{w}.") for w in wanted) for n in trained), name


@pytest.mark.parametrize("shape", ["tiny", "tiny-gpt2"])
@pytest.mark.usefixtures("step")
def test_a_clustered_mask_uses_few_rows_and_fewer_columns(shape):
    shapes, trainees = (importlib.import_module(n) for n in ("shapes", "trainees"))
    model = shapes.build(shapes.SHAPES[shape], 0)
    first, again = (trainees.clustered(model, 0.005, 3) for _ in range(2))
    first.check()
    for name, module in shapes.targets(model).items():
        flat = first.indices[name]["weight"]
        assert flat.equal(again.indices[name]["weight"])
        rows, columns = flat // module.weight.shape[1], flat % module.weight.shape[1]
        if shape == "tiny-gpt2":
            rows, columns = columns, rows
        assert len(columns.unique()) <= 2 < len(rows.unique())


def test_the_sizes_of_files_are_measured(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    file_size = importlib.import_module("file_size")
    path = tmp_path / "sizes.json"
    arguments = ["--models", "tiny", "--densities", "0.05", "--output", str(path)]
    file_size.main(arguments)
    results = json.loads(path.read_text("utf-8"))
    rows = results["rows"]
    assert "| IRD, float32, random mask | " in file_size.table(results)
    methods = [row["method"] for row in rows]
    assert methods == ["IRD"] * 4 + ["SHiRA", "Super-Tuning"]
    ours = [row["entries"] for row in rows[:4]]
    assert set(ours) == {ours[0]}
    assert rows[1]["bytes"] < rows[0]["bytes"] < rows[5]["bytes"]


def test_all_ways_to_the_gradient_are_timed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    value_gradients = importlib.import_module("value_gradients")
    path = tmp_path / "gradients.json"
    sizes = ["--sides", "64", "160", "--tokens", "32", "--repeats", "2"]
    value_gradients.main([*sizes, "--densities", "0.01", "0.5", "--output", str(path)])
    cells = json.loads(path.read_text("utf-8"))["cells"]
    assert len(cells) == 2 * 2 * 2
    for cell in cells:
        assert set(cell["median_seconds"]) >= {"block", "sampled"}
        assert cell["chosen"] in cell["median_seconds"]
        assert cell["k"] == round(cell["density"] * cell["side"] ** 2)


def test_results_of_a_gpu_have_files_of_their_own(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    record = importlib.import_module("record")

    def name(**given):
        return record.result_file("step", argparse.Namespace(output=None, **given)).name

    assert name(device="cpu") == "step.json"
    assert name(device="cuda:1") == "step-gpu.json"
    given = argparse.Namespace(output=tmp_path / "mine.json", device="cuda")
    assert record.result_file("step", given) == tmp_path / "mine.json"


def test_large_selections_are_timed_and_tabled(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    selection_large = importlib.import_module("selection_large")
    path = tmp_path / "large.json"
    sizes = ["--samples", "4", "--length", "16", "--repeats", "1"]
    shapes = ["--shapes", "tiny", "tiny-llama"]
    selection_large.main([*shapes, *sizes, "--output", str(path)])
    results = json.loads(path.read_text("utf-8"))
    for cell in results["cells"]:
        assert sum(cell["batches"]) == 4
        assert cell["entries"] == round(selection_large.DENSITY * cell["candidates"])
        assert set(cell["over"]) == {"plain", "loop"}
    results["cells"][0]["over"]["plain"] = 1.0
    results["cells"][1]["over"]["plain"] = 1.2
    text = selection_large.table(results)
    assert "| Fisher pass, in plain passes | 1.00 | **1.20** | ≤ 1.1 |" in text


# ---- tables


@pytest.fixture
def tables(monkeypatch, tmp_path) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("tables")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "DOCUMENTS", (tmp_path / "a.md", tmp_path / "b.md"))
    monkeypatch.setattr(module, "TABLES", {"sizes": lambda: "| 1 |\n"})
    return module


def test_tables_are_written_into_each_document_and_stale_ones_are_named(
    tables, tmp_path, capsys
):
    stale = "Text.\n<!-- table: sizes -->\n| 0 |\n<!-- end -->\nMore.\n"
    fresh = stale.replace("| 0 |", "| 1 |")
    (tmp_path / "a.md").write_text(stale, "utf-8")
    (tmp_path / "b.md").write_text(fresh, "utf-8")
    assert tables.main(["--check"]) == 1
    assert capsys.readouterr().out.startswith("a.md is stale;")
    assert (tmp_path / "a.md").read_text("utf-8") == stale
    assert tables.main([]) == 0
    assert (tmp_path / "a.md").read_text("utf-8") == fresh
    assert tables.main(["--check"]) == 0


def test_a_table_that_nothing_makes_is_an_error_before_anything_is_written(
    tables, tmp_path
):
    stale = "<!-- table: sizes -->\n<!-- end -->\n"
    (tmp_path / "a.md").write_text(stale, "utf-8")
    (tmp_path / "b.md").write_text("<!-- table: other -->\n<!-- end -->\n", "utf-8")
    with pytest.raises(ValueError, match="'other'; there are sizes"):
        tables.main([])
    assert (tmp_path / "a.md").read_text("utf-8") == stale


def test_seeds_that_were_run_with_other_options_are_refused(
    tables, tmp_path, monkeypatch
):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for seed, rate in enumerate((0.1, 0.1, 0.2)):
        options = {"ird_lr": rate, "seed": seed, "output_dir": f"{seed}"}
        path = tmp_path / f"quickstart-{seed}.json"
        path.write_text(json.dumps({"options": options}), "utf-8")
    with pytest.raises(ValueError, match=r"quickstart-2\.json.*another ird_lr than"):
        tables.load("quickstart")
    path.unlink()
    assert len(tables.load("quickstart")) == 2


def test_every_table_is_shown_somewhere(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tables = importlib.import_module("tables")
    texts = "".join(path.read_text("utf-8") for path in tables.DOCUMENTS)
    shown = set(re.findall(r"<!-- table: (\S+) -->", texts))
    assert shown == set(tables.TABLES)
