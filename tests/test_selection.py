"""Selection against a brute-force reference in float64."""

import contextlib
import copy
import math
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertForMultipleChoice,
    BertForPreTraining,
    PatchTSTConfig,
    PatchTSTForRegression,
)

from peft_ird import Calibration, IRDConfig, Selection, select_parameters
from peft_ird.adapter.targets import find_candidates
from peft_ird.selection import fisher
from peft_ird.selection.fisher import FisherEstimator
from peft_ird.selection.gradients.lending import borrowed
from peft_ird.selection.sampling import check_labels, with_sampled_labels
from tests import oracles
from tests.conftest import (
    as_batch,
    bert_config,
    make_model,
    make_samples,
    task_type,
)
from tests.oracles import TOL

HEADS = ("classifier", "score", "qa_outputs")


def candidate_names(model: nn.Module) -> list[str]:
    """Every parameter outside the head; tied ones once."""
    return [
        name
        for name, _ in model.named_parameters()
        if name.rpartition(".")[0].split(".")[0] not in HEADS
    ]


def flat(selection: Selection, model: nn.Module) -> list[int]:
    """Positions in the concatenation of all candidates."""
    positions, offset = [], 0
    parameters = dict(model.named_parameters())
    for name in candidate_names(model):
        module, _, parameter = name.rpartition(".")
        chosen = selection.indices.get(module, {}).get(parameter, torch.empty(0))
        positions += [offset + int(i) for i in chosen]
        offset += parameters[name].numel()
    return positions


def problem(name: str, count: int = 12):
    model = make_model(name).double()
    samples = make_samples(name, count)
    batches = [as_batch(sample) for sample in samples]
    if name == "bert-regression":
        batches = [{**b, "labels": b["labels"].double()} for b in batches]
    gradients = oracles.sample_gradients(model, batches, candidate_names(model))
    return model, Calibration(batches), gradients


def config(name: str, **options) -> IRDConfig:
    return IRDConfig(task_type=task_type(name), **options)


def joined(stream) -> torch.Tensor:
    """One flat tensor of what is yielded parameter by parameter."""
    return torch.cat([scores for _, scores in stream])


def parts_of(pool, positions: torch.Tensor) -> list[torch.Tensor]:
    """Positions in the concatenation, cut into positions in each parameter."""
    parts, start = [], 0
    for size in pool.sizes:
        inside = positions[(positions >= start) & (positions < start + size)]
        parts.append(inside - start)
        start += size
    return parts


def test_fisher_and_scores_equal_the_one_sample_oracle(any_name):
    model, calibration, gradients = problem(any_name)
    pool = find_candidates(model, config(any_name, density=0.1))
    assert [".".join(pair) for pair in pool.names] == candidate_names(model)
    samples = tuple(range(12))
    entries = torch.arange(0, len(pool), 3)
    with borrowed(model):
        estimator = FisherEstimator(model, pool, calibration)
        found = joined(estimator.fisher(samples))
        over_all = estimator.sample_scores(samples, None)
        over_some = estimator.sample_scores(samples, parts_of(pool, entries))
        gradient = joined(estimator.mean_gradient(samples))
    squares = gradients.square()
    assert_close(found, squares.mean(0), **TOL[torch.float64])
    assert_close(over_all, squares.sum(1), **TOL[torch.float64])
    assert_close(over_some, squares[:, entries].sum(1), **TOL[torch.float64])
    assert_close(gradient, gradients.mean(0), **TOL[torch.float64])


@pytest.mark.parametrize("count", [1, 3, 12])
def test_samples_whose_norm_is_too_small_are_not_scored(name, count, monkeypatch):
    monkeypatch.setattr(fisher, "_FEW_TOKENS", math.inf)
    model, calibration, gradients = problem(name)
    pool = find_candidates(model, config(name, density=0.1))
    squares = gradients.square()
    entries = squares.mean(0).topk(len(pool) // 50).indices.sort().values
    parts, samples = parts_of(pool, entries), list(range(12))
    with borrowed(model):
        estimator = FisherEstimator(model, pool, calibration)
        estimator.remember(samples)
        found = estimator.sample_scores(samples, parts, count)
    by_part = zip(squares.split(list(pool.sizes), 1), parts, strict=True)
    norms = sum(block.sum(1) for block, part in by_part if len(part))
    scores = squares[:, entries].sum(1)
    least = scores[norms.topk(count).indices].min()
    is_scored = norms >= least
    assert is_scored.all() == (count == 12)
    assert_close(found[is_scored], scores[is_scored], **TOL[torch.float64])
    assert (found[~is_scored] == -1).all()


@pytest.mark.parametrize("keep", [False, True])
def test_all_samples_are_scored_where_norms_are_dear(name, keep, monkeypatch):
    monkeypatch.setattr(fisher, "_FEW_TOKENS", math.inf if not keep else 0)
    model, calibration, gradients = problem(name)
    pool = find_candidates(model, config(name, density=0.1))
    entries = torch.arange(0, len(pool), 50)
    samples = list(range(12))
    with borrowed(model):
        estimator = FisherEstimator(model, pool, calibration)
        if keep:
            estimator.remember(samples)
        found = estimator.sample_scores(samples, parts_of(pool, entries), 1)
    scores = gradients.square()[:, entries].sum(1)
    assert_close(found, scores, **TOL[torch.float64])


def test_fisher_in_float32_is_close_to_float64(name):
    _, _, gradients = problem(name)
    model = make_model(name)
    pool = find_candidates(model, config(name, density=0.1))
    calibration = Calibration([as_batch(s) for s in make_samples(name)])
    with borrowed(model):
        estimator = FisherEstimator(model, pool, calibration)
        found = joined(estimator.fisher(tuple(range(12))))
    assert found.dtype == torch.float32
    expected = gradients.square().mean(0)
    error = (found.double() - expected).abs().max()
    assert error <= 1e-5 * expected.max()


CELLS = [(12, 0.2), (6, 0.2), (6, 0.05), (2, 0.05), (1, 0.01)]


@pytest.mark.parametrize("sample_score", ["selected", "all"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("method", ["ird", "reverse_ird"])
def test_range_decreasing_equals_the_brute_force(
    name, method, nested, sample_score, monkeypatch
):
    monkeypatch.setattr(fisher, "_FEW_TOKENS", math.inf)
    model, calibration, gradients = problem(name)
    selection = select_parameters(
        model,
        config(
            name, density=0.01, method=method, num_samples=12, schedule=CELLS,
            nested=nested, sample_score=sample_score,
        ),
        calibration,
    )  # fmt: skip
    size = gradients.shape[1]
    samples, entries = oracles.range_decreasing(
        gradients,
        list(range(12)),
        [(n, max(1, round(d * size))) for n, d in CELLS],
        reverse=method == "reverse_ird",
        nested=nested,
        over_all=sample_score == "all",
    )
    assert list(selection.samples) == samples
    assert flat(selection, model) == entries
    assert list(selection.stages) == CELLS
    assert len(selection) == len(entries) == max(1, round(0.01 * size))


def test_halving_walks_the_cells_that_it_names(name):
    model, calibration, gradients = problem(name)
    options = {"density": 0.03, "num_samples": 12, "initial_density": 0.1}
    selection = select_parameters(model, config(name, **options), calibration)
    cells = [(12, 0.1), (6, 0.1), (6, 0.05), (3, 0.05), (3, 0.03)]
    assert list(selection.stages) == cells
    size = gradients.shape[1]
    _, entries = oracles.range_decreasing(
        gradients, list(range(12)), [(n, round(d * size)) for n, d in cells]
    )
    assert flat(selection, model) == entries


def test_fish_on_all_samples_is_the_top_k_of_the_fisher_information(any_name):
    model, calibration, gradients = problem(any_name)
    options = {"budget": 77, "method": "fish", "num_samples": 12}
    selection = select_parameters(model, config(any_name, **options), calibration)
    fisher = gradients.square().mean(0).tolist()
    assert flat(selection, model) == oracles.best(fisher, 77)
    assert selection.samples == tuple(range(12))


def test_the_scores_kept_are_the_fisher_information_of_the_entries(name):
    model, calibration, gradients = problem(name)
    options = {"budget": 20, "method": "fish", "num_samples": 12}
    selection = select_parameters(model, config(name, **options), calibration)
    kept = torch.cat([s for tree in selection.scores.values() for s in tree.values()])
    expected = gradients.square().mean(0)[flat(selection, model)]
    assert_close(kept, expected, **TOL[torch.float64])


def test_gradient_ranks_by_the_absolute_mean_gradient(name):
    model, calibration, gradients = problem(name)
    options = {"budget": 33, "method": "gradient", "num_samples": 12}
    selection = select_parameters(model, config(name, **options), calibration)
    assert flat(selection, model) == oracles.best(gradients.mean(0).abs().tolist(), 33)


def weights(model: nn.Module, names: list[str]) -> torch.Tensor:
    parameters = dict(model.named_parameters())
    return torch.cat([parameters[name].detach().flatten() for name in names])


def test_magnitude_takes_the_largest_weights(name):
    model = make_model(name)
    options = {"density": 0.02, "method": "magnitude"}
    selection = select_parameters(model, config(name, **options))
    magnitudes = weights(model, candidate_names(model)).abs().tolist()
    assert flat(selection, model) == oracles.best(magnitudes, len(selection))


def test_bias_takes_every_bias_or_the_largest_of_them(name):
    model = make_model(name)
    names = candidate_names(model)
    sizes = [dict(model.named_parameters())[n].numel() for n in names]
    is_bias = torch.cat(
        [
            torch.full((s,), n.endswith("bias"))
            for n, s in zip(names, sizes, strict=True)
        ]
    )
    if not is_bias.any():
        with pytest.raises(ValueError, match="no targeted module has a bias"):
            select_parameters(model, config(name, method="bias"))
        return
    everything = select_parameters(model, config(name, method="bias"))
    assert flat(everything, model) == is_bias.nonzero().flatten().tolist()
    some = select_parameters(model, config(name, method="bias", budget=5))
    magnitudes = torch.where(is_bias, weights(model, names).abs(), -1.0).tolist()
    assert flat(some, model) == oracles.best(magnitudes, 5)


def test_biases_have_many_names():
    model = nn.ModuleDict({"lstm": nn.LSTM(2, 3), "mha": nn.MultiheadAttention(4, 2)})
    selection = select_parameters(model, IRDConfig(method="bias"))
    names = {n for parameters in selection.indices.values() for n in parameters}
    assert names == {"bias_ih_l0", "bias_hh_l0", "in_proj_bias", "bias"}


def test_random_is_uniform_and_depends_on_the_seed_alone():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    counts = torch.zeros(18)
    for seed in range(600):
        selection = select_parameters(
            model, IRDConfig(budget=6, method="random", seed=seed)
        )
        counts[flat(selection, model)] += 1
    assert counts.sum() == 3600
    # 200 expected for each entry, with standard deviation 11.5
    assert counts.min() > 145
    assert counts.max() < 255


@pytest.mark.parametrize(
    "method", ["ird", "reverse_ird", "fish", "gradient", "random", "magnitude"]
)
def test_per_module_budgets_are_shares_by_size(method):
    model = make_model("bert")
    options = {"density": 0.05, "method": method, "scope": "per_module"}
    selection = select_parameters(
        model, config("bert", num_samples=4, **options), make_samples("bert")
    )
    sizes = {}
    for name in candidate_names(model):
        module = name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + model.get_parameter(name).numel()
    expected = oracles.shares(list(sizes.values()), len(selection))
    found = [sum(selection.counts.get(m, {}).values()) for m in sizes]
    if method == "reverse_ird":  # each step shares out what the one before left
        assert all(abs(a - b) <= 3 for a, b in zip(found, expected, strict=True))
    else:
        assert found == expected
    assert sum(found) == max(1, round(0.05 * sum(sizes.values())))


def test_the_first_samples_are_drawn_by_the_seed():
    model = make_model("bert")
    data = make_samples("bert", 30)

    def kept(seed):
        options = {"density": 0.01, "method": "fish", "num_samples": 7, "seed": seed}
        return select_parameters(model, config("bert", **options), data).samples

    assert kept(0) == kept(0)
    assert len(set(kept(0))) == 7
    assert list(kept(0)) == sorted(kept(0))
    assert len({kept(seed) for seed in range(5)}) > 1


def test_the_same_seed_gives_the_same_indices_whatever_the_global_state(name):
    model, calibration, _ = problem(name)
    options = {"density": 0.01, "num_samples": 8, "seed": 3}
    torch.manual_seed(1)
    one = select_parameters(model, config(name, **options), calibration)
    torch.manual_seed(2)
    model.train()
    two = select_parameters(model, config(name, **options), calibration)
    assert flat(one, model) == flat(two, model)
    assert one.samples == two.samples


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ird", {}),
        ("ird", {"temperature": 1.0}),
        ("ird", {"head_warmup_steps": 2}),
        ("ird", {"scope": "per_module", "fisher": "sampled"}),
        ("random", {}),
        ("magnitude", {}),
    ],
)
@pytest.mark.parametrize(
    "around", [torch.inference_mode, torch.no_grad, partial(torch.device, "meta")]
)
def test_a_selection_does_not_depend_on_modes_around_it(method, settings, around):
    model, samples = make_model("bert"), make_samples("bert", 8)
    options = config("bert", density=0.01, num_samples=8, method=method, **settings)
    expected = select_parameters(model, options, samples)
    with around():
        found = select_parameters(model, options, samples)
    assert flat(found, model) == flat(expected, model)
    assert_close(found.sample_scores, expected.sample_scores)


@pytest.mark.parametrize("method", ["ird", "gradient", "random"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(method, fails):
    model = make_model("bert").train()
    model.bert.encoder.layer[0].eval()
    frozen = model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    settings = model.config.to_dict()
    data = make_samples("bert")
    if fails:
        data[5] = {**data[5], "labels": 9}
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    options = {"density": 0.1, "num_samples": 12, "method": method}
    expected = pytest.raises(ValueError, match="labels of calibration sample 5")
    with expected if fails and method != "random" else contextlib.nullcontext():
        select_parameters(model, config("bert", **options), data)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not frozen.requires_grad
    assert model.bert.pooler.dense.weight.grad is None
    assert torch.equal(
        model.classifier.weight.grad, torch.ones_like(model.classifier.weight)
    )
    assert model.config.to_dict() == settings
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


class Pairs(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class SizedStream(Stream):
    """Says how long it is, as some that read files do."""

    def __len__(self):
        return len(self.rows)


def collate(samples):
    width = max(len(s["input_ids"]) for s in samples)
    rows = {
        name: torch.tensor([s[name] + [0] * (width - len(s[name])) for s in samples])
        for name in ("input_ids", "attention_mask")
    }
    return {**rows, "labels": torch.tensor([s["labels"] for s in samples])}


def forms(samples):
    """The same samples in every form that is accepted."""
    datasets = pytest.importorskip("datasets")
    padded = collate(samples)
    raw = [{**s, "sentence": "some text", "idx": i} for i, s in enumerate(samples)]
    renamed = [{k.replace("labels", "label"): v for k, v in s.items()} for s in samples]
    return {
        "list of ragged samples": samples,
        "with a collate_fn": Calibration(samples, collate),
        "with columns that the model does not take": Calibration(raw, collate),
        "label instead of labels": renamed,
        "list of batches of one": [as_batch(s) for s in samples],
        "torch dataset": Pairs(samples),
        "datasets.Dataset": datasets.Dataset.from_list(raw),
        "datasets.Dataset of tensors": datasets.Dataset.from_list(samples).with_format(
            "torch"
        ),
        "dataloader": DataLoader(samples, batch_size=5, collate_fn=collate),
        "dictionary of tensors": padded,
        "dictionary of lists": {k: v.tolist() for k, v in padded.items()},
        "generator": (sample for sample in samples),
        "iterable dataset": Stream(samples),
        "iterable dataset of a known length": SizedStream(samples),
        "with words": [{**s, "words": ["some", "text"]} for s in samples],
        "dictionary of ragged lists": {k: [s[k] for s in samples] for k in samples[0]},
    }


def test_every_form_of_data_gives_the_same_selection():
    model = make_model("bert").double()
    samples = make_samples("bert", 8)
    found = {}
    for form, data in forms(samples).items():
        options = {"budget": 40, "num_samples": 8, "initial_density": 0.1}
        selection = select_parameters(model, config("bert", **options), data)
        found[form] = (flat(selection, model), selection.samples)
    expected = found["list of ragged samples"]
    assert all(each == expected for each in found.values()), found


@pytest.mark.parametrize("form", ["lists", "tensors", "tensors and collate_fn"])
def test_one_of_several_choices(form):
    """A sample has as many rows as there are choices, and more of those than labels."""
    torch.manual_seed(0)
    model = BertForMultipleChoice(bert_config()).double().eval()
    rows = make_samples("bert", 12)
    samples = []
    for i in range(3):
        batch = collate(rows[4 * i : 4 * i + 4])
        samples.append({**batch, "labels": torch.tensor(3 - i)})
    data = {
        "lists": [{k: v.tolist() for k, v in s.items()} for s in samples],
        "tensors": samples,
        "tensors and collate_fn": Calibration(samples, default_collate),
    }[form]
    settings = IRDConfig(budget=40, method="fish", modules_to_save=["classifier"])
    selection = select_parameters(model, settings, data)
    batches = [{k: v[None] for k, v in s.items()} for s in samples]
    gradients = oracles.sample_gradients(model, batches, candidate_names(model))
    expected = oracles.best(gradients.square().mean(0).tolist(), 40)
    assert flat(selection, model) == expected
    data = [{**data[0], "labels": 4}] if form == "lists" else []
    if data:
        with pytest.raises(ValueError, match=r"must lie in \[0, 4\)"):
            select_parameters(model, settings, data)


def test_labels_may_have_another_name():
    torch.manual_seed(0)
    settings = PatchTSTConfig(
        num_input_channels=2, context_length=16, patch_length=4, patch_stride=4,
        d_model=8, num_attention_heads=2, num_hidden_layers=1, ffn_dim=8,
        num_targets=1, loss="mse",
    )  # fmt: skip
    model = PatchTSTForRegression(settings).double().eval()
    data = [
        {"past_values": torch.randn(16, 2).double(), "target_values": torch.randn(1)}
        for _ in range(6)
    ]
    selection = select_parameters(model, IRDConfig(budget=40, method="fish"), data)
    batches = [{k: v[None] for k, v in s.items()} for s in data]
    gradients = oracles.sample_gradients(model, batches, candidate_names(model))
    expected = oracles.best(gradients.square().mean(0).tolist(), 40)
    assert flat(selection, model) == expected


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("kind", ["bert", "bert-questions"])
def test_a_model_that_returns_tuples_gives_the_same_selection(kind, fisher):
    model, data = make_model(kind), make_samples(kind)
    settings = config(kind, density=0.02, num_samples=12, fisher=fisher)
    expected = select_parameters(model, settings, data)
    model.config.return_dict = False
    found = select_parameters(model, settings, data)
    assert flat(found, model) == flat(expected, model)
    assert isinstance(model(**as_batch(data[0])), tuple)


def test_a_label_in_another_loss_counts():
    """No word is masked, but whether the sentences go together is known."""
    torch.manual_seed(0)
    model = BertForPreTraining(bert_config()).double().eval()
    data = make_samples("bert")
    for n, sample in enumerate(data):
        sample["next_sentence_label"] = sample.pop("labels")
        sample["labels"] = [-100] * len(sample["input_ids"])
        sample["labels"][1] = 5 if n % 2 else -100
    module = "bert.encoder.layer.0.output.dense"
    settings = IRDConfig(budget=40, method="fish", target_modules=[module])
    selection = select_parameters(model, settings, data)

    def loss(model, batch):
        output = model(**batch)
        if output.loss.isfinite():
            return output.loss
        return F.cross_entropy(
            output.seq_relationship_logits, batch["next_sentence_label"]
        )

    gradients = oracles.sample_gradients(
        model, map(as_batch, data), [f"{module}.weight", f"{module}.bias"], loss
    )
    expected = oracles.best(gradients.square().mean(0).tolist(), 40)
    found = selection.indices[module]
    size = model.get_submodule(module).weight.numel()
    in_bias = [size + i for i in found["bias"].tolist()]
    assert [*found["weight"].tolist(), *in_bias] == expected


def test_one_row_with_one_label_is_a_sample():
    model, samples = make_model("bert"), make_samples("bert", 6)
    data = [{**as_batch(s), "labels": s["labels"]} for s in samples]
    settings = config("bert", density=0.02, num_samples=6)
    expected = select_parameters(model, settings, samples)
    found = select_parameters(model, settings, data)
    assert flat(found, model) == flat(expected, model)


def test_dictionaries_inside_batches_are_cut_by_sample():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2)).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()

    def loss(model, batch):
        return F.mse_loss(model(batch["inputs"]["x"]), batch["y"])

    def cut(size):
        return [
            {"inputs": {"x": x[i : i + size]}, "y": y[i : i + size]}
            for i in range(0, 6, size)
        ]

    settings = IRDConfig(budget=3, method="fish", target_modules=["0"], num_samples=6)
    data = Calibration(DataLoader(cut(1), 3, collate_fn=joined_inputs), loss=loss)
    selection = select_parameters(model, settings, data)
    gradients = oracles.sample_gradients(model, cut(1), ["0.weight", "0.bias"], loss)
    expected = oracles.best(gradients.square().mean(0).tolist(), 3)
    indices = selection.indices["0"]
    found = [*indices["weight"].tolist()]
    found += [6 + i for i in indices.get("bias", torch.empty(0, dtype=int)).tolist()]
    assert found == expected


def joined_inputs(rows):
    return {
        "inputs": {"x": torch.cat([row["inputs"]["x"] for row in rows])},
        "y": torch.cat([row["y"] for row in rows]),
    }


def test_samples_without_a_label_are_named_in_one_warning():
    """Of the second, only the first token has one, which nothing predicts."""
    model, data = make_model("gpt2"), make_samples("gpt2")
    data[3]["labels"] = [-100] * len(data[3]["labels"])
    data[7]["labels"][1:] = [-100] * (len(data[7]["labels"]) - 1)
    settings = config("gpt2", density=0.01, num_samples=12, initial_density=0.1)
    message = "2 of 12 calibration samples have no label that counts, as sample 3"
    with pytest.warns(UserWarning, match=message) as warned:
        selection = select_parameters(model, settings, data)
    assert len(warned) == 1
    assert not {3, 7} & set(selection.samples)


def test_labels_of_several_streams_of_tokens_are_tokens():
    """As of models that read codes of sound: ids ``[n, t, streams]``, like labels."""
    model = make_model("llama")
    ids = torch.full((1, 3, 4), 30)
    check_labels({"input_ids": ids, "labels": ids}, model, 0)
    with pytest.raises(ValueError, match=r"must lie in \[0, 40\)"):
        check_labels({"input_ids": ids, "labels": ids + 10}, model, 0)


def test_sampled_labels_of_a_classifier_with_a_decoder():
    config = BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BartForSequenceClassification(config).eval()
    ids = torch.tensor([[0, 5, 6, 7, 2]])
    batch = {"input_ids": ids, "labels": torch.tensor([1])}
    random = torch.Generator().manual_seed(0)
    found = with_sampled_labels(batch, model, random)
    assert found.keys() == batch.keys()
    assert found["labels"].shape == (1,)
    assert 0 <= int(found["labels"]) < 3


def test_a_shuffled_dataloader_is_read_once():
    samples = make_samples("bert", 8)
    loader = DataLoader(samples, batch_size=3, collate_fn=collate, shuffle=True)
    calibration = Calibration(loader)
    model = make_model("bert")
    one = calibration.batch(0, model)
    two = calibration.batch(0, model)
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert len(calibration) == 8


def test_a_shuffled_dataloader_has_one_order():
    digests, samples = set(), make_samples("bert", 8)
    for seed in range(3):
        torch.manual_seed(seed)
        loader = DataLoader(samples, batch_size=3, collate_fn=collate, shuffle=True)
        digests.add(Calibration(loader).digest())
    assert len(digests) == 1


@pytest.mark.parametrize("trim", [0.0, 0.2])
def test_reverse_ird_does_not_prefer_samples_without_labels(trim):
    model, samples = make_model("llama-untied"), make_samples("llama-untied")
    for sample in samples[2:4]:
        sample["labels"] = [-100] * len(sample["labels"])
    options = {"budget": 30, "num_samples": 12, "trim_samples": trim}
    settings = config("llama-untied", method="reverse_ird", **options)
    with pytest.warns(UserWarning, match="have no label"):
        selection = select_parameters(model, settings, samples)
    assert not {2, 3} & {*selection.samples}
    assert selection.sample_scores.isfinite().all()


class Masking:
    """A collator that draws from every global generator."""

    def __call__(self, samples):
        batch = collate(samples)
        batch["input_ids"][torch.rand(batch["input_ids"].shape) < 0.2] = 1
        batch["input_ids"][0, 1] = 3 + random.randrange(9)
        batch["input_ids"][0, 2] = 3 + np.random.randint(9)  # noqa: NPY002
        return batch


@pytest.mark.parametrize("kind", ["loader", "shuffled loader", "masking collator"])
def test_randomness_of_the_data_comes_from_the_seed(kind):
    model = make_model("bert")
    samples = make_samples("bert", 8)

    def states():
        torch_state = torch.get_rng_state().tolist()
        return torch_state, random.getstate(), repr(np.random.get_state())  # noqa: NPY002

    def select(global_seed):
        torch.manual_seed(global_seed)
        random.seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002
        before = states()
        if kind == "masking collator":
            data = Calibration(samples, Masking())
        else:
            shuffle = kind.startswith("shuffled")
            data = DataLoader(samples, 3, shuffle, collate_fn=collate)
        options = {"budget": 30, "num_samples": 8, "initial_density": 0.1}
        selection = select_parameters(model, config("bert", **options), data)
        assert states() == before
        return flat(selection, model), selection.samples

    assert select(1) == select(2)


def test_a_custom_loss_on_tuples():
    # With two classes, rows of the last layer would have equal squares.
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])

    def loss(model, batch):
        inputs, target = batch
        return nn.functional.cross_entropy(model(inputs), target)

    rows = [(x[i], y[i]) for i in range(6)]
    batches = [(x[i : i + 1], y[i : i + 1]) for i in range(6)]
    gradients = oracles.sample_gradients(model, batches, candidate_names(model), loss)
    for data in (rows, DataLoader(rows, batch_size=4)):
        selection = select_parameters(
            model,
            IRDConfig(budget=5, method="fish", num_samples=6),
            Calibration(data, loss=loss),
        )
        fisher = gradients.square().mean(0).tolist()
        assert flat(selection, model) == oracles.best(fisher, 5)


SAMPLED = ["bert", "bert-regression", "bert-tokens", "bert-questions", "gpt2", "t5"]


@pytest.mark.parametrize("kind", SAMPLED)
def test_sampled_labels_depend_on_the_seed_alone(kind):
    model = make_model(kind)
    data = make_samples(kind, 6)
    pool = find_candidates(model, config(kind, density=0.1))

    def fisher(fisher_type, samples=(0, 1, 2, 3, 4, 5), seed=0):
        with borrowed(model):
            estimator = FisherEstimator(
                model, pool, Calibration(data), fisher_type, seed
            )
            return joined(estimator.fisher(samples))

    one = fisher("sampled")
    assert torch.equal(one, fisher("sampled"))
    assert not torch.equal(one, fisher("empirical"))
    seeds = [fisher("sampled", seed=seed) for seed in range(1, 4)]
    assert not all(torch.equal(one, other) for other in seeds)
    halves = fisher("sampled", (0, 2, 4)) + fisher("sampled", (1, 3, 5))
    assert_close(halves / 2, one, **TOL[torch.float32])


def test_sampled_labels_of_a_classifier_follow_its_predictions():
    model = make_model("bert").double()
    batch = as_batch(make_samples("bert", 1)[0])
    with torch.no_grad():
        model.classifier.weight.mul_(40)
        chance = model(**batch).logits.softmax(-1)[0, 1].item()
    generator = torch.Generator().manual_seed(0)
    drawn = [
        with_sampled_labels(batch, model, generator)["labels"].item()
        for _ in range(800)
    ]
    deviation = (chance * (1 - chance) / 800) ** 0.5
    assert abs(sum(drawn) / 800 - chance) < 4 * deviation + 1e-9


def test_sampled_labels_of_models_that_see_are_those_of_their_text():
    model = make_model("llama-untied").double()
    batch = as_batch(make_samples("llama-untied", 1)[0])
    as_text, as_sight = (
        with_sampled_labels(batch, model, torch.Generator().manual_seed(0))["labels"]
        for model.loss_type in ("ForCausalLM", "ForConditionalGeneration")
    )
    assert torch.equal(as_text, as_sight)


class Listens(nn.Module):
    """A model with a decoder that shifts the labels by itself, as Whisper."""

    config = SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=7)

    def forward(self, labels, decoder_input_ids=None):
        self.read = decoder_input_ids
        return SimpleNamespace(logits=torch.zeros(*labels.shape, 5))


def test_a_decoder_reads_the_true_text_while_labels_are_drawn():
    model, labels = Listens(), torch.tensor([[3, 4, 2, -100]])
    found = with_sampled_labels(
        {"labels": labels}, model, torch.Generator().manual_seed(0)
    )
    assert model.read.tolist() == [[7, 3, 4, 2]]
    assert torch.equal(found["decoder_input_ids"], model.read)


def test_labels_without_predictions_of_their_own_are_not_drawn():
    class Counts(Listens):
        def forward(self, labels, **_):
            return SimpleNamespace(logits=torch.zeros(labels.shape))

    batch = {"labels": torch.tensor([[1, 0, 1]])}
    with pytest.raises(ValueError, match=r"shape \(1, 3\), logits \(1, 3\)"):
        with_sampled_labels(batch, Counts(), torch.Generator())


@pytest.mark.parametrize("label", [True, np.int32(1), np.bool_(True)])
def test_labels_are_as_transformers_collator_has_them(label):
    rows = [{"input_ids": [3, 4, 5], "label": label}]
    found = Calibration(rows).batch(0, make_model("bert"))["labels"]
    assert found.dtype == torch.int64
    assert found.tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_in_low_precision_is_warmed_up(dtype):
    model = make_model("bert").to(dtype)
    settings = IRDConfig(
        task_type="SEQ_CLS", density=0.1, method="fish", head_warmup_steps=20,
        head_warmup_learning_rate=1e-2,
    )  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    warm = select_parameters(model, settings, make_samples("bert", 16))
    cold = IRDConfig(task_type="SEQ_CLS", density=0.1, method="fish")
    assert warm.overlap(select_parameters(model, cold, make_samples("bert", 16))) < 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama-untied", "t5", "bert-tokens"])
def test_sampled_labels_come_from_the_position_that_predicts_them(kind):
    """With logits this large, the draw is the most likely class."""
    model = make_model(kind).double()
    head = model.classifier if kind == "bert-tokens" else model.lm_head
    batch = as_batch(make_samples(kind, 1)[0])
    given = dict(batch)
    with torch.no_grad():
        head.weight.mul_(1e9)
        logits = model(**batch).logits
    drawn = with_sampled_labels(batch, model, torch.Generator().manual_seed(0))[
        "labels"
    ]
    best = logits.argmax(-1)
    if kind == "llama-untied":
        best, drawn = best[:, :-1], drawn[:, 1:]
        given["labels"] = given["labels"][:, 1:]
    expected = torch.where(given["labels"] == -100, -100, best)
    assert torch.equal(drawn, expected)


def test_the_sampled_fisher_converges_to_the_true_one():
    """For logistic regression the true diagonal is x_j^2 p (1 - p), summed over x."""
    torch.manual_seed(0)
    model = make_model("bert-regression").double()
    pool = find_candidates(model, config("bert-regression", density=0.1))
    batch = as_batch(make_samples("bert-regression", 1)[0])
    batch["labels"] = batch["labels"].double()
    # With the target drawn around the prediction, E (2 e)^2 = 2, so F = 2 (df/dw)^2.
    copies = Calibration([batch] * 1500)
    estimator = FisherEstimator(model, pool, copies, "sampled")
    out = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.sum()
    slopes = torch.autograd.grad(out, pool.parameters, allow_unused=True)
    expected = torch.cat([2 * g.flatten().square() for g in slopes])
    with borrowed(model):
        found = joined(estimator.fisher(tuple(range(1500))))
    big = expected > expected.max() * 1e-3
    # 1500 draws of chi-square: relative standard deviation (2 / 1500) ** 0.5 = 0.037
    assert ((found / expected)[big] - 1).abs().max() < 0.15


def example_selection() -> tuple[nn.Module, Selection]:
    model = make_model("bert")
    options = {"density": 0.02, "num_samples": 8}
    return model, select_parameters(
        model, config("bert", **options), make_samples("bert")
    )


def test_a_selection_is_saved_and_loaded_whole(tmp_path):
    _, selection = example_selection()
    selection.save(tmp_path / "deep" / "selection.safetensors")
    loaded = Selection.load(tmp_path / "deep" / "selection.safetensors")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["selection.safetensors"]
    for kind in ("indices", "scores"):
        mine, theirs = getattr(selection, kind), getattr(loaded, kind)
        assert mine.keys() == theirs.keys()
        for module in mine:
            for name in mine[module]:
                assert torch.equal(mine[module][name], theirs[module][name])
                assert mine[module][name].dtype == theirs[module][name].dtype
    assert torch.equal(selection.sample_scores, loaded.sample_scores)
    for fact in ("samples", "stages", "seconds", "method", "seed", "num_candidates"):
        assert getattr(selection, fact) == getattr(loaded, fact)
    assert loaded.density == selection.density
    assert {
        m: {n: tuple(s) for n, s in t.items()} for m, t in loaded.shapes.items()
    } == {m: {n: tuple(s) for n, s in t.items()} for m, t in selection.shapes.items()}


def test_a_selection_is_frozen_sorted_and_small():
    model, selection = example_selection()
    with pytest.raises(AttributeError):
        selection.seed = 4
    for parameters in selection.indices.values():
        for indices in parameters.values():
            assert indices.dtype == torch.int32
            assert bool((indices[1:] > indices[:-1]).all())
            assert indices.numel() > 0
    assert len(selection) == round(0.02 * selection.num_candidates)
    assert len(selection.seconds) == len(selection.stages)
    assert len(selection.sample_scores) == len(selection.samples)
    assert flat(selection, model) == sorted(set(flat(selection, model)))


def test_another_kind_of_file_is_no_selection(tmp_path):
    from safetensors.torch import save_file  # noqa: PLC0415

    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds no selection"):
        Selection.load(tmp_path / "x.safetensors")


def test_a_truncated_selection_file_is_refused(tmp_path):
    _, selection = example_selection()
    path = tmp_path / "selection.safetensors"
    selection.save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cut short"):
        Selection.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    _, selection = example_selection()
    path = tmp_path / "selection.safetensors"
    selection.save(path)
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("peft_ird.sparse.storage.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        selection.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
