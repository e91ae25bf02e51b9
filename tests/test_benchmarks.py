"""The benchmarks run on a tiny model, and their contestants agree."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def selection_speed(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("selection_speed")


@pytest.mark.slow
def test_the_speed_table_has_every_part_that_was_run(selection_speed, tmp_path):
    path = tmp_path / "speed.json"
    parts = ["--only", "plain", "engine", "loop", "accuracy"]
    cells = ["--shapes", "tiny", "--lengths", "16", "mixed", "--repeats", "2"]
    selection_speed.main([*parts, *cells, "--samples", "4", "--output", str(path)])
    results = json.loads(path.read_text("utf-8"))
    table = selection_speed.table(results)
    assert "| time, in plain passes, T = 16 |" in table
    assert "| times faster than a one-sample loop, T = 32 to 128 |" in table
    assert "Opacus" not in table
    assert results["accuracy"]["float64"]["entrywise"] < 1e-9
    assert [cell["samples"] for cell in results["speed"]] == [4, 4]


def test_what_misses_its_bar_is_bold(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    speed_table = importlib.import_module("speed_table")
    row = speed_table._row("title", {"a": 1.2, "b": 1.0}, "{:.1f}", most=1.1)
    assert row == ("title", {"a": "**1.2**", "b": "1.0"}, "≤ 1.1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opacus", "backpack"])
@pytest.mark.filterwarnings("ignore")  # theirs
def test_peers_compute_the_same(selection_speed, name):
    pytest.importorskip(name)
    found = selection_speed.check_peer(name, 0)
    assert all(found[s]["agrees"] for s in selection_speed.PEERS[name].scopes)
