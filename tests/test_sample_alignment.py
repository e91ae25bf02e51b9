"""What choosing samples does to Fisher information is measured as it is defined."""

import importlib
import json
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from tests.test_benchmarks import BENCHMARKS


@pytest.fixture
def alignment(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("sample_alignment")


def test_random_samples_vary_as_the_closed_form_says(alignment):
    generator = torch.Generator().manual_seed(0)
    model = alignment.Model.draw(generator)
    for n in (1, 4):
        inputs = model.inputs(generator, 20_000, n)
        estimates = inputs.transpose(1, 2) @ inputs / n
        errors = (estimates - model.fisher).square().sum((1, 2))
        found = float(errors.mean() / model.fisher.square().sum())
        assert found == pytest.approx(alignment.gaussian_variance(n), rel=0.05)


def test_estimates_that_differ_from_the_truth_by_scale_alone(alignment):
    model = alignment.Model.draw(torch.Generator().manual_seed(0))
    found = alignment.judge((3 * model.fisher).expand(5, -1, -1), model.fisher)
    assert found["bias"] == pytest.approx(4.0)
    for name in ("variance", "scaled_variance", "scaled_bias"):
        assert found[name] == pytest.approx(0.0, abs=1e-12)
    assert found["angle"] == pytest.approx(0.0, abs=1e-4)
    assert found["overlap"] == pytest.approx(1.0)


def test_samples_are_sorted_by_their_gradients_on_the_mask(alignment):
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(2, 9, 7, generator=generator, dtype=torch.float64)
    for each, order in zip(gradients, alignment.by_score(gradients), strict=True):
        mask = each.square().sum(0).argsort()[-alignment.KEPT :]
        scores = (each[:, mask] ** 2).sum(1)[order]
        assert_close(scores, scores.sort(descending=True).values)


def test_every_choice_of_samples_is_measured(alignment, tmp_path):
    path = tmp_path / "alignment.json"
    alignment.main(["--seeds", "0", "1", "--repeats", "3", "--output", str(path)])
    results = json.loads(path.read_text("utf-8"))
    rows = {(row["choice"], row["labels"], row["n"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"])
    whole = [rows["random", None, 512], rows["largest", None, 512]]
    assert whole[0]["mean"] == pytest.approx(whole[1]["mean"])
    assert rows["largest", "wrong anywhere", 1]["mean"]["mislabelled"] == 1
    assert rows["random", "right", 8]["mean"]["mislabelled"] == 0
    assert ("trimmed", "right", 512) not in rows
