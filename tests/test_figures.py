"""README's figures are drawn from its results, and it shows when they are not."""

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from tests.test_benchmarks import BENCHMARKS

pytest.importorskip("matplotlib")


@pytest.fixture
def plots(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("plots")


@pytest.fixture
def results(plots, tmp_path) -> Path:
    """Return a folder with all results that are drawn, and fresh figures of them."""
    drawn = shutil.ignore_patterns("*.png")
    shutil.copytree(plots.RESULTS, tmp_path, dirs_exist_ok=True, ignore=drawn)
    assert plots.main(["--results", str(tmp_path)]) == 0
    return tmp_path


def edit(path: Path) -> None:
    content = json.loads(path.read_text("utf-8"))
    content["edited"] = True
    path.write_text(json.dumps(content), "utf-8")


def test_figures_are_fresh_until_their_results_change(plots, results, capsys):
    check = ["--check", "--results", str(results)]
    assert plots.main(check) == 0
    (results / "step.json").write_text(
        json.dumps(json.loads((results / "step.json").read_text("utf-8"))), "utf-8"
    )
    assert plots.main(check) == 0  # the same content, laid out otherwise
    capsys.readouterr()
    edit(results / "step.json")
    assert plots.main(check) == 1
    assert capsys.readouterr().out.startswith("step.png is stale")
    assert plots.main(["--results", str(results)]) == 0
    assert capsys.readouterr().out == "step.png is drawn\n"
    assert plots.main(check) == 0


def test_a_figure_is_stale_if_it_is_missing_or_from_elsewhere(plots, results, capsys):
    (results / "step.png").unlink()
    shutil.copy(results / "quickstart.png", results / "sample-alignment.png")
    assert plots.main(["--check", "--results", str(results)]) == 1
    stale = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert stale == {"step.png", "sample-alignment.png"}


def test_a_figure_is_stale_if_its_code_changes(plots, results, monkeypatch, tmp_path):
    (picture,) = (p for p in plots.PICTURES if p.name == "step")
    code = Path(picture.code[0].__file__)
    changed = tmp_path / "changed.py"
    changed.write_text(code.read_text("utf-8") + "# changed\n", "utf-8")
    assert picture.is_fresh(results)
    monkeypatch.setattr(picture.code[0], "__file__", str(changed))
    assert not picture.is_fresh(results)
