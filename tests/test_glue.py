"""GLUE's tasks, metrics and methods, and the runner of experiments."""

import copy
import importlib
import itertools
import json
import math
from collections import Counter
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from peft import get_peft_model
from scipy import stats
from torch import nn
from transformers import BertForSequenceClassification

from peft_ird import IRDConfig
from tests.conftest import bert_config
from tests.test_examples import EXAMPLES, tiny_checkpoint

pytest.importorskip("evaluate")
ROOT = EXAMPLES.parent


@pytest.fixture
def load(monkeypatch):
    """Import a script of examples/ or benchmarks/ by its name."""
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))

    def importer(name: str) -> ModuleType:
        return importlib.import_module(name)

    return importer


def write_glue(folder: Path, task: str, rows: dict, splits=("train", "validation")):
    datasets = pytest.importorskip("datasets")
    (folder / task).mkdir(parents=True, exist_ok=True)
    for split in splits:
        path = folder / task / f"{split}.parquet"
        datasets.Dataset.from_dict(rows).to_parquet(str(path))
    return folder


SENTENCES = {"sentence": ["a b c", "d e", "f g h i", "k l"] * 16, "label": [0, 1] * 32}
PAIRS = {
    "sentence1": ["a b c", "d e", "f g h i", "k l"] * 16,
    "sentence2": ["b c", "e f g", "h", "l m n"] * 16,
    "label": [0.5, 4.0, 2.5, 1.0] * 16,
    "idx": list(range(64)),
}


# ---- metrics


def counts(predicted, labels):
    """True and false positives and negatives."""
    pairs = list(zip(predicted, labels, strict=True))
    return [pairs.count(p) for p in ((1, 1), (1, 0), (0, 1), (0, 0))]


@pytest.mark.parametrize("seed", range(5))
def test_the_metrics_are_those_of_their_definitions(load, seed):
    metric = load("metrics").GlueMetric
    random = np.random.default_rng(seed)
    predicted, labels = random.integers(0, 2, (2, 40))
    tp, fp, fn, tn = counts(predicted.tolist(), labels.tolist())
    matthews = (tp * tn - fp * fn) / math.sqrt(
        (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    )
    f1, right = 2 * tp / (2 * tp + fp + fn), (tp + tn) / 40
    wanted = {"cola": matthews, "mrpc": (f1 + right) / 2, "qqp": (f1 + right) / 2}
    for task in ("cola", "mrpc", "qqp", "sst2", "rte", "wnli", "qnli"):
        found = metric(task).compute(predictions=predicted, references=labels)
        assert found["score"] == pytest.approx(wanted.get(task, right)), task
    values, others = random.normal(size=(2, 30)).round(1).astype("float32")  # with ties
    found = metric("stsb").compute(predictions=values, references=others)
    assert found["pearson"] == pytest.approx(stats.pearsonr(values, others)[0])
    assert found["spearman"] == pytest.approx(stats.spearmanr(values, others)[0])
    assert found["score"] == pytest.approx((found["pearson"] + found["spearman"]) / 2)


@pytest.mark.parametrize("task", ["cola", "stsb", "mrpc"])
def test_a_constant_prediction_has_a_score(load, task):
    zeros = np.zeros(8, dtype="float32" if task == "stsb" else "int64")
    metric = load("metrics").GlueMetric(task)
    labels = np.arange(8).astype(zeros.dtype) % 2 if task != "mrpc" else zeros
    found = metric.compute(predictions=zeros, references=labels)
    assert found["score"] == (0.5 if task == "mrpc" else 0.0)


# ---- tasks


def test_a_decoder_reads_the_prompt_and_an_encoder_the_texts(load, tmp_path):
    task = load("glue").GLUE["stsb"]
    rows = task.read("train", write_glue(tmp_path, "stsb", PAIRS))
    assert rows.column_names == ["sentence1", "sentence2", "label"]

    def tokenizer(*columns, **_):
        if isinstance(columns[0], str):
            return {"input_ids": [0]}
        joined = [" | ".join(texts) for texts in zip(*columns, strict=True)]
        return {"input_ids": [[ord(c) for c in text] for text in joined]}

    encoded = task.encode(rows, tokenizer)
    assert encoded.column_names == ["label", "input_ids"]
    assert "".join(map(chr, encoded["input_ids"][0])) == "a b c | b c"
    prompted = task.encode(rows, tokenizer, is_decoder=True)
    assert "".join(map(chr, prompted["input_ids"][0])).startswith(
        'Determine the similarity between the following two sentences: "a b c" and '
        '"b c".'
    )


def test_every_prompt_names_its_texts(load):
    for task in load("glue").GLUE.values():
        filled = task.prompt.format(*(f"<{name}>" for name in task.texts))
        assert all(f'"<{name}>"' in filled for name in task.texts)


def test_a_split_without_labels_is_refused(load, tmp_path):
    rows = {**SENTENCES, "label": [-1] * 64}
    folder = write_glue(tmp_path, "cola", rows, splits=["test"])
    with pytest.raises(ValueError, match="'test' of cola has no labels"):
        load("glue").GLUE["cola"].read("test", folder)


# ---- methods


def targets(sizes):
    return {f"layer{i}": nn.Linear(*size) for i, size in enumerate(sizes)}


@pytest.mark.parametrize("budget", [8, 23, 64, 100, 999])
def test_ranks_fill_the_budget_and_are_alike(load, budget):
    modules = targets([(4, 4)] * 5)
    ranks = load("methods").fitting_ranks(modules, budget)
    spent = 8 * sum(ranks.values())
    assert budget - 8 < spent <= budget
    everyone = [ranks.get(name, 0) for name in modules]
    assert max(everyone) - min(everyone) <= 1
    assert everyone == sorted(everyone)  # the upper layers have more


def test_a_budget_below_one_rank_is_refused(load):
    with pytest.raises(ValueError, match="one rank of one module has 8 entries"):
        load("methods").fitting_ranks(targets([(4, 4)]), 7)


def few_samples(load, method):
    """Options that the tiny data sets allow, where a method has any."""
    has_options = method in load("methods").IRD_METHODS
    return ["--options", '{"num_samples":8}'] if has_options else []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # peers'
def test_every_method_trains_within_the_budget(load, tmp_path):
    run_glue = load("run_glue")
    data = write_glue(tmp_path / "glue", "sst2", SENTENCES)
    model = tiny_checkpoint(tmp_path / "model", "bert")
    sized_by_itself = {"bias", "full", "head-only", "lora-everywhere", "shira"}
    for method in load("methods").METHODS:
        options = run_glue.parse_arguments(
            f"--task sst2 --method {method} --data-dir {data} --model {model} "
            "--epochs 1 --max-train 32 --held-out 8 --lr 1e-3 --save "
            f"--output-dir {tmp_path}".split()
            + ([] if method in load("methods").OWN_SIZE else ["--budget", "100"])
            + few_samples(load, method)
        )
        before = torch.random.get_rng_state()
        result = run_glue.run(options, tmp_path / method)
        torch.random.set_rng_state(before)
        json.dumps(result)
        has_adapter = method not in {"full", "head-only"}
        assert (tmp_path / method / "adapter").is_dir() == has_adapter
        assert (tmp_path / method / "model").is_dir() != has_adapter
        entries = result["entries"]
        if method not in sized_by_itself:
            assert 100 - 32 < entries <= 100, method
        assert result["head_entries"] == 2 * 16 + 2, method
        assert set(result["scores"]) == {"held_out", "validation"}
        assert 0 <= result["scores"]["validation"]["score"] <= 1
        assert (result["selection"] is None) == (
            method
            in {"lora", "lora-everywhere", "shira", "supertuning", "full", "head-only"}
        )


def test_a_long_sample_loses_words_of_its_texts_not_the_question(load):
    task = load("glue").GLUE["mrpc"]
    texts = ["a b c d e f g h i j k l", "m n o"]

    def tokenizer(text, **_):
        return {"input_ids": text.split()}

    shorter = load("glue").shortened(task.prompt, texts, tokenizer, 25)
    assert shorter.endswith(
        'and "m n o", do these two sentences have the same semantics?'
    )
    assert len(shorter.split()) == 25
    whole = load("glue").shortened(task.prompt, texts, tokenizer, 31)
    assert whole == task.prompt.format(*texts)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["mnli", "qqp", "qnli", "rte", "wnli"])
def test_every_task_of_pairs_is_read_trained_and_scored(load, tmp_path, task):
    run_glue, glue = load("run_glue"), load("glue").GLUE[task]
    rows = {name: PAIRS[f"sentence{i}"] for i, name in enumerate(glue.texts, 1)}
    assert len(rows) == 2
    rows["label"] = [i % glue.num_labels for i in range(64)]
    data = write_glue(tmp_path, task, rows, ("train", *glue.evaluations))
    model = tiny_checkpoint(tmp_path / "model", "bert")
    options = run_glue.parse_arguments(
        f"--task {task} --data-dir {data} --model {model} --budget 100 --epochs 1 "
        f"--max-train 32 --held-out 8 --output-dir {tmp_path}".split()
        + few_samples(load, "ird")
    )
    scores = run_glue.run(options)["scores"]
    matched = {"validation_matched", "validation_mismatched"}
    splits = matched if task == "mnli" else {"validation"}
    assert set(scores) == {"held_out", *splits}
    assert all(0 <= each["score"] <= 1 for each in scores.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_is_trained(load, tmp_path, kind):
    run_glue = load("run_glue")
    data = write_glue(tmp_path / "glue", "cola", SENTENCES)
    model = tiny_checkpoint(tmp_path / "model", kind)
    for method in ("ird", "lora", "diff_pruning"):
        options = run_glue.parse_arguments(
            f"--task cola --method {method} --data-dir {data} --model {model} "
            "--budget 100 --epochs 1 --max-train 32 --held-out 8 "
            f"--output-dir {tmp_path}".split()
            + few_samples(load, method)
        )
        assert 0 < run_glue.run(options)["entries"] <= 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # peers'
def test_both_methods_are_compared_at_the_same_size(
    load, tmp_path, capsys, monkeypatch
):
    compare_lora = load("compare_lora")
    data = write_glue(tmp_path / "glue", "stsb", PAIRS)
    model = tiny_checkpoint(tmp_path / "model", "bert")
    arguments = (
        f"--task stsb --data-dir {data} --model {model} --max-train 32 --held-out 8 "
        "--epochs 1 --seeds 0 1 --ird-lrs 3e-2 --lora-lrs 1e-3 3e-2 "
        f"--output-dir {tmp_path / 'out'}".split()
    )
    found = compare_lora.main(arguments)
    assert {r["entries"] for r in found["ird"]} == {r["entries"] for r in found["lora"]}
    gaps = [
        100 * (a["scores"]["validation"]["score"] - b["scores"]["validation"]["score"])
        for a, b in zip(found["ird"], found["lora"], strict=True)
    ]
    assert found["difference"]["mean"] == pytest.approx(np.mean(gaps))
    half = stats.t.ppf(0.975, 1) * np.std(gaps, ddof=1) / math.sqrt(2)
    assert found["difference"]["high"] == pytest.approx(np.mean(gaps) + half)
    printed = capsys.readouterr().out
    assert "trained entries" in printed
    assert "95 % interval" in printed
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == found
    monkeypatch.delattr(compare_lora, "in_fresh_process")  # nothing is trained again
    assert compare_lora.main(arguments) == found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_rate_of_0_for_the_head_is_recorded(load, tmp_path):
    run_glue = load("run_glue")
    data = write_glue(tmp_path / "glue", "sst2", SENTENCES)
    model = tiny_checkpoint(tmp_path / "model", "bert")
    options = run_glue.parse_arguments(
        f"--task sst2 --method random --data-dir {data} --model {model} --head-lr 0 "
        f"--epochs 0 --held-out 8 --output-dir {tmp_path}".split()
    )
    result = run_glue.run(options)
    assert (result["head_rate"], result["rate"]) == (0.0, options.lr)


# ---- diff pruning


def test_gates_are_hard_concrete(load):
    diff_pruning = load("diff_pruning")
    gate = diff_pruning.GatedChange(torch.zeros(3, dtype=torch.float64))
    gate.change.data = torch.tensor([2.0, 3.0, -1.0], dtype=torch.float64)
    gate.log_odds.data = torch.tensor([0.5, -4.0, 9.0], dtype=torch.float64)
    odds = [0.5, -4.0, 9.0]
    stretched = [3.0 / (1 + math.exp(-o)) - 1.5 for o in odds]
    cut = [min(1.0, max(0.0, z)) for z in stretched]
    wanted = torch.tensor([2 * cut[0], 3 * cut[1], -cut[2]], dtype=torch.float64)
    torch.testing.assert_close(gate.expected(), wanted)
    # P(z > 0), by sampling
    gate.train()
    gate.change.data.fill_(1.0)
    draws = torch.stack([gate(torch.zeros(3).double()).detach() for _ in range(4000)])
    often = (draws != 0).double().mean(0).sum()
    assert float(often) == pytest.approx(float(gate.open_gates().detach()), abs=0.06)


def test_the_penalty_alone_closes_the_gates_of_a_short_training(load):
    diff_pruning = load("diff_pruning")
    gate = diff_pruning.GatedChange(torch.zeros(20))
    options = {"lr": diff_pruning.GATE_RATE, "eps": diff_pruning.GATE_EPS}
    optimizer = torch.optim.AdamW([gate.log_odds], weight_decay=0.0, **options)
    steps = 188  # 2,000 samples, three times, in batches of 32
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (diff_pruning.PENALTY * gate.open_gates()).backward()
        optimizer.step()
        schedule.step()
    assert float(gate.open_gates().detach()) < 1.0
    assert not gate.expected().any()


def test_diff_pruning_keeps_the_largest_changes_and_leaves_the_model_as_new(load):
    diff_pruning = load("diff_pruning")
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(bert_config()).eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    learned = {}

    def fit(gated, groups):
        assert {p for g in groups for p in g["params"]} == {
            p for p in gated.parameters() if p.requires_grad
        }
        random = torch.Generator().manual_seed(1)
        for name, module in gated.named_modules():
            if isinstance(module, diff_pruning.GatedChange):
                module.change.data.normal_(generator=random)
                learned[name] = module.expected().detach()
        gated.classifier.weight.data.fill_(7.0)

    selection, changes = diff_pruning.prune(model, 50, fit)
    assert len(selection) == 50
    assert {n for n, _ in model.named_parameters()} == set(before)
    for name, parameter in model.named_parameters():
        if not name.startswith("classifier."):
            assert parameter.equal(before[name]), name
    assert (model.classifier.weight == 7.0).all()  # what was learned with the changes
    everything = sorted(float(x) for c in learned.values() for x in c.abs().flatten())
    kept = sorted(
        float(x) for named in changes.values() for c in named.values() for x in c.abs()
    )
    assert kept == everything[-50:]
    for module, named in selection.indices.items():
        for name, flat in named.items():
            source = learned[f"{module}.parametrizations.{name}.0"].flatten()
            assert source[flat.long()].equal(changes[module][name])


def test_every_method_has_a_rate_of_its_own(load):
    run_glue, methods, experiment = map(load, ("run_glue", "methods", "experiment"))
    assert methods.RATES.keys() == methods.METHODS.keys()
    for method, rate in methods.RATES.items():
        given = ["--task", "rte", "--model", "m", "--method", method]
        assert run_glue.parse_arguments(given).lr == rate
        assert rate in experiment.LADDER
    assert run_glue.parse_arguments([*given, "--lr", "0.5"]).lr == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--budget 0", "must be at least 1, got 0"),
        ("--max-train -3", "must be at least 1, got -3"),
        ("--held-out -1", "must be at least 0, got -1"),
        ("--head-lr 1 --method diff_pruning", "--head-lr is not for Diff Pruning"),
        ("--head-lr 0 --method diff_pruning", "--head-lr is not for Diff Pruning"),
        ("--budget 9 --method bias", "--budget is not for --method bias"),
        ("--budget 9 --method full", "--budget is not for --method full"),
        ("--budget 9 --method head-only", "--budget is not for --method head-only"),
        ("--budget 9 --method lora-everywhere", "not for --method lora-everywhere"),
        ("--density 5", "--density: must be in (0, 1], got 5"),
        ("--density -1", "--density: must be in (0, 1], got -1"),
        ("--epochs -1", "--epochs: must be at least 0, finite, got -1"),
        ("--lr -1", "--lr: must be at least 0, finite, got -1"),
        ("--lr nan", "--lr: must be at least 0, finite, got nan"),
        ("--options [1]", "--options: must be a JSON object, got [1]"),
        ("--dens 0.1", "unrecognized arguments: --dens 0.1"),
        ("--rank 2 --budget 9 --method lora", "--rank or --budget, not both"),
        ("--rank 2", "--rank is for LoRA, not for --method ird"),
        ('--method lora --options {"scope":"global"}', "not for lora"),
        ('--options {"bogus":1}', "bogus: not among the options"),
        ('--options {"seed":1,"scope":"global"}', "seed: not among"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(load, arguments, message, capsys):
    run_glue = load("run_glue")
    with pytest.raises(SystemExit):
        run_glue.parse_arguments(["--task", "rte", "--model", "m", *arguments.split()])
    assert message in capsys.readouterr().err


def test_the_head_may_have_a_rate_of_its_own(load):
    run_glue = load("run_glue")
    given = ["--task", "rte", "--model", "m", "--lr", "0.5"]
    config = IRDConfig(task_type="SEQ_CLS", method="random", density=0.1)
    model = get_peft_model(BertForSequenceClassification(bert_config()), config)
    assert run_glue.rate_groups(model, run_glue.parse_arguments(given)) is None
    options = run_glue.parse_arguments([*given, "--head-lr", "0.25"])
    groups = run_glue.rate_groups(model, options)
    rates = {
        id(p): group["lr"]
        for group in torch.optim.AdamW(groups, lr=options.lr).param_groups
        for p in group["params"]
    }
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(trained)
    for name, parameter in trained.items():
        assert rates[id(parameter)] == (0.25 if "classifier" in name else 0.5), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ird-method typo", "invalid choice: 'typo'"),
        ('--ird-options {"bogus":1}', "bogus: not among the options"),
        ("--ird-options [1]", "--ird-options: must be a JSON object, got [1]"),
        ("--ird-lrs -1", "--ird-lrs: must be at least 0, finite, got -1"),
        ("--lr 0.1", "--lr: set by this script"),
        ("--seed 5", "--seed: set by this script"),
        ("--dens 0.1", "unrecognized arguments: --dens 0.1"),
        ("--opt {}", "unrecognized arguments: --opt {}"),
        ("--held-out 0", "must be at least 1"),
    ],
)
def test_a_comparison_complains_before_it_trains(load, arguments, message, capsys):
    given = ["--task", "rte", "--model", "m", *arguments.split()]
    with pytest.raises(SystemExit):
        load("compare_lora").parse_arguments(given)
    assert message in capsys.readouterr().err


# ---- experiments


@pytest.fixture
def lists(load, monkeypatch, tmp_path):
    experiment = load("experiment")
    monkeypatch.setattr(experiment, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(experiment, "EXPERIMENTS", tmp_path)
    return experiment


@pytest.fixture
def runner(load, lists):  # noqa: ARG001 (its folders)
    return load("glue_runs")


LIST = """
model = "tiny"
train = { others = 32, sst2 = 40 }
epochs = 1
seeds = [3, 4]
tuning = ["sst2"]

[rows]
"A" = { method = "random", rate = 1e-2 }
"B" = { method = "head-only", rate = 1e-1 }

[[rounds]]
tasks = ["sst2"]
densities = [0.01]
rows = ["B"]

[[rounds]]
tasks = ["sst2"]
densities = [0.01]
"""


def outcome(lists, row, rate, seed, held_out):
    job = lists.Job("list", "sst2", row, 0.01, rate, seed)
    scores = {"held_out": {"score": held_out}, "validation": {"score": 0.5}}
    return {"job": asdict(job), "scores": scores}


def test_a_seed_climbs_to_the_best_rate_and_the_others_take_it(lists, tmp_path):
    (tmp_path / "list.toml").write_text(LIST)
    experiment = lists.Experiment.load("list")
    results = []

    def planned(row="A"):
        jobs = dict.fromkeys(experiment.jobs(results))
        new = [j for j in jobs if j.row == row]
        done = [r["job"] for r in results]
        return [(j.rate, j.seed) for j in new if asdict(j) not in done]

    def add(rate, held_out, row="A", seed=3):
        results.append(outcome(lists, row, rate, seed, held_out))

    assert planned() == [(3e-3, 3), (1e-2, 3), (3e-2, 3)]
    add(1e-2, 0.6)
    add(3e-3, 0.7)
    assert planned() == [(3e-2, 3)]  # both neighbours of the start, whatever is best
    results.pop()
    add(3e-3, 0.5)
    add(3e-2, 0.7)
    assert planned() == [(1e-1, 3)]  # the best so far is at the edge
    add(1e-1, 0.7)
    assert planned() == [(3e-2, 4)]  # of equals the smaller one
    add(3e-2, 0.1, seed=4)
    assert planned() == []
    assert planned("B") == [(3e-2, 3), (1e-1, 3)]
    add(1e-1, 0.9, row="B")
    add(3e-2, 0.8, row="B")
    assert planned("B") == [(1e-1, 4)]  # the ladder ends here


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_runner_writes_a_file_per_run_and_repeats_none(
    runner, lists, tmp_path, capsys
):
    (tmp_path / "list.toml").write_text(LIST)
    data = write_glue(tmp_path / "glue", "sst2", SENTENCES)
    tiny_checkpoint(tmp_path / "tiny", "bert")
    arguments = ["list", "--data-dir", str(data), "--models", str(tmp_path)]
    runner.main([*arguments, "--minutes", "-1"])
    assert not lists.load_results("list")
    runner.main(arguments)
    results = lists.load_results("list")
    found = {(r["job"]["row"], r["job"]["rate"], r["job"]["seed"]) for r in results}
    assert {("A", 1e-2, 3), ("A", 3e-3, 3), ("A", 3e-2, 3), ("B", 1e-1, 3)} < found
    assert sum(seed == 4 for _, _, seed in found) == 2
    assert len(found) == len(results)
    assert {r["train"] for r in results} == {40}
    assert str(tmp_path) not in json.dumps(results)
    capsys.readouterr()
    runner.main(arguments)
    assert not capsys.readouterr().out


def test_a_killed_worker_costs_no_run(runner, lists, tmp_path, monkeypatch, capsys):
    (tmp_path / "list.toml").write_text(LIST)
    started = []

    class Pool:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, _, job, *__):
            started.append(job)
            future = Future()
            unlucky = job.row == "A" and job.rate == 3e-3
            if unlucky or len(started) == 2:
                future.set_exception(BrokenProcessPool())
            elif job.row == "A" and job.rate == 3e-2:
                future.set_exception(ValueError("no such thing"))
            else:
                found = outcome(lists, job.row, job.rate, job.seed, job.rate)
                future.set_result({**found, "seconds": {"train": 1.0}})
            return future

    monkeypatch.setattr(runner, "ProcessPoolExecutor", Pool)
    runner.main(["list", "--models", str(tmp_path)])
    tries = Counter((job.row, job.rate, job.seed) for job in started)
    assert tries.pop(("A", 3e-3, 3)) == 2  # its worker is killed each time
    second = started[1]
    assert tries.pop((second.row, second.rate, second.seed)) == 2
    assert set(tries.values()) == {1}
    printed = capsys.readouterr().out
    assert printed.count("A worker was killed") == 3
    assert "no such thing" in printed
    done = {Path(path).stem for path in lists.FOLDER.glob("list/*.json")}
    assert done >= {"sst2_b_1_0.1_3", "sst2_b_1_0.1_4", "sst2_a_1_0.01_3"}


def test_a_list_of_another_model_needs_its_folder(runner, tmp_path, capsys):
    (tmp_path / "list.toml").write_text(LIST)
    with pytest.raises(SystemExit):
        runner.main(["list", "--minutes", "-1"])
    assert "list is for tiny: pass --models FOLDER" in capsys.readouterr().err


# ---- tables


def flips(pairs):
    """All sign flips, one by one."""
    sums = [
        abs(sum(s * p for s, p in zip(signs, pairs, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(pairs))
    ]
    return sum(s >= abs(sum(pairs)) - 1e-9 for s in sums) / len(sums)


@pytest.mark.usefixtures("lists")
def test_differences_are_paired_over_tasks_and_seeds(load):
    glue_table = load("glue_table")
    ours = {("a", 0): 3.0, ("a", 1): 5.0, ("b", 0): 4.0, ("c", 0): 9.0, ("d", 0): 0.0}
    theirs = {("a", 0): 1.0, ("a", 1): 5.5, ("b", 0): 5.0, ("c", 0): 2.0, ("e", 0): 1.0}
    found = glue_table.compared(ours, theirs)
    pairs = [2.0, -1.0, 7.0]
    assert found["pairs"] == 3  # of the seed that all common tasks have
    assert found["mean"] == pytest.approx((2.0 - 1.0 + 7.0) / 3)
    assert (found["not_worse"], found["tasks"]) == (2, 3)
    assert found["p"] == pytest.approx(flips(pairs))
    assert found["p_tasks"] == pytest.approx(flips([2.0, -1.0, 7.0]))
    assert found["without"] == pytest.approx(np.mean(pairs))
    worse = {**ours, ("wnli", 0): 0.0}, {**theirs, ("wnli", 0): 90.0}
    found = glue_table.compared(*worse)
    assert found["mean"] == pytest.approx((2.0 - 1.0 + 7.0 - 90.0) / 4)
    assert found["without"] == pytest.approx(np.mean(pairs))
    more = {("a", 0): 4.0, ("a", 1): 2.0, ("b", 0): -1.0, ("b", 1): -2.0}
    found = glue_table.compared(more, dict.fromkeys(more, 0.0))
    assert found["p"] == pytest.approx(flips([*more.values()]))
    assert found["p_tasks"] == pytest.approx(flips([3.0, -1.5])) != found["p"]
    late = {**more, ("c", 0): 9.0}  # a task that has just begun waits
    assert glue_table.compared(late, dict.fromkeys(late, 0.0)) == found
    equal = glue_table.compared({("a", 0): 0.1 + 0.2}, {("a", 0): 0.3 + 1e-15})
    assert equal["not_worse"] == 1
    found = glue_table.compared(ours, theirs)
    half = stats.t.ppf(0.975, 2) * np.std(pairs, ddof=1) / math.sqrt(3)
    assert found["high"] == pytest.approx(np.mean(pairs) + half)


def test_the_tables_show_each_row_at_its_best_rate(lists, load, tmp_path):
    glue_table = load("glue_table")
    (tmp_path / "list.toml").write_text(LIST)
    experiment = lists.Experiment.load("list")

    def add(task, rate, seed, held_out, score):
        result = outcome(lists, "A", rate, seed, held_out)
        result["job"]["task"] = task
        job = lists.Job(**result["job"])
        result["scores"]["validation"]["score"] = score
        facts = {"entries": 7, "rate": rate, "budget": 7, "versions": VERSIONS}
        facts |= {"task": task, "precision": "highest"}
        facts["train"] = 40 if task == "sst2" else 32
        job.path.parent.mkdir(parents=True, exist_ok=True)
        job.path.write_text(json.dumps({**result, **facts}))

    constants = {"sst2": 0.5, "cola": 0.0, "rte": 0.7}
    for rate, held_out in ((3e-3, 0.1), (1e-2, 0.3), (3e-2, 0.2)):
        for seed in (3, 4):
            add("sst2", rate, seed, held_out, 10 * rate + seed / 100)
    text = glue_table.score_table(experiment, 0.01, "tiny", constants)
    assert "| A | 7 | 13.5 ± 0.7 | 0.01 |" in text
    assert "| a constant answer | 0 | 50.0 |  |" in text
    assert "SST-2 40" in text
    assert "in brackets; accuracy." in text
    assert "| B |" not in text
    add("cola", 1e-2, 3, 0.0, 0.2)
    add("cola", 3e-2, 3, 0.9, 0.9)  # not the rate that the tuning tasks chose
    text = glue_table.score_table(experiment, 0.01, "tiny", constants)
    assert "|  | entries | CoLA | SST-2 | mean | rate |" in text
    assert "| A | 7 | 20.0 (1) | 13.5 ± 0.7 |  | 0.01 |" in text  # a seed is missing
    assert "| a constant answer | 0 | 0.0 | 50.0 | 25.0 |  |" in text
    assert "CoLA: Matthews; others: accuracy." in text
    add("cola", 1e-2, 4, 0.0, 0.2)
    text = glue_table.score_table(experiment, 0.01, "tiny", constants)
    assert "| A | 7 | 20.0 ± 0.0 | 13.5 ± 0.7 | 16.8 | 0.01 |" in text


@pytest.mark.usefixtures("lists")
def test_a_constant_answer_is_that_of_most_training_labels(load, tmp_path, monkeypatch):
    constants = load("glue_constants")
    monkeypatch.setattr(constants, "PATH", tmp_path / "constants.json")
    splits = {"train": [0, 1, 1, 0, 0], "validation": [0, 0, 0, 1]}
    for split, labels in splits.items():
        pairs = {name: ["a"] * len(labels) for name in ("sentence1", "sentence2")}
        write_glue(tmp_path, "mrpc", {**pairs, "label": labels}, (split,))
    values = {"sentence1": ["a"] * 3, "sentence2": ["b"] * 3, "label": [0.5, 2.0, 5.0]}
    write_glue(tmp_path, "stsb", values)
    constants.main(["--data-dir", str(tmp_path), "--tasks", "mrpc", "stsb"])
    scores = json.loads((tmp_path / "constants.json").read_text())["scores"]
    f1 = 0.0  # of label 1, which is never the answer
    assert scores == {"mrpc": pytest.approx((f1 + 3 / 4) / 2), "stsb": 0.0}


VERSIONS = {"torch": "0", "peft": "0"}


def fill(lists, tmp_path):
    """Write the results of two rows at two densities, with selections."""
    (tmp_path / "list.toml").write_text(LIST.replace("1e-1", "1e-2"))
    for row, rate, density, seed in itertools.product(
        "AB", (3e-3, 1e-2, 3e-2), (0.01, 0.001), (3, 4)
    ):
        job = lists.Job("list", "sst2", row, density, rate, seed)
        result = outcome(lists, row, rate, seed, 0.5 - abs(rate - 1e-2))
        parts = {
            "layer": {"0": [3, 0.25], "outside": [9, 0.75]},
            "kind": {"q": [12, 1]},
        }
        facts = {"entries": 7, "rate": rate, "budget": 7, "selection": parts}
        job.path.parent.mkdir(parents=True, exist_ok=True)
        job.path.write_text(json.dumps({**result, **facts, "job": asdict(job)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "fish"}, "was run with method 'fish', but the list"),
        ({"train": 39}, "was run with train 39, but the list asks for 40"),
        ({"rank": 2}, "was run with rank 2, but the list asks for None"),
    ],
)
def test_a_result_of_other_settings_is_not_taken(lists, tmp_path, change, message):
    fill(lists, tmp_path)
    assert len(lists.load_results("list")) == 24
    text = LIST.replace("1e-1", "1e-2")
    (tmp_path / "list.toml").write_text(text.replace('"B" =', '"C" ='))
    assert len(lists.load_results("list")) == 12
    (tmp_path / "list.toml").write_text(text)
    path = sorted((tmp_path / "results" / "list").glob("*.json"))[0]
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        lists.load_results("list")


def test_small_tasks_are_trained_on_what_they_have(lists, tmp_path):
    (tmp_path / "list.toml").write_text(LIST.replace("others = 32", "others = 600"))
    job = lists.Job("list", "wnli", "A", 0.01, 1e-2, 3)
    job.path.parent.mkdir(parents=True)
    result = {"job": asdict(job), "train": 508, "rank": None}
    job.path.write_text(json.dumps(result))
    assert lists.load_results("list") == [result]


def test_the_figures_show_every_row(lists, load, tmp_path):
    fill(lists, tmp_path)
    results = lists.load_results("list")
    density = load("glue_density")
    with pytest.raises(ValueError, match="no results"):
        density.draw([])
    one = [result for result in results if result["job"]["density"] == 0.01]
    with pytest.raises(ValueError, match="at several densities"):
        density.draw(one)
    (panel,) = density.draw(results).axes
    assert [len(bars.lines[0].get_xdata()) for bars in panel.containers] == [2, 2]
    left, right = load("glue_budget").draw(results).axes
    assert [text.get_text() for text in left.texts] == ["25", "75"] * 2
    assert [text.get_text() for text in right.texts] == ["100"] * 2


def test_densities_are_compared_over_the_tasks_and_seeds_that_all_have(
    lists, load, tmp_path
):
    fill(lists, tmp_path)
    results = lists.load_results("list")
    for result in results:
        job = result["job"]
        score = 0.1 * job["seed"] + 10 * job["density"]
        result["scores"]["validation"]["score"] = score
        result["entries"] = 7 if job["row"] == "A" else round(1000 * job["density"])
    cola = [copy.deepcopy(r) for r in results if r["job"]["density"] == 0.01]
    for result in cola:
        result["job"]["task"] = "cola"
    few = [r for r in results if (r["job"]["density"], r["job"]["seed"]) != (0.001, 4)]
    text = load("glue_density").table([*few, *cola])
    assert "|  | 0.1 % | 1 % |" in text
    assert "| A | 31.0 (1) | 45.0 ± 7.1 |" in text
    assert "Mean of SST-2, " in text
    assert "Entries: 7, 7; B: 1, 10." in text
    both = [copy.deepcopy(r) for r in few if r["job"]["seed"] == 3]
    for result in both:
        result["job"]["task"] = "cola"
        result["scores"]["validation"]["score"] += 0.2
    text = load("glue_density").table([*few, *both])
    assert "| A | 41.0 (1) | 50.0 (1) |" in text
    assert "Mean of CoLA, SST-2, " in text


def test_a_search_refuses_what_it_would_ignore(load, capsys):
    given = "--task rte --model m --method=fish --rank 1 --budget 9 --density 0.1 "
    given += "--head-lr 1 --options {} --save --lr 0.1"
    with pytest.raises(SystemExit):
        load("search_study").parse_arguments(given.split())
    assert (
        "--budget, --density, --head-lr, --method, --options, --rank, --save: not for"
    ) in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_staircases_are_searched_written_and_drawn(load, tmp_path, monkeypatch):
    search_study = load("search_study")
    monkeypatch.setattr(search_study, "RESULTS", tmp_path)
    rows = {name: values * 3 for name, values in SENTENCES.items()}
    data = write_glue(tmp_path / "glue", "sst2", rows)
    model = tiny_checkpoint(tmp_path / "model", "bert")
    arguments = (
        f"--task sst2 --data-dir {data} --model {model} --held-out 32 "
        f"--epochs 1 --batch-size 4 --output-dir {tmp_path / 'out'}"
    ).split()
    search_study.main(arguments)
    content = json.loads((tmp_path / "search-sst2.json").read_text())
    assert str(tmp_path) not in json.dumps(content)
    whole = content["searches"]["ird"]
    assert [record["cell"][0] for record in whole] == [128, 32, 32, 16, 16, 1, 1]
    scores = [record["outcomes"][-1]["score"] for record in whole]
    facts = content["halving"]
    assert facts["best_score"] == max(scores)
    assert facts["score"] <= max(scores)
    assert facts["steps_in_trainings"] <= search_study.COST
    assert "MiniLM, 128 training samples" in search_study.table(content)
    pictures = {
        search_study.draw_staircases: ["FISH Mask", "IRD"],
        search_study.draw_contrast: ["IRD", "reverse IRD"],
    }
    for draw, titles in pictures.items():
        texts = [text.get_text() for text in draw(content).findobj(Text)]
        assert set(titles) <= set(texts)
