"""Scores by fine-tuning: what is held out, when training stops, and how it goes on."""

import pickle
import shutil
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_ird import (
    IRDConfig,
    Outcome,
    SearchResult,
    SuccessiveHalving,
    TrainerEvaluate,
    search,
)
from peft_ird.search.halving import Rung, survivors
from peft_ird.search.outcome import CellRecord
from peft_ird.search.stopping import BestWeights, checkpoint_in
from peft_ird.search.trainer import CellTrainer
from peft_ird.selection.schedule import Cell
from tests.conftest import make_model
from tests.test_trainer import arguments, toy_task

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*", "ignore:.*no accelerator is found.*"
)
MODEL = partial(make_model, "bert")
DATA = toy_task("bert", 80)


def accuracy(prediction):
    hits = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(hits.mean())}


def stock(folder, eval_data=None, arguments_=None, **options):
    args = {"logging_strategy": "no", "max_steps": 12, **(arguments_ or {})}
    options = {"metric": "accuracy", "compute_metrics": accuracy, **options}
    return TrainerEvaluate(arguments(folder, **args), DATA, eval_data, **options)


def adapted(seed=0, density=0.05):
    settings = IRDConfig(
        task_type="SEQ_CLS", method="random", density=density, seed=seed
    )
    return get_peft_model(MODEL(), settings)


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()
            if p.requires_grad}  # fmt: skip


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize(
    ("held_out", "count"),
    [(0.1, 8), (0.25, 20), (np.float32(0.1), 8), (7, 7), (1, 1), (np.int64(7), 7)],
)
def test_what_is_held_out_is_not_trained_on(tmp_path, held_out, count):
    train, held = stock(tmp_path, held_out=held_out).positions()
    assert sorted(train + held) == list(range(80))
    assert len(held) == count
    again = stock(tmp_path, held_out=held_out).positions()
    other = stock(tmp_path, held_out=held_out, seed=1).positions()
    assert again == (train, held) != other


def test_the_trainer_sees_no_more_than_that(tmp_path, monkeypatch):
    seen = {}
    init = Trainer.__init__

    def look(self, *args, **kwargs):
        seen.update(kwargs)
        init(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "__init__", look)
    rows = Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in DATA])
    for data in (DATA, rows):
        evaluate = stock(tmp_path, held_out=0.2, arguments_={"max_steps": 1})
        evaluate.train_dataset = data
        train, held = evaluate.positions()
        evaluate(adapted())
        for name, positions in (("train_dataset", train), ("eval_dataset", held)):
            ids = [torch.as_tensor(row["input_ids"]).tolist() for row in seen[name]]
            assert ids == [DATA[i]["input_ids"].tolist() for i in positions]


@pytest.mark.parametrize("held_out", [0, None, 0.2])
def test_cells_are_chosen_on_what_is_held_out_and_reported_on_the_rest(
    tmp_path, held_out
):
    shown = toy_task("bert", 100)[80:]
    model = adapted()
    evaluate = stock(tmp_path, shown, held_out=held_out)
    outcome = evaluate(model)

    def score(samples):
        batch = {k: torch.stack([s[k] for s in samples]) for k in samples[0]}
        with torch.no_grad():
            found = model.eval()(**batch).logits.argmax(-1)
        return float((found == batch["labels"]).double().mean())

    _, held = evaluate.positions()
    chosen_on = [DATA[i] for i in held] if held_out else shown
    assert outcome.score == pytest.approx(score(chosen_on))
    assert outcome.reported == pytest.approx(score(shown))
    assert outcome.steps == 12
    assert outcome.seconds > 0
    assert not any(tmp_path.iterdir())  # every cell clears its folder
    early = evaluate.advance(adapted(), 6, None, tmp_path / "pause")
    assert (early.reported is None) == bool(held_out)  # reported at the end only
    assert early.steps == evaluate.advance(adapted(), 6).steps == 6


def test_a_stream_is_not_read_before_it_is_evaluated(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            raise AssertionError("read")

    assert "Stream" in stock(tmp_path, Stream(), held_out=0.2).settings()["eval_data"]


def test_of_several_datasets_the_mean_is_reported(tmp_path):
    more = toy_task("bert", 110)[80:]
    parts = {"matched": more[:10], "mismatched": more[10:]}
    together = stock(tmp_path, parts)
    alone = [stock(tmp_path, part)(adapted()).reported for part in parts.values()]
    assert alone[0] != alone[1]
    outcome = together(adapted())
    assert outcome.reported == pytest.approx(sum(alone) / 2)
    assert [outcome.metrics[f"{name}_accuracy"] for name in parts] == alone
    renamed = stock(tmp_path, {"matched": more[:10], "other": more[10:]})
    assert renamed.settings()["eval_data"] != together.settings()["eval_data"]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA[:10])


class SizedStream(Stream):
    def __len__(self):
        return 10


@pytest.mark.parametrize("kind", [Stream, SizedStream])
def test_a_stream_may_be_reported_on(tmp_path, kind):
    whole = stock(tmp_path, DATA[:10])(adapted())
    streamed = stock(tmp_path, kind())(adapted())
    assert streamed.reported == whole.reported
    assert streamed.score == whole.score


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 0}, "nothing to choose cells on"),
        ({"held_out": None}, "nothing to choose cells on"),
        ({"held_out": 0, "eval_data": {"a": DATA, "b": DATA}}, "has 'a', 'b'. Pass"),
        ({"held_out": 80}, "below 80"),
        ({"held_out": 1.0}, "below 80"),
        ({"held_out": -0.1}, "`held_out` must be a share"),
    ],
)
def test_a_bad_split_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        stock(tmp_path, **options)


def test_the_metric_is_found_with_and_without_its_prefix(tmp_path):
    outcomes = [
        stock(tmp_path, metric=metric)(adapted())
        for metric in ("accuracy", "eval_accuracy")
    ]
    assert outcomes[0].score == outcomes[1].score


def test_an_unknown_metric_says_which_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "train", None)  # not after a training
    with pytest.raises(ValueError, match=r"'f1'.* returned accuracy, .*loss"):
        stock(tmp_path, metric="f1")(adapted())


def test_a_metric_that_needs_more_rows_than_a_batch_is_taken_after_training(
    tmp_path, caplog
):
    def needs_all(prediction):
        if len(prediction.label_ids) < 20:
            raise ZeroDivisionError("only one class")
        return accuracy(prediction)

    options = {"held_out": 20, "arguments_": {"per_device_eval_batch_size": 4}}
    outcome = stock(tmp_path, compute_metrics=needs_all, **options)(adapted())
    assert outcome.score == stock(tmp_path, **options)(adapted()).score
    assert caplog.messages[0].endswith("ZeroDivisionError('only one class')")
    with pytest.raises(ZeroDivisionError):  # where it fails on all rows
        stock(tmp_path, compute_metrics=needs_all, held_out=19)(adapted())


def test_a_metric_that_is_to_be_small_is_negated(tmp_path):
    shown = toy_task("bert", 90)[80:]
    evaluate = stock(tmp_path, {"a": shown}, metric="loss")
    outcome = evaluate(adapted())
    assert outcome.score == -outcome.metrics["eval_loss"] < 0
    assert outcome.reported == -outcome.metrics["a_loss"] < 0
    outcome = stock(tmp_path, greater_is_better=False)(adapted())
    assert outcome.score == -outcome.metrics["eval_accuracy"]

    def is_greater_better(**options):
        return stock(tmp_path, **options).settings()["greater_is_better"]

    arguments_ = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    assert is_greater_better(metric="loss", arguments_=arguments_)
    assert is_greater_better(arguments_=arguments_)
    other = replace(stock(tmp_path), metric="loss")
    assert not other.settings()["greater_is_better"]


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_an_evaluation_in_16_bits_leaves_the_cell_in_32(tmp_path, kind):
    model, same = adapted(), adapted()
    options = {"arguments_": {f"{kind}_full_eval": True}}
    assert stock(tmp_path, **options)(model).score == stock(tmp_path)(same).score
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert equal(trained(model), trained(same))


def test_a_cell_has_no_progress_bar_of_its_own(tmp_path, capfd):
    evaluate = stock(tmp_path, arguments_={"max_steps": 2})
    evaluate.training_args.disable_tqdm = False
    evaluate(adapted())
    assert "%|" not in capfd.readouterr().err


@pytest.mark.parametrize("metrics", [None, accuracy])
def test_logits_are_kept_only_for_metrics(tmp_path, metrics, monkeypatch):
    seen = []
    predict = CellTrainer.predict

    def noting(self, *args, **kwargs):
        found = predict(self, *args, **kwargs)
        seen.append(found.predictions is not None)
        return found

    monkeypatch.setattr(CellTrainer, "predict", noting)
    stock(tmp_path, compute_metrics=metrics, metric="loss")(adapted())
    assert set(seen) == {metrics is not None}


def test_logits_are_preprocessed(tmp_path):
    def largest(logits, _):
        return logits.argmax(-1)

    def hits(prediction):
        return {
            "accuracy": float((prediction.predictions == prediction.label_ids).mean())
        }

    evaluate = stock(
        tmp_path, compute_metrics=hits, preprocess_logits_for_metrics=largest
    )
    assert evaluate(adapted()).score == stock(tmp_path)(adapted()).score


def test_every_held_out_sample_is_scored(tmp_path):
    sizes = []

    def counting(prediction):
        sizes.append(len(prediction.label_ids))
        return accuracy(prediction)

    batches = {"dataloader_drop_last": True, "per_device_eval_batch_size": 4}
    stock(
        tmp_path, compute_metrics=counting, held_out=6,
        arguments_={"eval_strategy": "steps", "eval_steps": 4, **batches},
    )(adapted())  # fmt: skip
    first, *others = sizes
    assert first == 4  # whether there is such a metric
    assert others == [6] * 4


def stops_after(scores, patience, threshold):
    """Say after how many evaluations it is over, by looking at all of them anew."""
    for seen in range(1, len(scores) + 1):
        best = max(scores[:seen])
        since = seen - 1 - scores.index(best)
        if since >= patience and best > threshold:
            return seen
    return None


@given(
    st.lists(st.integers(0, 10), min_size=1, max_size=20),
    st.integers(1, 4),
    st.integers(0, 10),
    st.booleans(),
)
def test_training_stops_without_gain_above_the_threshold(
    scores, patience, threshold, is_greater_better
):
    sign = 1 if is_greater_better else -1
    best = BestWeights("f1", is_greater_better, patience, sign * threshold)
    found = None
    for number, score in enumerate(scores, 1):
        best.see(sign * score)
        if best.stopped:
            found = number
            break
    assert found == stops_after(scores, patience, threshold)


def test_without_patience_training_never_stops():
    best = BestWeights("f1", patience=None)
    for _ in range(100):
        best.see(0.9)
    assert not best.stopped


class Script(TrainerCallback):
    """Notes the trained weights at every evaluation."""

    def __init__(self):
        self.seen = []

    def on_evaluate(self, _args, _state, _control, model, **_):
        self.seen.append(trained(model))


def test_the_best_weights_are_scored(tmp_path, monkeypatch):
    """The metric falls after the second evaluation; training stops two later."""
    first = 0.0  # before training, to see that there is such a metric
    script, scores = Script(), iter([first, 0.4, 0.8, 0.6, 0.5, 0.9, 0.9])
    build = TrainerEvaluate._trainer

    def with_script(self, model, folder, best):
        trainer = build(self, model, folder, best)
        trainer.add_callback(script)
        return trainer

    monkeypatch.setattr(TrainerEvaluate, "_trainer", with_script)
    evaluate = stock(
        tmp_path, patience=2, compute_metrics=lambda _: {"accuracy": next(scores)},
        arguments_={"eval_strategy": "steps", "eval_steps": 2, "max_steps": 30},
    )  # fmt: skip
    model = adapted()
    outcome = evaluate(model)
    assert (outcome.steps, outcome.stopped) == (8, True)
    assert len(script.seen) == 4
    assert equal(trained(model), script.seen[1])
    assert not equal(trained(model), script.seen[3])


def test_an_evaluation_can_be_sent_to_another_process(tmp_path):
    evaluate = stock(tmp_path, DATA[:8])
    again = pickle.loads(pickle.dumps(evaluate))
    assert again.settings() == evaluate.settings()
    assert again(adapted()).score == evaluate(adapted()).score


def test_settings_name_what_matters(tmp_path):
    one, two = stock(tmp_path / "a"), stock(tmp_path / "b", seed=1)
    assert {k for k, v in one.settings().items() if two.settings()[k] != v} == {"seed"}
    slower = stock(tmp_path, arguments_={"learning_rate": 1e-3}).settings()
    assert slower["training_args"]["learning_rate"] == 1e-3
    two.train_dataset = DATA[1:]
    assert one.settings()["train_data"] != two.settings()["train_data"]


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"max_steps": 7}, 80),
        ({"max_steps": -1, "num_train_epochs": 2}, 80),
        ({"max_steps": -1, "num_train_epochs": 1.5, "dataloader_drop_last": True}, 77),
        ({"max_steps": -1, "gradient_accumulation_steps": 3}, 79),
    ],
)
def test_total_steps_are_those_that_the_trainer_takes(tmp_path, options, size):
    evaluate = stock(tmp_path, held_out=5, arguments_=options)
    evaluate.train_dataset = DATA[:size]
    assert evaluate(adapted()).steps == evaluate.total_steps


STRATEGIES = {
    "none": {},
    "epoch": {"eval_strategy": "epoch"},
    "steps": {"eval_strategy": "steps", "eval_steps": 4},
    "start": {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True},
    "skip": {"ignore_data_skip": True},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "unseeded": {"accelerator_config": {"use_seedable_sampler": False}},
}


@pytest.mark.parametrize(
    ("strategy", "pauses"),
    [
        ("none", (4, 10)),
        ("epoch", (5, 9)),
        ("epoch", (4, 10)),
        ("steps", (4, 10)),
        ("start", (4, 10)),
        ("skip", (4, 10)),
        ("by length", (5, 9)),
        ("unseeded", (5, 9)),
    ],
)
def test_going_on_gives_the_weights_of_an_uninterrupted_training(
    tmp_path, strategy, pauses
):
    """An epoch has 5 steps: some pauses are at its end and some in its middle."""
    evaluate = stock(tmp_path / "home", arguments_={**STRATEGIES[strategy]},
                     held_out=5, patience=None)  # fmt: skip
    assert any(isinstance(m, nn.Dropout) and m.p for m in adapted().modules())
    model = adapted()
    whole = evaluate(model)
    source = None
    for number, until in enumerate((*pauses, 12)):
        paused = adapted()
        target = tmp_path / str(number) if until < 12 else None
        outcome = evaluate.advance(paused, until, source, target)
        assert outcome.steps == until
        source = target
    assert equal(trained(paused), trained(model))
    assert outcome.score == whole.score


def test_an_evaluation_at_the_start_is_not_repeated(tmp_path):
    evaluate = stock(
        tmp_path / "home", patience=2, greater_is_better=False, threshold=2.0,
        compute_metrics=lambda _: {"accuracy": 1.0},
        arguments_={**STRATEGIES["start"], "max_steps": 12},
    )  # fmt: skip
    assert evaluate(adapted()).steps == 8
    first = evaluate.advance(adapted(), 2, None, tmp_path / "pause")
    assert (first.steps, first.stopped) == (2, False)
    assert evaluate.advance(adapted(), 12, tmp_path / "pause").steps == 8


def test_patience_is_kept_across_a_pause(tmp_path):
    def scored(*scores):
        script = iter((0.0, *scores))  # one before training
        return stock(
            tmp_path / "home", patience=3,
            compute_metrics=lambda _: {"accuracy": next(script)},
            arguments_={"eval_strategy": "steps", "eval_steps": 2, "max_steps": 30},
        )  # fmt: skip

    end = 0.1  # what the weights that are scored get, after training
    whole = scored(0.5, 0.8, 0.7, 0.6, 0.7, end)
    assert whole(adapted()).steps == 10
    evaluate = scored(0.5, 0.8, 0.7, end, 0.6, 0.7, end)
    first = evaluate.advance(adapted(), 6, None, tmp_path / "pause")
    assert not first.stopped
    outcome = evaluate.advance(adapted(), 30, tmp_path / "pause")
    assert outcome.stopped
    assert outcome.steps == 10


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "pause").mkdir()
    with pytest.raises(ValueError, match=r"no checkpoint in '.*pause'\. Pass the"):
        stock(tmp_path / "home").advance(adapted(), 12, tmp_path / "pause")


def test_of_several_checkpoints_the_last_is_taken(tmp_path):
    (tmp_path / "checkpoint-mine").mkdir()
    for path in (tmp_path / f"checkpoint-{steps}" for steps in range(6, 13)):
        path.mkdir()
        assert checkpoint_in(tmp_path) == path
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoint_in(tmp_path / "none")


COSTS = [(7, 3, 2.0), (7, 3, 1.5), (7, 2, 2.5), (2, 3, 1.1), (1, 2, 1.5), (9, 4, 20.0)]


@pytest.mark.parametrize(("cells", "eta", "cost"), COSTS)
@pytest.mark.parametrize("total", [100, 101, 997])
def test_rungs_stay_within_the_cost(cells, eta, cost, total):
    rungs = SuccessiveHalving(eta, cost).rungs(cells, total)
    done = spent = 0
    for rung in rungs:
        assert rung.steps > done
        spent += rung.cells * (rung.steps - done)
        done = rung.steps
    assert rungs[0].cells == cells
    assert done == total
    assert rungs[-1].cells == (3 if cost == 20.0 else 1)  # three can afford the end
    assert spent <= cost * total
    counts = [rung.cells for rung in rungs]
    assert all(-(-n // eta) == m for n, m in pairwise(counts))


def test_a_cell_whose_loss_is_not_a_number_does_not_go_on():
    promises = (-0.7, float("nan"), -0.2)
    records = [
        CellRecord(Cell(n, 0.1), 1, (Outcome(0.9, promise=promise),))
        for n, promise in enumerate(promises)
    ]
    assert survivors(records, [Rung(3, 1), Rung(1, 2)]) == [2]
    assert survivors(records[:2], [Rung(2, 1), Rung(1, 2)]) == [0]


def test_seven_cells_are_trained_a_tenth_then_three_tenths():
    rungs = SuccessiveHalving(3, 2.0).rungs(7, 100)
    assert [(r.cells, r.steps) for r in rungs] == [(7, 10), (3, 30), (1, 100)]


@pytest.mark.parametrize("options", [{"eta": 1}, {"cost": 1.0}])
def test_bad_halving_is_refused(options):
    with pytest.raises(ValueError, match="`eta` must be at least 2"):
        SuccessiveHalving(**options)


def test_a_training_too_short_to_be_halved_is_refused():
    with pytest.raises(ValueError, match="first rung would have no step"):
        SuccessiveHalving().rungs(7, 5)


def test_what_entries_are_selected_on_is_never_held_out(tmp_path):
    data = [{"x": i} for i in range(400)]
    evaluate = TrainerEvaluate(
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True), data, held_out=40
    )
    trained, held_out = evaluate.positions()
    assert not set(trained) & set(held_out)
    assert [row["x"] for row in evaluate.training_rows] == trained
    # a calibration set of all samples is drawn by the same seed, but otherwise
    drawn = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:40]
    assert len(set(drawn.tolist()) & set(held_out)) < 12


class Toy:
    """Learns at a rate of its own: scores at all times are in the order of sizes."""

    total_steps = 40

    def __init__(self, interrupts=(), fails=(), stops=()):
        self.interrupts, self.fails, self.stops = interrupts, fails, stops
        self.calls = []

    def __call__(self, model):
        return self.advance(model, self.total_steps)

    def advance(self, model, until, resume_from=None, save_to=None):
        size = sum(p.numel() for n, p in model.named_parameters() if "irdelta_v" in n)
        done = int((resume_from / "steps").read_text()) if resume_from else 0
        number = len(self.calls)
        self.calls.append((size, done, until))
        if number in self.interrupts:
            raise KeyboardInterrupt
        if number in self.fails:
            raise RuntimeError("out of luck")
        if save_to is not None:
            save_to.mkdir()
            (save_to / "steps").write_text(str(until))
        return Outcome(
            -until / (size + until), steps=until, stopped=number in self.stops
        )


class Turning(Toy):
    """After the first rung, scores are in the reverse order of sizes."""

    def advance(self, model, until, resume_from=None, save_to=None):
        outcome = super().advance(model, until, resume_from, save_to)
        return replace(outcome, score=outcome.score * (-1 if resume_from else 1))


def goes_on(calls):
    """Whether each cell goes on where its last training that did not fail ended."""
    ends = {0, *(until for _, _, until in calls)}
    return all(done == max(e for e in ends if e < until) for _, done, until in calls)


CELLS = [(8, 0.1), (8, 0.08), (8, 0.06), (8, 0.04), (8, 0.02)]


def halved(folder, evaluate, halving=SuccessiveHalving(2, 2.0)):  # noqa: B008 (frozen)
    settings = IRDConfig(
        task_type="SEQ_CLS", method="random", density=0.02, schedule=CELLS
    )
    return search(MODEL, settings, None, evaluate, folder, halving=halving)


def test_halving_finds_the_best_at_a_bounded_cost(tmp_path):
    toy = Toy()
    whole = halved(tmp_path / "whole", toy, halving=None)
    assert whole.total_steps == 5 * 40
    result = halved(tmp_path / "halved", Toy())
    assert result.best.cell == whole.best.cell == (8, 0.1)
    assert [r.rung for r in result.records] == [4, 3, 2, 1, 1]
    assert result.outcomes[0].steps == 40
    assert result.total_steps <= 2 * 40
    assert result.table().splitlines()[0].endswith("rung")
    assert not list(tmp_path.glob("halved/*/rung-*"))
    assert SearchResult.load(tmp_path / "halved").records == result.records


@pytest.mark.parametrize("at", [0, 3, 5, 7, 9, 10])
def test_halving_goes_on_after_an_interruption(tmp_path, at):
    whole = Toy()
    expected = halved(tmp_path / "whole", whole)
    first, second = Toy(interrupts=[at]), Toy()
    with pytest.raises(KeyboardInterrupt):
        halved(tmp_path / "cut", first)
    result = halved(tmp_path / "cut", second)
    assert first.calls[:at] + second.calls == whole.calls
    assert result.scores == expected.scores
    assert result.best.cell == expected.best.cell


def test_a_cell_that_fails_in_a_rung_leaves_its_place_to_the_others(tmp_path):
    toy = Toy(fails=[5])  # the best cell, on its way to the second rung
    result = halved(tmp_path, toy)
    assert list(result.errors) == [(8, 0.1)]
    assert result.best.cell == (8, 0.08)
    again = halved(tmp_path, Toy())
    assert not again.errors
    assert again.best.cell == (8, 0.1)


def test_the_place_of_the_last_cell_is_taken_if_that_fails(tmp_path):
    toy = Toy(fails=[10])  # the best cell, on its way to the end
    result = halved(tmp_path, toy)
    assert list(result.errors) == [(8, 0.1)]
    assert result.best.cell == (8, 0.08)
    assert result.best.outcome.steps == 40
    assert toy.calls[-1][1:] == (toy.calls[-2][1], 40)  # it goes on where it was
    again = halved(tmp_path, Toy())
    assert not again.errors
    assert again.best.cell == (8, 0.1)
    assert not list(tmp_path.glob("*/rung-*"))


def test_those_that_take_a_place_go_on_themselves(tmp_path):
    first, second = Toy(fails=[0, 5, 9, 12]), Toy()  # the best cell of each rung
    result = halved(tmp_path, first)
    assert [r.rung for r in result.records] == [0, 1, 2, 3, 4]
    assert len(result.errors) == 4
    assert result.best.cell == CELLS[4]
    again = halved(tmp_path, second)
    assert again.best.cell == CELLS[0]
    assert goes_on(first.calls + second.calls)
    assert not list(tmp_path.glob("*/rung-*"))


def test_a_cell_that_is_tried_again_may_change_who_goes_on(tmp_path):
    first, second = Turning(fails=[0]), Turning()
    result = halved(tmp_path, first)
    assert [r.rung for r in result.records] == [0, 2, 3, 4, 1]
    again = halved(tmp_path, second)
    assert [r.rung for r in again.records] == [2, 3, 4, 4, 1]
    assert goes_on(first.calls + second.calls)
    assert not list(tmp_path.glob("*/rung-*"))


def test_a_training_whose_checkpoint_is_gone_starts_again(tmp_path, caplog):
    whole, second = Toy(), Toy()
    expected = halved(tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        halved(tmp_path / "cut", Toy(interrupts=[8]))
    for folder in tmp_path.glob("cut/*/rung-*"):
        shutil.rmtree(folder)
    result = halved(tmp_path / "cut", second)
    assert result.scores == expected.scores
    assert "rung-1 is gone; its cell is trained anew" in caplog.text
    third_rung = [(size, 0, until) for size, _, until in whole.calls[8:10]]
    assert second.calls == third_rung + whole.calls[10:]


def test_a_failed_cell_is_not_the_best(tmp_path):
    toy = Toy(fails=range(10, 99))
    result = halved(tmp_path, toy)
    assert len(result.errors) == 2
    assert result.best.failure is None or result.best.rung == 3


def test_a_training_that_has_ended_is_not_gone_on_with(tmp_path):
    toy = Toy(stops=[0])
    result = halved(tmp_path, toy)
    assert len(toy.calls) == 5 + 2 + 1  # the best cell has only one
    assert result.best.cell == (8, 0.1)
    assert result.records[0].rung == 4


def test_halving_by_the_stock_trainer(tmp_path):
    evaluate = stock(
        tmp_path / "home", DATA[:16], arguments_={"max_steps": 20}, metric="loss"
    )
    settings = IRDConfig(
        task_type="SEQ_CLS", density=0.02, schedule=[(8, 0.1), (4, 0.1), (4, 0.02)]
    )
    halving = SuccessiveHalving(3, 2.0)
    result = search(MODEL, settings, DATA, evaluate, tmp_path / "a", halving=halving)
    whole = search(MODEL, settings, DATA, evaluate, tmp_path / "b")
    assert result.total_steps <= 2 * 20
    number = result.records.index(result.best)
    assert result.best.outcome.score == whole.scores[number]
    assert result.best.outcome.reported == whole.outcomes[number].reported
    saved = PeftModel.from_pretrained(MODEL(), result.best_adapter)
    other = tmp_path / "b" / f"cell-{number + 1:02d}" / "adapter"
    expected = PeftModel.from_pretrained(MODEL(), other)
    assert equal(dict(saved.named_parameters()), dict(expected.named_parameters()))
    assert not any((tmp_path / "home").iterdir())


@pytest.mark.slow
def test_the_stock_trainer_in_processes(tmp_path):
    evaluate = stock(tmp_path / "home", DATA[:16], arguments_={"max_steps": 4})
    settings = IRDConfig(
        task_type="SEQ_CLS", density=0.02, schedule=[(8, 0.1), (8, 0.02)]
    )
    alone = search(MODEL, settings, DATA, evaluate, tmp_path / "a")
    together = search(MODEL, settings, DATA, evaluate, tmp_path / "b", workers=2)
    assert together.scores == alone.scores
    assert [o.reported for o in together.outcomes] == [
        o.reported for o in alone.outcomes
    ]
    files = sorted(tmp_path.glob("[ab]/*/adapter/adapter_model.safetensors"))
    contents = [file.read_bytes() for file in files]
    assert len(files) == 4
    assert contents[:2] == contents[2:]
