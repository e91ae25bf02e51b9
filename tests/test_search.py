"""The search: its cells, its folder, and what it makes of what evaluations return."""

import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch
from filelock import FileLock
from peft import PeftModel, get_peft_model
from torch.testing import assert_close

from peft_ird import (
    Calibration,
    IRDConfig,
    Outcome,
    SearchResult,
    SuccessiveHalving,
    search,
    select_parameters,
)
from peft_ird.__main__ import main
from peft_ird.search import folder
from peft_ird.search.halving import survivors
from peft_ird.search.outcome import CellRecord, name_of
from peft_ird.search.workers import Workers, _only_visible
from peft_ird.selection.gradients.ranks import Ranks
from peft_ird.selection.schedule import Cell
from tests.conftest import make_batch, make_model, make_samples

CELLS = [(8, 0.1), (4, 0.1), (4, 0.03), (2, 0.03)]
MODEL = partial(make_model, "bert")


def config(**options):
    options = {"density": 0.03, "schedule": CELLS, **options}
    return IRDConfig(task_type="SEQ_CLS", **options)


def values(model):
    return [p for n, p in model.named_parameters() if "irdelta_values" in n]


class Evaluate:
    """Scores by the number of entries, and notes what it was called for."""

    def __init__(self, fails=(), interrupts=(), trains=False, score=None):
        self.fails, self.interrupts, self.trains = fails, interrupts, trains
        self.score = score
        self.calls = []

    def __call__(self, model):
        number = len(self.calls)
        self.calls.append(sum(v.numel() for v in values(model)))
        if number in self.interrupts:
            raise KeyboardInterrupt
        if number in self.fails:
            raise RuntimeError("out of luck")
        if self.trains:
            with torch.no_grad():
                for value in values(model):
                    value += torch.rand(())  # every cell has the same chance
        return float(self.calls[-1]) if self.score is None else self.score


def run(folder, evaluate, settings=None, data=None, **options):
    data = Calibration(make_samples("bert")) if data is None else data
    settings = settings or config()
    return search(MODEL, settings, data, evaluate, folder, **options)


def same_entries(one, two):
    return len(one) == len(two) and all(
        torch.equal(one.indices[m][n], indices)
        for m, named in two.indices.items()
        for n, indices in named.items()
    )


OPTIONS = (
    "method", "nested", "num_ranked_samples", "sample_score", "scope", "trim_samples",
)  # fmt: skip
SETTINGS = {
    "list": config(),
    "reverse": config(method="reverse_ird"),
    "nested": config(nested=True, sample_score="all"),
    "halving": config(schedule="halving", num_samples=8, initial_density=0.1),
    "budget": config(
        schedule="halving", num_samples=8, initial_density=0.1, density=None, budget=99
    ),
    "ranked": config(num_ranked_samples=11, trim_samples=0.2),
    "per module": config(scope="per_module"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_cells_are_what_a_schedule_that_ends_there_selects(tmp_path, settings):
    data = Calibration(make_samples("bert"))
    result = run(tmp_path, Evaluate(), settings, data)
    assert len(result.cells) > 3
    pairs = zip(result.cells, result.selections, strict=True)
    for number, (cell, found) in enumerate(pairs):
        is_last = number == len(result.cells) - 1
        alone = IRDConfig(
            task_type="SEQ_CLS",
            density=None if is_last and settings.budget else cell.density,
            budget=settings.budget if is_last else None,
            schedule=list(result.cells[: number + 1]),
            **{name: getattr(settings, name) for name in OPTIONS},
        )
        expected = select_parameters(MODEL(), alone, data)
        assert same_entries(found, expected)
        assert found.samples == expected.samples
        assert found.stages == expected.stages == result.cells[: number + 1]
        assert found.overlaps == expected.overlaps
        assert found.first_samples == expected.first_samples
        assert_close(found.sample_scores, expected.sample_scores)
        assert len(found.seconds) == number + 1
        assert len(found) == result.records[number].entries


@pytest.mark.parametrize("method", ["fish", "gradient", "random", "magnitude"])
def test_other_methods_select_every_cell_by_themselves(tmp_path, method):
    data = Calibration(make_samples("bert"))
    result = run(tmp_path, Evaluate(), config(method=method, seed=3), data)
    cells = CELLS
    if method in ("random", "magnitude"):  # samples are nothing to them
        densities = [density for _, density in CELLS]
        cells = [c for n, c in enumerate(CELLS) if c[1] not in densities[:n]]
        assert len(cells) < len(CELLS)
        few = run(tmp_path / "few", Evaluate(), config(method=method), data._rows()[:2])
        assert list(few.cells) == cells
    assert list(result.cells) == cells
    for (samples, density), found in zip(cells, result.selections, strict=True):
        alone = IRDConfig(
            task_type="SEQ_CLS", method=method, seed=3, num_samples=samples,
            density=density,
        )  # fmt: skip
        expected = select_parameters(MODEL(), alone, data)
        assert same_entries(found, expected)
        assert found.samples == expected.samples


def test_the_papers_schedule_is_walked_to_its_end(tmp_path):
    data = make_samples("bert", 128)
    settings = config(schedule="paper", density=0.0002)
    result = run(tmp_path, Evaluate(), settings, data)
    assert result.cells[0] == (128, 0.025)
    assert result.cells[-1] == (1, 0.0002)
    assert len(result.cells) == 7


def test_the_best_cell_has_the_best_score(tmp_path):
    result = run(tmp_path, Evaluate(trains=True))
    assert result.scores == tuple(float(len(s)) for s in result.selections)
    assert result.best.cell == (4, 0.1)  # as good as (8, 0.1), from fewer samples
    assert "*        4     10 %" in result.table()


def records(*rows):
    return tuple(CellRecord(Cell(n, d), 1, (Outcome(score),)) for n, d, score in rows)


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([(8, 0.1, 0.5), (4, 0.1, 0.6), (4, 0.03, 0.4)], (4, 0.1)),
        ([(8, 0.1, 0.6), (4, 0.1, 0.6), (4, 0.03, 0.6), (2, 0.03, 0.6)], (2, 0.03)),
        ([(8, 0.1, 0.6), (8, 0.03, 0.6), (4, 0.03, 0.5)], (8, 0.03)),
    ],
)
def test_ties_go_to_the_smaller_density_and_then_to_fewer_samples(rows, best, tmp_path):
    assert SearchResult(tmp_path, config(), records(*rows)).best.cell == best


def test_an_interrupted_search_repeats_nothing(tmp_path, monkeypatch):
    module, walks = sys.modules[search.__module__], []
    walk = module.select_cells
    monkeypatch.setattr(
        module, "select_cells", lambda *args: walks.append(1) or walk(*args)
    )
    first = Evaluate(interrupts=[2])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, first)
    halfway = SearchResult.load(tmp_path)
    assert [score is None for score in halfway.scores] == [False, False, True, True]
    second = Evaluate()
    result = run(tmp_path, second)
    assert first.calls[:2] + second.calls == [len(s) for s in result.selections]
    assert walks == [1]
    third = Evaluate()
    assert run(tmp_path, third).scores == result.scores
    assert third.calls == []
    assert SearchResult.load(tmp_path).records == result.records


def test_a_walk_that_was_interrupted_is_walked_again(tmp_path):
    whole = run(tmp_path / "whole", Evaluate())
    run(tmp_path / "cut", Evaluate())
    (tmp_path / "cut" / "cell-03" / "selection.safetensors").unlink()
    with pytest.raises(ValueError, match="before its cells were selected"):
        SearchResult.load(tmp_path / "cut")
    again = run(tmp_path / "cut", Evaluate())
    assert again.scores == whole.scores


def test_a_failing_cell_is_noted_and_tried_again(tmp_path, capsys):
    result = run(tmp_path, Evaluate(fails=[1]))
    assert [score is None for score in result.scores] == [False, True, False, False]
    (failure,) = result.errors.values()
    assert (failure.type, failure.message) == ("RuntimeError", "out of luck")
    assert 'raise RuntimeError("out of luck")' in failure.traceback
    assert result.best.cell == (8, 0.1)
    assert "failed" in result.table()
    main(["inspect", str(tmp_path)])
    line = "4 samples at density 0.1 failed: RuntimeError: out of luck\n"
    assert capsys.readouterr().out.endswith(line)
    again = Evaluate()
    result = run(tmp_path, again)
    assert len(again.calls) == 1
    assert not result.errors
    assert result.best.cell == (4, 0.1)


def test_a_failure_is_told_when_it_happens(tmp_path, caplog):
    told = []

    class Listening(Evaluate):
        def __call__(self, model):
            told.append(len(caplog.records))
            return super().__call__(model)

    run(tmp_path, Listening(fails=[1]))
    assert told == [0, 0, 1, 1]
    message = (
        "The cell of 4 samples and density 0.1 failed: RuntimeError: out of luck. "
    )
    assert caplog.messages[0].startswith(message)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), "good", None])
def test_a_score_that_is_no_number_is_a_failure(tmp_path, score):
    def evaluate(_):
        return score

    result = run(tmp_path, evaluate, config(schedule=[(8, 0.03)]))
    assert len(result.errors) == 1
    with pytest.raises(ValueError, match=r"No cell has a score\. The first error: "):
        _ = result.best


def test_other_versions_of_libraries_are_told(tmp_path, monkeypatch, caplog):
    run(tmp_path, Evaluate())
    run(tmp_path, Evaluate())
    assert not caplog.messages
    monkeypatch.setattr(folder, "versions", lambda: {"torch": "9.9"})
    run(tmp_path, Evaluate())
    assert "goes on with {'torch': '9.9'}" in caplog.text


def test_a_search_with_other_settings_is_refused(tmp_path):
    run(tmp_path, Evaluate())
    message = "nested is False there, True here"
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path, Evaluate(), config(nested=True, seed=1))
    assert "seed is 0 there, 1 here" in str(error.value)
    with pytest.raises(ValueError, match=r"data\.digest is"):
        run(tmp_path, Evaluate(), data=make_samples("bert", seed=1))
    with pytest.raises(ValueError, match=r"data\.samples is 12 there, 13 here"):
        run(tmp_path, Evaluate(), data=make_samples("bert", 13))
    with pytest.raises(ValueError, match="seed a new head inside it"):
        search(
            partial(make_model, "bert", seed=1), config(), make_samples("bert"),
            Evaluate(), tmp_path,
        )  # fmt: skip


class Described(Evaluate):
    def settings(self):
        return {"rate": self.score, "names": {"b", "a"}}


def test_two_searches_in_one_folder(tmp_path):
    class Impatient(Evaluate):
        def __call__(self, model):
            with pytest.raises(RuntimeError, match="Another search runs in"):
                run(tmp_path, Evaluate())
            return super().__call__(model)

    result = run(tmp_path, Impatient())
    assert not any(record.failure for record in result.records)
    run(tmp_path, Impatient())  # free again


def test_the_settings_of_the_evaluation_count(tmp_path):
    run(tmp_path, Described(score=0.5))
    assert len(run(tmp_path, Described(score=0.5)).cells) == 4
    with pytest.raises(ValueError, match=r"evaluate.rate is 0.5 there, 0.6 here"):
        run(tmp_path, Described(score=0.6))


def test_a_digest_tells_sizes_and_arrays():
    constant = [Calibration([{"x": 1}] * size).digest() for size in (1601, 1615)]
    assert constant[0] != constant[1]
    arrays = [Calibration([{"x": np.full(3, value)}]).digest() for value in (1, 1, 2)]
    assert arrays[0] == arrays[1] != arrays[2]
    numbers = [Calibration([{"x": np.int64(value)}]).digest() for value in (1, 2)]
    assert numbers[0] != numbers[1]


def one_way(_):
    return 1.0


def another_way(_):
    return 2.0


def test_functions_count_by_their_names(tmp_path):
    data = {"data": make_samples("bert")}
    run(tmp_path, one_way, **data)
    with pytest.raises(ValueError, match=r"evaluate\.name is '.*one_way' there"):
        run(tmp_path, another_way, **data)
    with pytest.raises(ValueError, match=r"data\.loss is None there, '.*one_way' here"):
        run(tmp_path, one_way, data=Calibration(data["data"], loss=one_way))
    with pytest.raises(ValueError, match=r"data\.collate_fn is None there"):
        run(tmp_path, one_way, data=Calibration(data["data"], partial(one_way)))


def scaled(_, rate, sizes=(), start=None):  # noqa: ARG001 (only its name counts)
    return rate


def test_what_partial_functions_were_given_counts(tmp_path):
    run(tmp_path, partial(scaled, rate=1.0, sizes=[1, 2], start=one_way))
    same = partial(scaled, start=one_way, rate=1.0, sizes=[1, 2])
    assert set(run(tmp_path, same).scores) == {1.0}
    changes = [{"rate": 2.0}, {"sizes": [1, 3]}, {"start": another_way}]
    changes += [{"sizes": {"a": torch.float16}}, {"start": Path("a")}]
    for change in changes:
        with pytest.raises(ValueError, match=r"evaluate\.name is '.*scaled\(.*there"):
            run(tmp_path, partial(same, **change))


def test_names_of_partial_functions_tell_them_apart():
    types = [name_of(partial(scaled, a)) for a in (torch.float16, torch.bfloat16)]
    assert types[0] != types[1]
    same = [{"a": np.int64(1), "b": 2.0}, {"b": 2.0, "a": 1}]
    assert len({name_of(partial(scaled, tree)) for tree in same}) == 1
    rows = [{"text": "word " * 50, "number": i} for i in range(100)]
    long = [name_of(partial(scaled, each)) for each in (rows, rows[1:])]
    assert long[0] != long[1]
    assert all(len(name) < 200 for name in long)


def test_a_search_that_could_not_select_leaves_its_place(tmp_path):
    with pytest.raises(ValueError, match="200"):
        run(tmp_path, Evaluate(), config(num_ranked_samples=200))
    result = run(tmp_path, Evaluate(), config(num_ranked_samples=12))
    assert None not in result.scores


def test_a_model_that_is_drawn_anew_is_refused(tmp_path):
    seeds = iter(range(100))
    with pytest.raises(ValueError, match="same weights each time"):
        search(
            lambda: make_model("bert", next(seeds)), config(), make_samples("bert"),
            Evaluate(), tmp_path,
        )  # fmt: skip


def test_every_cell_starts_from_the_same_random_state(tmp_path):
    draws = []
    state = torch.get_rng_state()
    run(tmp_path, lambda _: draws.append(torch.rand(3).tolist()) or 1.0)
    assert len(draws) == 4
    assert draws[0] == draws[1] == draws[3]
    assert torch.equal(torch.get_rng_state(), state)


def test_outcomes_are_kept_whole(tmp_path):
    given = Outcome(0.5, 0.25, 12.5, 100, {"eval_f1": 0.75, "note": "odd"}, True)
    result = run(tmp_path, lambda _: given)
    assert set(map(repr, result.outcomes)) == {repr(given)}
    assert result.total_steps == 400


def test_outcomes_may_hold_arrays_and_tensors(tmp_path):
    scores = iter([9.5, 10.5, 8.0, 1.0])

    def evaluate(_):
        score = np.float32(next(scores))
        return Outcome(
            score, torch.tensor(score), None, np.int64(7), {"f1": np.ones(2)},
            np.bool_(False), torch.tensor(0.5),
        )  # fmt: skip

    result = run(tmp_path, evaluate)
    assert result.scores == (9.5, 10.5, 8.0, 1.0)
    assert result.best.cell == (4, 0.1)
    assert result.total_steps == 28
    expected = Outcome(10.5, 10.5, result.outcomes[1].seconds, 7, {"f1": [1.0, 1.0]})
    assert result.outcomes[1] == replace(expected, promise=0.5)
    with pytest.raises(ValueError, match="could not convert"):
        Outcome("good")


def test_an_evaluation_may_end_by_freezing_the_model(tmp_path):
    trains = Evaluate(trains=True)

    def freezing(model):
        score = trains(model)
        model.requires_grad_(False)
        return score

    result = run(tmp_path, freezing)
    assert not result.errors
    assert (result.best_adapter / "adapter_model.safetensors").is_file()


def test_an_evaluation_that_merges_keeps_its_score(tmp_path, caplog):
    trains = Evaluate(trains=True)

    def merging(model):
        score = trains(model)
        model.merge_and_unload()
        return score

    result = run(tmp_path, merging)
    assert not result.errors
    assert "has taken the adapter out of the model" in caplog.text
    with pytest.raises(ValueError, match="no trained adapter"):
        _ = result.best_adapter


def test_the_best_adapter_is_the_trained_one(tmp_path):
    evaluate = Evaluate(trains=True)
    result = run(tmp_path, evaluate)
    saved = PeftModel.from_pretrained(MODEL(), result.best_adapter)
    trained = get_peft_model(MODEL(), result.best_config())
    with torch.no_grad():
        torch.manual_seed(0)
        for value in values(trained):
            value += torch.rand(())
        batch = make_batch("bert")
        assert torch.equal(saved(**batch).logits, trained(**batch).logits)


def test_an_untrained_adapter_is_not_saved(tmp_path):
    result = run(tmp_path, Evaluate())
    with pytest.raises(ValueError, match="no trained adapter"):
        _ = result.best_adapter


def test_the_best_config_selects_the_best_entries_again(tmp_path):
    data = Calibration(make_samples("bert"))
    best = run(tmp_path, Evaluate(), data=data).best_config()
    given, best.selection = best.selection, None
    assert same_entries(select_parameters(MODEL(), best, data), given)
    loaded = SearchResult.load(tmp_path).best_config()
    assert same_entries(loaded.selection, given)
    assert get_peft_model(MODEL(), loaded).peft_config["default"].density == 0.1


def test_the_data_of_the_config_is_the_default(tmp_path):
    data = Calibration(make_samples("bert"))
    result = search(MODEL, config(calibration=data), None, Evaluate(), tmp_path)
    assert result.data == data.digest()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"workers": 0}, ValueError, "`workers` must be at least 1"),
        ({"workers": 2, "devices": ["cpu"]}, ValueError, "have a device each"),
        ({"workers": 2, "evaluate": lambda _: 1.0}, ValueError, "top of a module"),
        ({"halving": SuccessiveHalving()}, TypeError, "`halving` needs an evaluation"),
        ({"settings": config(method="bias")}, ValueError, "no cells to search"),
        ({"data": make_samples("bert", 3)}, ValueError, "`calibration` has 3"),
        ({"evaluate": None}, TypeError, "must be a function of a model"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path, options, error, message
):
    options = {"evaluate": Evaluate(), **options}
    with pytest.raises(error, match=message):
        run(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_folder_without_a_search_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no search"):
        SearchResult.load(tmp_path)
    for content in ({"format": 99}, [1]):
        (tmp_path / "search.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="another version"):
            SearchResult.load(tmp_path)


@pytest.mark.slow
def test_processes_come_to_what_one_comes_to(tmp_path):
    evaluate, settings = Evaluate(trains=True), config(schedule=[(8, 0.1), (8, 0.03)])
    alone = run(tmp_path / "alone", evaluate, settings)
    together = run(tmp_path / "together", evaluate, settings, workers=2)
    assert together.scores == alone.scores
    for i in range(1, 3):
        files = [
            tmp_path / name / f"cell-{i:02d}" / "adapter" / "adapter_model.safetensors"
            for name in ("alone", "together")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


class Dying(Evaluate):
    def __call__(self, model):
        if sum(v.numel() for v in values(model)) < 200:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(model)


@pytest.mark.slow
def test_a_cell_whose_process_dies_has_failed(tmp_path):
    settings = config(schedule=[(8, 0.1), (8, 0.03)])
    result = run(tmp_path, Dying(), settings, workers=1, devices=["cpu"])
    assert [score is None for score in result.scores] == [False, True]
    (failure,) = result.errors.values()
    assert failure.type == "BrokenProcessPool"
    assert 'needs `if __name__ == "__main__":`' in failure.message


class Endless(Evaluate):
    """Holds a lock for as long as its process lives."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def __call__(self, _):
        with FileLock(self.path / "lock"):
            (self.path / "begun").touch()
            time.sleep(600)


@pytest.mark.slow
def test_workers_end_with_a_search_that_is_killed(tmp_path):
    options = {"workers": 1, "devices": ["cpu"]}
    parent = multiprocessing.get_context("spawn").Process(
        target=run, args=(tmp_path / "search", Endless(tmp_path)), kwargs=options
    )
    parent.start()
    while not (tmp_path / "begun").exists():
        assert parent.is_alive()
        time.sleep(0.1)
    parent.kill()
    parent.join()
    with FileLock(tmp_path / "lock", timeout=20):
        pass


def ladder(counts, scores):
    """Records of cells that have come to as many rungs as they have scores."""
    return [
        CellRecord(Cell(8 - i, 0.1), 1, tuple(map(Outcome, each)))
        for i, each in enumerate(scores)
    ], SuccessiveHalving(2, 2.5).rungs(counts, 100)


def test_the_best_cells_go_on():
    found, rungs = ladder(4, [[0.1], [0.4, 0.5], [0.3, 0.6], [0.2]])
    assert [r.cells for r in rungs] == [4, 2, 1]
    assert survivors(found, rungs[:1]) == [0, 1, 2, 3]
    assert survivors(found, rungs[:2]) == [1, 2]
    assert survivors(found, rungs[:3]) == [2]


def test_cells_go_on_by_what_they_promise_and_win_by_their_score():
    found, rungs = ladder(4, [[0.1], [0.1], [0.1], [0.1]])
    promises = (-0.7, -0.5, -0.6, -0.9)
    found = [
        replace(r, outcomes=(replace(r.outcomes[0], promise=p),))
        for r, p in zip(found, promises, strict=True)
    ]
    assert survivors(found, rungs[:2]) == [1, 2]


def test_a_cell_that_failed_goes_no_further():
    found, rungs = ladder(4, [[], [0.4], [0.3, 0.6], []])
    assert survivors(found, rungs[:2]) == [1, 2]
    assert survivors(found, rungs[:3]) == [2]


def test_the_next_takes_the_place_of_a_cell_that_failed_and_goes_on():
    found, rungs = ladder(4, [[0.5], [0.4, 0.5], [0.3, 0.6], [0.2]])
    assert survivors(found, rungs[:1], {0}) == [1, 2, 3]
    assert survivors(found, rungs[:2], {0}) == [1, 2]
    assert survivors(found, rungs[:3], {0}) == [2]
    assert survivors(found, rungs[:3], {0, 2}) == [1]  # (5, 0.1) has not come so far


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cuda:1", None, "1"),
        ("cuda:1", "4,7", "7"),
        ("cuda", "4,7", "4"),
        ("cpu", "4,7", ""),
        ("cpu", None, ""),
        (None, "4,7", "4,7"),
    ],
)
def test_a_process_is_born_to_see_its_own_gpu_only(
    monkeypatch, device, visible, expected
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with _only_visible(device):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_devices_may_be_names_or_torch_devices():
    assert Workers(devices=[torch.device("cpu"), "cpu"])._slots == ["cpu", "cpu"]
    with pytest.raises(TypeError, match=r"must be a list, as \['cpu'\]"):
        Workers(devices="cpu")


def test_what_a_notebook_defines_is_not_sent_away(monkeypatch):
    notebook = ModuleType("__main__")
    evaluate = FunctionType((lambda _: 1.0).__code__, {}, "evaluate")
    evaluate.__module__ = "__main__"
    evaluate.__qualname__ = "evaluate"
    notebook.evaluate = evaluate
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    Workers().check(evaluate=evaluate)
    with pytest.raises(ValueError, match="`evaluate` is defined in a notebook"):
        Workers(2).check(evaluate=evaluate)
    notebook.__file__ = "script.py"
    Workers(2).check(evaluate=evaluate)


def test_one_of_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "__init__", lambda self: setattr(self, "size", 2))
    with pytest.raises(ValueError, match="without torchrun"):
        run(tmp_path, Evaluate())


def test_a_device_that_does_not_exist_is_refused(tmp_path):
    there = torch.cuda.device_count()
    with pytest.raises(ValueError, match=rf"`devices` names 'cuda:{there}', but this"):
        run(tmp_path, max, devices=[f"cuda:{there}"])
